"""The best spans for a small swarm, by trying all of them.

Depth first over the servers, the most able first. A branch ends where even work that could be divided at will would not
beat the best plan so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

__all__ = ["better_spans"]

EQUAL = 1e-9

_Choice = tuple[int, int, float]  # first block, block after the last, tokens per second added to each


def better_spans(
    layout: Layout, capacities: Sequence[Capacity], *, than: float = 0.0, max_visits: float = math.inf
) -> tuple[tuple[Span | None, ...] | None, bool]:
    """The spans with the highest bottleneck.

    Args:
        capacities: at most 8 or so; the time is exponential in their number.
        than: a bottleneck, tokens per second; only spans that give more, by more than 1e-9 of it, are searched for.
        max_visits: branches to look at; about 5 us each.

    Returns:
        One span for each server (None for those that are not needed, or too small for any), or None if none is better;
        and whether all were tried.
    """
    choices = [_choices(layout, capacity) for capacity in capacities]
    order = [index for index, found in enumerate(choices) if found]
    order.sort(key=lambda index: -max((end - start) * added for start, end, added in choices[index]))
    search = _Search([choices[index] for index in order], than, max_visits)
    search.visit(0, (0.0,) * layout.num_blocks, 0)
    if search.best_path is None:
        return None, search.visits_left > 0
    spans: list[Span | None] = [None] * len(capacities)
    for index, number in zip(order, search.best_path, strict=False):
        start, end, _ = choices[index][number]
        spans[index] = Span(start, end)
    return tuple(spans), search.visits_left > 0


def _choices(layout: Layout, capacity: Capacity) -> list[_Choice]:
    """Legal spans of one server, and what it adds to each block of them."""
    starts, ends = layout.legal(capacity).nonzero()
    spans = [layout.span(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
    return [(span.start, span.end, capacity.throughput(len(span))) for span in spans]


class _Search:
    def __init__(self, choices: list[list[_Choice]], best: float, visits: float) -> None:
        self.choices = choices
        self.best = best
        self.best_path: list[int] | None = None
        self.visits_left = visits
        self.path: list[int] = []
        self.limits = [
            (max((end - start) * added for start, end, added in found), max(end - start for start, end, _ in found))
            for found in choices
        ]

    def visit(self, index: int, totals: tuple[float, ...], first: int) -> None:
        """Try all spans of the server ``index``, from the choice ``first`` on, and of those behind it."""
        self.visits_left -= 1
        if min(totals) > self.best * (1 + EQUAL):
            self.best, self.best_path = min(totals), list(self.path)
        if index == len(self.choices) or self.visits_left <= 0 or not self._may_beat(index, totals):
            return
        choices = self.choices[index]
        has_twin = index + 1 < len(self.choices) and self.choices[index + 1] == choices
        for number in range(first, len(choices)):
            start, end, added = choices[number]
            raised = tuple([total + added for total in totals[start:end]])
            self.path.append(number)
            # of two equal servers the first has the earlier choice
            self.visit(index + 1, totals[:start] + raised + totals[end:], number if has_twin else 0)
            self.path.pop()

    def _may_beat(self, index: int, totals: tuple[float, ...]) -> bool:
        """Whether the servers from ``index`` on have what all blocks lack of a better bottleneck."""
        if not self.best:  # any throughput is better: it takes but as many places as there are blocks without
            return totals.count(0.0) <= sum([longest for _, longest in self.limits[index:]])
        goal = self.best * (1 + EQUAL)
        lacking = sum([goal - total for total in totals if total < goal])
        return lacking <= sum([min(most, longest * goal) for most, longest in self.limits[index:]])
