from __future__ import annotations

from random import Random

import pytest

from remote_modules.plan.placement import choose_span, coverage, num_blocks_that_fit
from remote_modules.spans import Span

HOLDERS = [(Span(0, 4), 10.0), (Span(2, 6), 5.0), (Span(7, 8), 1.0)]


def test_coverage_sums_the_holders_of_each_block() -> None:
    assert coverage(8, HOLDERS) == (10.0, 10.0, 15.0, 15.0, 5.0, 5.0, 0.0, 1.0)


def test_coverage_of_an_empty_swarm_is_zero() -> None:
    assert coverage(3, []) == (0.0, 0.0, 0.0)


def test_holder_beyond_the_model_is_clipped() -> None:
    assert coverage(2, [(Span(1, 9), 3.0), (Span(4, 6), 3.0)]) == (0.0, 3.0)


def test_coverage_does_not_depend_on_the_order_of_holders() -> None:
    rng = Random(0)
    holders = [(Span(0, 2), 10 ** rng.uniform(-9, 9)) for _ in range(50)]
    expected = coverage(2, holders)
    for _ in range(20):
        rng.shuffle(holders)
        assert coverage(2, holders) == expected


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, "6:7"), (2, "6:8"), (4, "4:8"), (8, "0:8"), (100, "0:8")],
)
def test_weakest_blocks_are_chosen(length: int, expected: str) -> None:
    assert str(choose_span(8, length, HOLDERS)) == expected


def test_empty_swarm_first_blocks_are_chosen() -> None:
    assert choose_span(8, 3, []) == Span(0, 3)


def test_worst_block_counts_more_than_the_sum() -> None:
    holders = [(Span(0, 1), 9.0), (Span(1, 2), 1.0), (Span(2, 3), 9.0), (Span(3, 6), 2.0)]
    assert choose_span(6, 2, holders) == Span(0, 2)


@pytest.mark.parametrize("length", [0, -1])
def test_length_below_one_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="span must satisfy"):
        choose_span(8, length, HOLDERS)
    with pytest.raises(ValueError, match=f"^{length} blocks are too few: the shortest span that may be served has 1, "):
        choose_span(8, length, HOLDERS, cuts=range(9))


@pytest.mark.parametrize("has_cuts", [False, True], ids=["anywhere", "at-cuts"])
@pytest.mark.parametrize("seed", range(200))
def test_random_swarm_agrees_with_brute_force(seed: int, *, has_cuts: bool) -> None:
    rng = Random(seed)
    num_blocks = rng.randint(1, 12)
    holders = []
    for _ in range(rng.randint(0, 6)):
        start = rng.randrange(num_blocks)
        holders.append((Span(start, rng.randint(start + 1, num_blocks)), float(rng.randint(1, 3))))
    length = rng.randint(1, num_blocks)
    inner = range(1, num_blocks)
    cuts = {0, num_blocks, *(cut for cut in inner if rng.random() < 0.5)} if has_cuts else {*inner, 0, num_blocks}

    def needs_more(one: Span, other: Span) -> bool:
        """Level by level: whichever window has more blocks at the lowest level that tells them apart."""
        totals = [sum(tokens_per_s for span, tokens_per_s in holders if block in span) for block in range(num_blocks)]
        for level in sorted(set(totals)):
            here, there = (sum(totals[block] == level for block in span) for span in (one, other))
            if here != there:
                return here > there
        return False

    legal = [Span(s, e) for s in sorted(cuts) for e in sorted(cuts) if s < e <= s + length]
    windows = [span for span in legal if not any(span.start == other.start and other.end > span.end for other in legal)]
    if not has_cuts:
        windows = [span for span in windows if len(span) == length]
    given = frozenset(cuts) if has_cuts else ()
    if not windows:
        with pytest.raises(ValueError, match=f"^{length} blocks are too few: "):
            choose_span(num_blocks, length, holders, cuts=given)
        return
    best = windows[0]
    for window in windows[1:]:
        if needs_more(window, best):
            best = window
    assert choose_span(num_blocks, length, holders, cuts=given) == best


