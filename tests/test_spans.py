from __future__ import annotations

from random import Random

import pytest

from remote_modules.spans import MAX_BLOCKS, Span, missing_spans


@pytest.mark.parametrize("text", ["0:1", "3:6", f"{MAX_BLOCKS - 1}:{MAX_BLOCKS}"])
def test_parsed_span_prints_as_it_was_written(text: str) -> None:
    assert str(Span.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "3", "3:", ":3", "3-6", "3:6:9", "-1:3", "a:b", "3:6 ", " 3:6", "3:6\n", "3.0:6", "123456:123457"],
)
def test_text_that_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="span must look like START:END, for example 0:4") as caught:
        Span.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("start", "end"), [(0, 0), (3, 3), (5, 3), (-1, 3), (0, MAX_BLOCKS + 1)], ids=lambda value: str(value)
)
def test_bounds_that_hold_no_block_or_too_many_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=f"0 <= start < end <= {MAX_BLOCKS}, got {start}:{end}"):
        Span(start, end)


def test_parsed_bounds_are_checked_too() -> None:
    with pytest.raises(ValueError, match="got 6:3"):
        Span.parse("6:3")


def test_span_is_a_sized_iterable_of_its_blocks() -> None:
    span = Span(3, 6)
    assert list(span) == [3, 4, 5]
    assert len(span) == 3
    assert [block for block in range(10) if block in span] == [3, 4, 5]
    assert "4" not in span


def test_spans_are_values_ordered_by_start_then_end() -> None:
    assert Span(1, 2) == Span(1, 2)
    assert len({Span(1, 2), Span(1, 2)}) == 1
    assert sorted([Span(2, 3), Span(1, 4), Span(1, 2)]) == [Span(1, 2), Span(1, 4), Span(2, 3)]


@pytest.mark.parametrize(
    ("inner", "is_covered"), [("2:6", True), ("3:5", True), ("2:3", True), ("1:3", False), ("5:7", False)]
)
def test_span_covers_what_lies_inside_it(inner: str, is_covered: bool) -> None:
    assert Span(2, 6).covers(Span.parse(inner)) is is_covered


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        ("", "2:8"),
        ("2:8", ""),
        ("0:20", ""),
        ("2:5 5:8", ""),
        ("5:8 2:5", ""),
        ("2:6 4:8", ""),
        ("3:7 4:5", "2:3 7:8"),
        ("0:2 8:9", "2:8"),
        ("0:1 9:12", "2:8"),
        ("0:3 7:12", "3:7"),
        ("3:4 5:6", "2:3 4:5 6:8"),
    ],
)
def test_blocks_without_a_span_are_missing(spans: str, missing: str) -> None:
    found = missing_spans(map(Span.parse, spans.split()), Span(2, 8))
    assert " ".join(map(str, found)) == missing


@pytest.mark.parametrize("seed", range(100))
def test_missing_spans_of_random_ones_are_exactly_the_other_blocks(seed: int) -> None:
    rng = Random(seed)

    def random_span() -> Span:
        start = rng.randrange(12)
        return Span(start, rng.randint(start + 1, 12))

    whole, spans = random_span(), [random_span() for _ in range(rng.randrange(5))]
    found = missing_spans(spans, whole)
    assert [block for span in found for block in span] == [
        block for block in whole if not any(block in span for span in spans)
    ]
    assert all(one.end < following.start for one, following in zip(found, found[1:], strict=False))
