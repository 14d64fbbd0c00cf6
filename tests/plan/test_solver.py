from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remote_modules.plan.exhaustive import better_spans
from remote_modules.plan.solver import QUICK, assign_spans, bottleneck_bound, bottleneck_of
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

from .swarms import random_capacity, small_swarm


def even(tokens_per_s: float, max_blocks: int, network_tokens_per_s: float = math.inf) -> Capacity:
    return Capacity(tokens_per_s=tokens_per_s, max_blocks=max_blocks, network_tokens_per_s=network_tokens_per_s)


@pytest.mark.parametrize(
    ("num_blocks", "servers", "expected"),
    [
        (10, [even(100, 10)], 10.0),
        (10, [even(100, 5), even(100, 5)], 20.0),
        (10, [even(1000, 5), even(30, 9)], 6.0),  # the fast one can add 5 F at most: 5 F + 30 = 10 F
        (10, [even(1000, 5), even(1e9, 4)], 0.0),  # nine places for ten blocks
        (10, [even(1000, 5), even(1e9, 5)], 200.0),  # as high as the slower of the two
        (10, [even(1000, 10, 7.0)], 7.0),
        (10, [even(1000, 10, 7.0), even(1, 1)], 7.1),
        (10, [], 0.0),
    ],
)
def test_bound_is_what_work_divided_at_will_would_give(
    num_blocks: int, servers: list[Capacity], expected: float
) -> None:
    assert bottleneck_bound(Layout(num_blocks), servers) == pytest.approx(expected)


def test_bound_counts_a_server_only_for_spans_between_cuts() -> None:
    assert bottleneck_bound(Layout(8, (0, 4, 8)), [even(8, 5), even(8, 5)]) == 2.0
    assert bottleneck_bound(Layout(8, (0, 4, 8)), [even(8, 5), even(8, 3)]) == 0.0


@pytest.mark.parametrize("seed", range(120))
def test_small_swarm_is_within_5_percent_of_the_exhaustive_optimum(seed: int) -> None:
    layout, capacities = small_swarm(seed)
    spans = assign_spans(layout, capacities, rng=Random(0))
    found = bottleneck_of(layout, capacities, spans)
    better, is_complete = better_spans(layout, capacities, than=found)
    assert is_complete
    best = found if better is None else bottleneck_of(layout, capacities, better)
    assert best <= bottleneck_bound(layout, capacities) * (1 + 1e-9)
    assert found >= 0.95 * best


@pytest.mark.parametrize("num_servers", [20, 32, 50, 100])
def test_large_swarm_is_near_the_bound(num_servers: int) -> None:
    rng = Random(num_servers)
    servers = [
        Capacity(tokens_per_s=rng.lognormvariate(6.0, 1.0), max_blocks=rng.randint(3, 30)) for _ in range(num_servers)
    ]
    spans = assign_spans(Layout(70), servers, rng=Random(0), num_kicks=200)
    assert bottleneck_of(Layout(70), servers, spans) >= 0.95 * bottleneck_bound(Layout(70), servers)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
@example(193048)  # a server that relieves less than rounding shows
def test_spans_are_legal_and_the_same_each_time(seed: int) -> None:
    layout, capacities = small_swarm(seed, max_servers=12, max_blocks=12)
    spans = assign_spans(layout, capacities, rng=Random(1), num_kicks=QUICK)
    assert spans == assign_spans(layout, capacities, rng=Random(1), num_kicks=QUICK)
    for capacity, span in zip(capacities, spans, strict=True):
        assert span is None or layout.allows(span, capacity)


def test_too_few_servers_cover_as_much_as_they_can() -> None:
    spans = assign_spans(Layout(10), [even(1, 3), even(1, 4)], rng=Random(0))
    held = {block for span in spans if span is not None for block in span}
    assert len(held) == 7


def test_no_servers_no_spans() -> None:
    assert assign_spans(Layout(3), [], rng=Random(0)) == ()
    assert bottleneck_of(Layout(3), [], []) == 0.0


def test_server_without_a_legal_span_holds_nothing() -> None:
    layout = Layout(4, (0, 2, 4))
    servers = [even(5, 1), *[even(8, 2)] * 10]
    spans = assign_spans(layout, servers, rng=Random(0), num_kicks=5)
    assert spans[0] is None
    assert set(spans[1:]) == {Span(0, 2), Span(2, 4)}
    assert bottleneck_of(layout, servers, spans) == 20.0


def test_capacity_of_the_layout_is_not_passed() -> None:
    rng = Random(0)
    sizes = tuple(rng.choice([1.0, 4.0]) for _ in range(12))
    layout = Layout(12, (), sizes)
    servers = [Capacity(tokens_per_s=random_capacity(rng, 3).tokens_per_s, max_blocks=12, room_bytes=7.0)] * 12
    spans = assign_spans(layout, servers, rng=rng, num_kicks=10)
    assert all(span is not None and sum(sizes[span.start : span.end]) <= 7.0 for span in spans)
    assert bottleneck_of(layout, servers, spans) > 0