TAIL = frozenset({0, 1, 2, 3, 4, 8})  # the last four blocks share keys and values


@pytest.mark.parametrize(
    ("length", "holders", "expected"),
    [
        (3, [], "0:3"),
        (4, [], "0:4"),
        (4, [(Span(0, 4), 1.0)], "4:8"),
        (5, [(Span(0, 4), 1.0)], "3:8"),
        (5, [(Span(0, 3), 1.0)], "3:8"),
        (7, [(Span(4, 8), 1.0)], "0:4"),
        (8, [], "0:8"),
        (3, [(Span(0, 4), 1.0)], "0:3"),  # too few for what nobody holds
    ],
)
def test_group_that_cannot_be_cut_is_taken_whole_or_not_at_all(
    length: int, holders: list[tuple[Span, float]], expected: str
) -> None:
    assert str(choose_span(8, length, holders, cuts=TAIL)) == expected


def test_all_cuts_are_the_same_as_none() -> None:
    for length in range(1, 9):
        assert choose_span(8, length, HOLDERS, cuts=range(9)) == choose_span(8, length, HOLDERS)


def test_fewer_blocks_than_any_legal_span_are_refused_naming_the_cuts() -> None:
    with pytest.raises(ValueError, match="blocks are too few") as caught:
        choose_span(12, 3, [], cuts=frozenset({12, 0, 5}))
    assert str(caught.value) == (
        "3 blocks are too few: the shortest span that may be served has 5, as spans may begin and end only at 0, 5, 12"
    )


@pytest.mark.parametrize("seed", range(5))
def test_servers_join_a_model_with_cuts_until_all_blocks_are_covered(seed: int) -> None:
    rng = Random(seed)
    cuts = {0, 1, 2, 3, 4, 5, 6, 7, 8, 20}
    holders: list[tuple[Span, float]] = []
    for _ in range(8):
        holders.append((choose_span(20, rng.randint(12, 14), holders, cuts=cuts), 100.0))
    assert all(span.start in cuts and span.end in cuts for span, _ in holders)
    assert min(coverage(20, holders)) >= 200.0


@pytest.mark.parametrize("seed", range(5))
def test_ten_servers_join_all_blocks_are_covered_and_balanced(seed: int) -> None:
    rng = Random(seed)
    holders: list[tuple[Span, float]] = []
    for _ in range(10):
        holders.append((choose_span(32, rng.randint(8, 12), holders), 100.0))
    totals = coverage(32, holders)
    assert min(totals) >= 200.0
    assert max(totals) <= 3 * min(totals)


def test_ten_equal_servers_join_bottleneck_is_optimal() -> None:
    holders: list[tuple[Span, float]] = []
    for _ in range(10):
        holders.append((choose_span(20, 4, holders), 1.0))
    assert coverage(20, holders) == (2.0,) * 20


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [(1_300, 1), (2_499, 1), (2_500, 2), (10_900, 9), (10**9, 9)],
    ids=["one", "almost two", "two", "all", "more than the model"],
)
def test_as_many_blocks_as_fit_are_counted(free_bytes: int, expected: int) -> None:
    fitting = num_blocks_that_fit(
        block_bytes=1000,
        kv_bytes_per_token_block=2,
        kv_tokens=100,
        free_bytes=free_bytes,
        workspace_bytes=100,
        num_blocks=9,
    )
    assert fitting == expected


@pytest.mark.parametrize("free_bytes", [1_299, 50, 0])
def test_no_block_fits_error_says_what_is_needed_and_free(free_bytes: int) -> None:
    with pytest.raises(ValueError, match="one block needs") as caught:
        num_blocks_that_fit(
            block_bytes=1000,
            kv_bytes_per_token_block=2,
            kv_tokens=100,
            free_bytes=free_bytes,
            workspace_bytes=100,
            num_blocks=9,
        )
    assert str(caught.value) == (
        "one block needs 1300 bytes (weights 1000, KV cache of 100 tokens 200, workspace 100), "
        f"but {free_bytes} are free; lower the KV budget or use another device"
    )
