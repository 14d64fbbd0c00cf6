from __future__ import annotations

import math
from random import Random

import pytest

from remote_modules.plan.placement import choose_span
from remote_modules.plan.throughput import Capacity, Holder, Layout, coverage
from remote_modules.spans import Span

HOLDERS = [Holder(Span(0, 4), 40.0), Holder(Span(2, 6), 20.0), Holder(Span(7, 8), 1.0)]
TAIL = (0, 1, 2, 3, 4, 8)  # the last four blocks share keys and values


def capacity(max_blocks: int, tokens_per_s: float = 100.0, *, is_full: bool = True) -> Capacity:
    return Capacity(tokens_per_s=tokens_per_s, max_blocks=max_blocks, is_full=is_full)


@pytest.mark.parametrize(("length", "expected"), [(1, "6:7"), (2, "6:8"), (4, "4:8"), (8, "0:8"), (100, "0:8")])
def test_weakest_blocks_are_chosen(length: int, expected: str) -> None:
    assert str(choose_span(Layout(8), capacity(length), HOLDERS)) == expected


def test_empty_swarm_first_blocks_are_chosen() -> None:
    assert choose_span(Layout(8), capacity(3), []) == Span(0, 3)
    assert choose_span(Layout(8), capacity(3, is_full=False), []) == Span(0, 3)


def test_worst_block_counts_more_than_the_sum() -> None:
    holders = [Holder(Span(0, 1), 9.0), Holder(Span(1, 2), 1.0), Holder(Span(2, 3), 9.0), Holder(Span(3, 6), 6.0)]
    assert choose_span(Layout(6), capacity(2), holders) == Span(0, 2)


@pytest.mark.parametrize(
    ("weak", "tokens_per_s", "expected"),
    [
        (Span(3, 5), 20.0, "3:5"),  # 1 + 20 / 2 reaches what the others have
        (Span(3, 5), 10.0, "3:5"),  # a longer one would raise the bottleneck less
    ],
)
def test_fewer_blocks_than_fit_are_chosen_where_that_raises_the_bottleneck_more(
    weak: Span, tokens_per_s: float, expected: str
) -> None:
    rest = [Holder(Span(0, weak.start), 10.0 * weak.start), Holder(Span(weak.end, 8), 10.0 * (8 - weak.end))]
    holders = [*rest, Holder(weak, 1.0 * len(weak))]
    assert str(choose_span(Layout(8), capacity(8, tokens_per_s, is_full=False), holders)) == expected


def test_slow_link_makes_a_longer_span_the_better_one() -> None:
    """Over 10 tokens per second that the link carries, shorter spans are no faster."""
    slow = Capacity(tokens_per_s=100.0, max_blocks=8, network_tokens_per_s=10.0)
    assert choose_span(Layout(16), slow, [Holder(Span(0, 16), 16.0)]) == Span(0, 8)


def test_balanced_swarm_the_longest_span_is_chosen() -> None:
    assert choose_span(Layout(12), capacity(5, is_full=False), [Holder(Span(0, 12), 120.0)]) == Span(0, 5)


def test_span_has_room_for_its_own_blocks_not_for_the_largest() -> None:
    sizes = (9.0, 1.0, 1.0, 1.0, 1.0, 9.0)
    fits = Capacity(tokens_per_s=10.0, max_blocks=6, room_bytes=4.0)
    assert choose_span(Layout(6, (), sizes), fits, []) == Span(1, 5)


