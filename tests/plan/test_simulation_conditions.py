"""Conditions of a simulated swarm: what is refused, and what hardware is drawn."""

from __future__ import annotations

import math
import statistics
from random import Random
from typing import Any

import pytest

from remote_modules.plan.simulation.conditions import Conditions, draw_capacity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_peers": 0}, "num_peers must be in 1..1000000, got 0"),
        ({"num_peers": 1_000_001}, "num_peers must be in 1..1000000, got 1000001"),
        ({"mean_life_s": 0.0}, "mean_life_s must be more than 0, got 0.0"),
        ({"fetch_s_per_block": -1.0}, "fetch_s_per_block must be 0 or more, got -1.0"),
        ({"speed_sigma": math.nan}, "speed_sigma must be 0 or more, got nan"),
        ({"min_span": 31}, "1 <= min_span <= max_span <= num_blocks <= 4096, got 31, 30, 80"),
        ({"num_blocks": 20}, "1 <= min_span <= max_span <= num_blocks <= 4096, got 3, 30, 20"),
        ({"num_blocks": 5000}, "got 3, 30, 5000"),
        ({"crash_share": 1.5}, "crash_share may be at most 1 and announce_jitter less than 1, got 1.5 and 0.1"),
        ({"announce_jitter": 1.0}, "got 0.5 and 1.0"),
        ({"lease_s": 16.5}, r"a lease of 16.5 s ends before its renewal: .* got 15.0 s and 0.1"),
    ],
)
def test_conditions_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conditions(**changes)


def test_interval_may_be_infinite() -> None:
    assert Conditions(route_interval_s=math.inf).route_interval_s == math.inf


def test_speeds_are_lognormal_and_sizes_uniform() -> None:
    rng = Random(5)
    conditions = Conditions(min_span=3, max_span=7, median_tokens_per_s=500.0, speed_sigma=0.7, network_sigma=0.3)
    drawn = [draw_capacity(conditions, rng) for _ in range(4000)]
    assert {capacity.max_blocks for capacity in drawn} == {3, 4, 5, 6, 7}
    speeds = [math.log(capacity.tokens_per_s) for capacity in drawn]
    networks = [math.log(capacity.network_tokens_per_s) for capacity in drawn]
    assert math.exp(statistics.median(speeds)) == pytest.approx(500.0, rel=0.05)
    assert statistics.stdev(speeds) == pytest.approx(0.7, rel=0.05)
    assert math.exp(statistics.median(networks)) == pytest.approx(750.0, rel=0.05)
    assert statistics.stdev(networks) == pytest.approx(0.3, rel=0.05)


def test_same_seed_draws_the_same_peers() -> None:
    first, second = ([draw_capacity(Conditions(), Random(1)) for _ in range(3)] for _ in range(2))
    assert first == second
