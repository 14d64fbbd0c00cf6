"""The relaxation bound of many peers against bisection, and against the spans that the solver finds."""

from __future__ import annotations

import math
from random import Random

import pytest

from remote_modules.plan.simulation.bounds import relaxation_bound
from remote_modules.plan.simulation.conditions import Conditions, draw_capacity
from remote_modules.plan.solver import assign_spans, bottleneck_bound, bottleneck_of
from remote_modules.plan.throughput import Capacity, Layout


def by_bisection(num_blocks: int, capacities: list[Capacity]) -> float:
    def is_possible(bottleneck: float) -> bool:
        longest = [min(capacity.max_blocks, num_blocks) for capacity in capacities]
        most = [
            min(capacity.tokens_per_s, length * min(capacity.network_tokens_per_s, bottleneck))
            for capacity, length in zip(capacities, longest, strict=True)
        ]
        return sum(most) >= num_blocks * bottleneck * (1 - 1e-12)

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


@pytest.mark.parametrize("seed", range(20))
def test_bound_equals_bisection_and_no_plan_exceeds_it(seed: int) -> None:
    rng = Random(seed)
    conditions = Conditions(num_blocks=12, min_span=1, max_span=rng.choice([4, 12]), speed_sigma=rng.choice([0.3, 1.5]))
    capacities = [draw_capacity(conditions, rng) for _ in range(rng.randint(4, 40))]
    bound = relaxation_bound(12, capacities)
    assert bound == pytest.approx(by_bisection(12, capacities), rel=1e-6, abs=1e-6)
    layout = Layout(12)
    assert bound <= bottleneck_bound(layout, capacities) * (1 + 1e-9)
    spans = assign_spans(layout, capacities, rng=rng, num_kicks=2)
    assert bottleneck_of(layout, capacities, spans) <= bound * (1 + 1e-9)


def test_equal_peers_share_the_blocks_evenly() -> None:
    assert relaxation_bound(8, [Capacity(tokens_per_s=100.0, max_blocks=4)] * 4) == 50.0
    assert relaxation_bound(8, [Capacity(tokens_per_s=100.0, max_blocks=4, network_tokens_per_s=10.0)] * 4) == 20.0


def test_too_few_blocks_in_all_bound_to_nothing() -> None:
    assert relaxation_bound(8, [Capacity(tokens_per_s=100.0, max_blocks=3)] * 2) == 0.0
    assert relaxation_bound(8, []) == 0.0


def test_peer_with_more_room_than_blocks_counts_for_the_blocks() -> None:
    everything = Capacity(tokens_per_s=80.0, max_blocks=100, network_tokens_per_s=math.inf)
    assert relaxation_bound(8, [everything]) == 10.0
