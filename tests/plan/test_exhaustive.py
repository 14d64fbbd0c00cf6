from __future__ import annotations

import itertools

import pytest

from remote_modules.plan.exhaustive import better_spans
from remote_modules.plan.solver import bottleneck_of
from remote_modules.plan.throughput import Capacity, Layout, span_throughput
from remote_modules.spans import Span

from .swarms import small_swarm


def brute_force(layout: Layout, capacities: list[Capacity]) -> float:
    """Every combination, without any short cut."""
    cuts = layout.cuts or range(layout.num_blocks + 1)
    choices: list[list[tuple[Span, float] | None]] = []
    for capacity in capacities:
        spans = [Span(start, end) for start in cuts for end in cuts if start < end <= start + capacity.max_blocks]
        network = capacity.network_tokens_per_s
        added = [(span, span_throughput(capacity.tokens_per_s, len(span), network)) for span in spans]
        choices.append([None, *added])
    best = 0.0
    for picked in itertools.product(*choices):
        totals = [0.0] * layout.num_blocks
        for span, throughput in filter(None, picked):
            for block in span:
                totals[block] += throughput
        best = max(best, min(totals))
    return best


@pytest.mark.parametrize("seed", range(80))
def test_best_of_all_combinations_is_found(seed: int) -> None:
    layout, capacities = small_swarm(seed, max_servers=4, max_blocks=5)
    expected = brute_force(layout, capacities)
    spans, is_complete = better_spans(layout, capacities)
    assert is_complete
    if spans is None:
        assert expected == 0.0
    else:
        assert bottleneck_of(layout, capacities, spans) == pytest.approx(expected, rel=1e-8)


def test_only_better_spans_than_the_known_ones_are_returned() -> None:
    pair = [Capacity(tokens_per_s=10.0, max_blocks=2)] * 2
    assert better_spans(Layout(2), pair, than=9.0) == ((Span(0, 1), Span(1, 2)), True)
    assert better_spans(Layout(2), pair, than=10.0) == (None, True)


def test_server_that_fits_nowhere_holds_nothing() -> None:
    layout = Layout(4, (0, 2, 4))
    servers = [Capacity(tokens_per_s=9.0, max_blocks=1), Capacity(tokens_per_s=8.0, max_blocks=4)]
    assert better_spans(layout, servers) == ((None, Span(0, 4)), True)


def test_limit_ends_the_search() -> None:
    servers = [Capacity(tokens_per_s=float(number), max_blocks=3) for number in range(1, 7)]
    spans, is_complete = better_spans(Layout(9), servers, max_visits=200)
    assert not is_complete
    better, is_complete = better_spans(Layout(9), servers)
    assert is_complete
    assert better is not None
    assert spans is None or bottleneck_of(Layout(9), servers, spans) <= bottleneck_of(Layout(9), servers, better)
