from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from remote_modules.plan.throughput import Capacity, Holder, Layout, coverage, span_throughput
from remote_modules.spans import Span

HOLDERS = [Holder(Span(0, 4), 40.0), Holder(Span(2, 6), 20.0), Holder(Span(7, 8), 1.0)]
TAIL = (0, 1, 2, 3, 4, 8)  # the last four blocks share keys and values


@pytest.mark.parametrize(
    ("num_blocks", "network", "expected"),
    [(1, math.inf, 100.0), (4, math.inf, 25.0), (4, 10.0, 10.0), (20, 10.0, 5.0)],
    ids=["one block", "four blocks", "slow link", "link that is fast enough"],
)
def test_server_divides_its_time_among_its_blocks(num_blocks: int, network: float, expected: float) -> None:
    assert span_throughput(100.0, num_blocks, network) == expected
    assert Holder(Span(0, num_blocks), 100.0, network).throughput == expected
    capacity = Capacity(tokens_per_s=100.0, max_blocks=99, network_tokens_per_s=network)
    assert capacity.throughput(num_blocks) == expected


def test_coverage_sums_the_holders_of_each_block() -> None:
    assert coverage(8, HOLDERS) == (10.0, 10.0, 15.0, 15.0, 5.0, 5.0, 0.0, 1.0)


def test_coverage_of_an_empty_swarm_is_zero() -> None:
    assert coverage(3, []) == (0.0, 0.0, 0.0)


def test_holder_beyond_the_model_is_clipped() -> None:
    assert coverage(2, [Holder(Span(1, 9), 24.0), Holder(Span(4, 6), 3.0)]) == (0.0, 3.0)


def test_coverage_does_not_depend_on_the_order_of_holders() -> None:
    rng = Random(0)
    holders = [Holder(Span(0, 2), 10 ** rng.uniform(-9, 9)) for _ in range(50)]
    expected = coverage(2, holders)
    for _ in range(20):
        rng.shuffle(holders)
        assert coverage(2, holders) == expected


@pytest.mark.parametrize("cuts", [(0, 4), (1, 8), (0, 4, 4, 8), (0, 5, 3, 8), (8, 0)], ids=str)
def test_cuts_that_do_not_ascend_over_the_model_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^cuts must ascend from 0 to 8, got {', '.join(map(str, cuts))}$"):
        Layout(8, cuts)


def test_sizes_of_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^layout of 8 blocks got the sizes of 2$"):
        Layout(8, (), (1.0, 2.0))


def test_cuts_in_any_order_make_a_layout() -> None:
    assert Layout.of(8, {8, 0, 3}) == Layout(8, (0, 3, 8))


def spans_of(layout: Layout, capacity: Capacity) -> list[str]:
    starts, ends = layout.legal(capacity).nonzero()
    return [str(layout.span(int(start), int(end))) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("layout", "capacity", "expected"),
    [
        (Layout(3), Capacity(tokens_per_s=1, max_blocks=2), "0:1 0:2 1:2 1:3 2:3"),
        (Layout(3), Capacity(tokens_per_s=1, max_blocks=2, is_full=True), "0:2 1:3"),
        (Layout(8, TAIL), Capacity(tokens_per_s=1, max_blocks=5, is_full=True), "0:4 3:8"),
        (Layout(8, TAIL), Capacity(tokens_per_s=1, max_blocks=1), "0:1 1:2 2:3 3:4"),
        (Layout(8, (0, 4, 8)), Capacity(tokens_per_s=1, max_blocks=3), ""),
        (Layout(3, (), (1, 5, 1)), Capacity(tokens_per_s=1, max_blocks=3, room_bytes=5), "0:1 1:2 2:3"),
        (Layout(3, (), (1, 5, 1)), Capacity(tokens_per_s=1, max_blocks=3, room_bytes=6), "0:1 0:2 1:2 1:3 2:3"),
        (Layout(3, (0, 2, 3), (1, 5, 1)), Capacity(tokens_per_s=1, max_blocks=3, room_bytes=5), "2:3"),
    ],
)
def test_spans_are_legal_between_cuts_and_within_the_room(layout: Layout, capacity: Capacity, expected: str) -> None:
    spans = spans_of(layout, capacity)
    assert " ".join(spans) == expected
    assert layout.longest(capacity) == max(((len(Span.parse(span))) for span in spans), default=0)
    assert np.count_nonzero(layout.heights(capacity)) == len(spans)
    for start in range(layout.num_blocks):
        for end in range(start + 1, layout.num_blocks + 1):
            assert layout.allows(Span(start, end), capacity) == (f"{start}:{end}" in spans)
    assert not layout.allows(Span(0, layout.num_blocks + 1), capacity)
    if spans:
        assert str(layout.first(capacity)) == max((s for s in spans if s[0] == spans[0][0]), key=lambda s: s[-1])


def test_height_is_the_throughput_of_the_span() -> None:
    heights = Layout(4, (0, 1, 4)).heights(Capacity(tokens_per_s=30.0, max_blocks=4, network_tokens_per_s=20.0))
    assert heights.tolist() == [[0.0, 20.0, 7.5], [0.0, 0.0, 10.0], [0.0, 0.0, 0.0]]
