"""Half-open ranges of blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Span", "missing_spans"]

MAX_BLOCKS = 4096  # no model comes near; bounds every table that is indexed by block

_SPAN = re.compile(r"([0-9]{1,5}):([0-9]{1,5})\Z")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks ``[start, end)``; never empty.

    Raises:
        ValueError: unless ``0 <= start < end <= MAX_BLOCKS``.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_BLOCKS:
            raise ValueError(f"span must satisfy 0 <= start < end <= {MAX_BLOCKS}, got {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``"3:6"``. Raises `ValueError` for anything else."""
        match = _SPAN.match(text)
        if match is None:
            raise ValueError(f"span must look like START:END, for example 0:4, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def covers(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end


def missing_spans(spans: Iterable[Span], whole: Span) -> tuple[Span, ...]:
    """The parts of ``whole`` that no span covers, in order."""
    missing = []
    reached = whole.start
    for span in sorted(spans):
        if span.start > reached:
            missing.append(Span(reached, min(span.start, whole.end)))
        reached = max(reached, span.end)
        if reached >= whole.end:
            return tuple(missing)
    missing.append(Span(reached, whole.end))
    return tuple(missing)
