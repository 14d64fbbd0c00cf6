from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_modules.plan.microbatches import MAX_DEPTH, depth, interleaved, split


@settings(deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 2000), st.integers(1, 4096), st.integers(0, 10_000), st.integers(1, 1_000_000)
)
def test_every_row_is_in_one_microbatch_within_the_limits(
    rows: int, tokens_per_row: int, max_tokens: int, bytes_per_row: int, max_bytes: int
) -> None:
    parts = split(rows, tokens_per_row, max_tokens=max_tokens, bytes_per_row=bytes_per_row, max_bytes=max_bytes)
    assert [row for part in parts for row in part] == list(range(rows))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for size in sizes:
        assert size == 1 or (size * tokens_per_row <= max_tokens and size * bytes_per_row <= max_bytes)


@pytest.mark.parametrize(
    ("rows", "tokens_per_row", "expected"),
    [(8, 128, [8]), (9, 128, [5, 4]), (3, 2000, [1, 1, 1]), (1, 9, [1]), (64, 512, [2] * 32), (2, 0, [2])],
)
def test_batches_are_cut_into_as_few_parts_as_the_limit_allows(
    rows: int, tokens_per_row: int, expected: list[int]
) -> None:
    assert [len(part) for part in split(rows, tokens_per_row, max_tokens=1024)] == expected


def test_bytes_of_a_request_cut_a_batch_too() -> None:
    assert split(4, 10, max_tokens=1024, bytes_per_row=600, max_bytes=1300) == (range(2), range(2, 4))


@pytest.mark.parametrize(
    ("compute_s", "transfer_s", "rtt_s", "expected"),
    [
        (0.1, 0.0, 0.0, 3),  # one is computed, two wait
        (0.1, 0.0, 0.1, 4),
        (0.1, 0.1, 0.0, 5),  # on the way, computed, on the way back
        (0.01, 0.1, 0.0, 5),  # the link is the slowest stage
        (0.001, 0.0, 0.1, MAX_DEPTH),
        (0.0, 0.0, 0.1, MAX_DEPTH),
    ],
)
def test_depth_covers_what_a_microbatch_spends_on_its_way(
    compute_s: float, transfer_s: float, rtt_s: float, expected: int
) -> None:
    assert depth(compute_s=compute_s, transfer_s=transfer_s, rtt_s=rtt_s) == expected


def test_routes_are_mixed_in_proportion() -> None:
    assert interleaved(["a"] * 4 + ["b"] * 2) == ["a", "b", "a", "a", "b", "a"]
    assert interleaved(["a"]) == ["a"]
    assert interleaved([]) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_each_half_of_the_mixed_routes_has_half_of_each(routes: list[str]) -> None:
    mixed = interleaved(routes)
    assert Counter(mixed) == Counter(routes)
    first = Counter(mixed[: len(mixed) // 2])
    assert all(abs(first[name] - count / 2) <= 1.5 for name, count in Counter(routes).items())
