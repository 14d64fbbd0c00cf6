"""`benchmarks/adapter_traffic.py` on peers in this process: what it measures is within its bars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

from remote_modules.model.checkpoint import BUILT_IN
from remote_modules.testing import LocalSwarm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks


@pytest.fixture(scope="module")
def traffic() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("adapter_traffic")


@pytest.fixture(scope="module")
def swarm(traffic: Any) -> Iterator[LocalSwarm]:
    with LocalSwarm(BUILT_IN, spans=traffic.SPANS) as swarm:
        yield swarm


@pytest.mark.parametrize("is_half_frozen", [False, True])
def test_steps_send_little_more_than_what_changed(traffic: Any, swarm: LocalSwarm, is_half_frozen: bool) -> None:
    found = traffic.measure_training(swarm, 8, 2, is_half_frozen=is_half_frozen)
    assert found["counted_bytes_per_step"] == found["changed_bytes"]
    assert 1.0 < found["share_on_wire"] <= 1.0 + traffic.MOST
    assert found["share_received_by_peer"] == [1.0, 1.0, 1.0]


def test_inference_sends_nothing_after_the_first_use(traffic: Any, swarm: LocalSwarm) -> None:
    found = traffic.measure_inference(swarm, 8)
    assert found["first_use_bytes"] > 0
    assert (found["later_bytes"], found["later_received"]) == (0, 0)
