"""`benchmarks/lanes.py`: both arms do what they say, and a missed bar is seen. The rest needs the laboratory."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark

from remote_modules.client import step
from remote_modules.client.lanes import step_lane
from remote_modules.client.swarm import Swarm


@pytest.fixture(scope="module")
def lanes() -> Any:
    return load_benchmark("lanes")


def test_arms_differ_in_dialling_and_lanes(lanes: Any) -> None:
    before = Swarm.dial_soon
    with lanes.arm(lanes.ARMS[0]):
        assert Swarm.dial_soon is not before
        assert step.step_lane is not step_lane  # type: ignore[attr-defined]
    with lanes.arm(lanes.ARMS[1]):
        assert Swarm.dial_soon is before
        assert step.step_lane is step_lane  # type: ignore[attr-defined]


@pytest.mark.parametrize(("again", "status"), [(0.9, 0), (1.1, 1)])
def test_slow_opening_is_seen(lanes: Any, again: float, status: int) -> None:
    one = {"opening": [4.0, 5.0, 4.5], "opening again": [again], "waiting": [1.25]}
    assert lanes.report(dict.fromkeys(lanes.ARMS, one)) == status