@pytest.mark.parametrize("is_full", [False, True], ids=["may be short", "full"])
@pytest.mark.parametrize("has_cuts", [False, True], ids=["anywhere", "at-cuts"])
@pytest.mark.parametrize("seed", range(60))
def test_bottleneck_is_raised_as_much_as_brute_force_can(seed: int, *, has_cuts: bool, is_full: bool) -> None:
    rng = Random(seed)
    num_blocks = rng.randint(1, 12)
    holders = []
    for _ in range(rng.randint(0, 6)):
        start = rng.randrange(num_blocks)
        holders.append(Holder(Span(start, rng.randint(start + 1, num_blocks)), float(rng.randint(1, 30))))
    inner = range(1, num_blocks)
    cuts = {0, num_blocks, *(cut for cut in inner if rng.random() < 0.5)} if has_cuts else set(range(num_blocks + 1))
    mine = Capacity(
        tokens_per_s=rng.uniform(1.0, 30.0),
        max_blocks=rng.randint(1, num_blocks),
        network_tokens_per_s=rng.choice([math.inf, 3.0]),
        is_full=is_full,
    )
    legal = [Span(s, e) for s in sorted(cuts) for e in sorted(cuts) if s < e <= s + mine.max_blocks]
    if is_full:
        legal = [span for span in legal if not any(other != span and other.covers(span) for other in legal)]
    layout = Layout.of(num_blocks, cuts if has_cuts else ())
    if not legal:
        with pytest.raises(ValueError, match=f"^{mine.max_blocks} blocks are too few: "):
            choose_span(layout, mine, holders)
        return

    def after(span: Span) -> tuple[float, ...]:
        return coverage(num_blocks, [*holders, Holder(span, mine.tokens_per_s, mine.network_tokens_per_s)])

    chosen = choose_span(layout, mine, holders)
    assert chosen in legal
    assert min(after(chosen)) == pytest.approx(max(min(after(span)) for span in legal), rel=1e-8)


@pytest.mark.parametrize(
    ("length", "holders", "expected"),
    [
        (3, [], "0:3"),
        (4, [Holder(Span(0, 4), 400.0)], "4:8"),
        (5, [Holder(Span(0, 4), 400.0)], "3:8"),
        (5, [Holder(Span(0, 3), 300.0)], "3:8"),
        (7, [Holder(Span(4, 8), 400.0)], "0:4"),
        (8, [], "0:8"),
        (3, [Holder(Span(0, 4), 1.0)], "0:3"),  # too few for what nobody holds
    ],
)
def test_group_that_cannot_be_cut_is_taken_whole_or_not_at_all(
    length: int, holders: list[Holder], expected: str
) -> None:
    assert str(choose_span(Layout(8, TAIL), capacity(length), holders)) == expected


def test_all_cuts_are_the_same_as_none() -> None:
    for length in range(1, 9):
        mine = capacity(length, is_full=False)
        assert choose_span(Layout.of(8, range(9)), mine, HOLDERS) == choose_span(Layout(8), mine, HOLDERS)


def test_fewer_blocks_than_any_legal_span_are_refused_naming_the_cuts() -> None:
    with pytest.raises(ValueError, match="blocks are too few") as caught:
        choose_span(Layout.of(12, {12, 0, 5}), capacity(3), [])
    assert str(caught.value) == (
        "3 blocks are too few: the shortest span that may be served has 5, as spans may begin and end only at 0, 5, 12"
    )


def test_less_room_than_any_span_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="no span fits") as caught:
        choose_span(Layout(2, (), (10.0, 20.0)), Capacity(tokens_per_s=1.0, max_blocks=2, room_bytes=9.0), [])
    assert str(caught.value) == (
        "the smallest span needs 10 bytes with its KV cache and 9 are free: "
        "no span fits; use a smaller KV budget, quantization or another device"
    )


@pytest.mark.parametrize("seed", range(5))
def test_servers_join_a_model_with_cuts_until_all_blocks_are_covered(seed: int) -> None:
    rng = Random(seed)
    layout = Layout(20, (0, 1, 2, 3, 4, 5, 6, 7, 8, 20))
    holders: list[Holder] = []
    for _ in range(8):
        holders.append(Holder(choose_span(layout, capacity(rng.randint(12, 14)), holders), 1200.0))
    assert all(span.start in layout.cuts and span.end in layout.cuts for span in (holder.span for holder in holders))
    assert min(coverage(20, holders)) >= 200.0


def test_ten_equal_servers_join_bottleneck_is_optimal() -> None:
    holders: list[Holder] = []
    for _ in range(10):
        holders.append(Holder(choose_span(Layout(20), capacity(4, 4.0), holders), 4.0))
    assert coverage(20, holders) == (2.0,) * 20
