"""The state of a placement and the moves that improve it: shared by the solver and by rebalancing.

Servers go where they relieve most *pressure*: a block with throughput ``t`` counts ``exp(-sharpness * t / scale)``, so
that with low sharpness work is spread evenly, and with high sharpness only the weakest blocks count. The sum of it over
all blocks, the *pain*, never rises by a best answer; its logarithm is a smooth stand-in for the bottleneck, which tells
progress where several weak blocks have to be helped before the bottleneck rises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from remote_modules.plan.throughput import Capacity, Floats, Layout
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["SHARPENING", "Place", "Search"]

SHARPENING = (8.0, 24.0, 64.0)
FINEST = 64.0
ANYWHERE_SHARE = 0.3  # of the crowds
NEAR = 2  # cuts between neighbours

Place: TypeAlias = tuple[int, int]  # the number of the cut where a span begins; how many further it ends, less one


class Search:
    """Places of all servers, and what they add up to.

    Tables are ``[starts, widths]``; what goes beyond the last cut relieves nothing that a narrower place does not.

    Args:
        capacities: of the servers that may be placed.
        scale: the throughput by which differences are measured, such as the highest bottleneck that is possible.
        base: ``[num_blocks]`` throughput of servers that stay where they are.
    """

    def __init__(
        self, layout: Layout, capacities: Sequence[Capacity], *, scale: float, base: Floats | None = None
    ) -> None:
        self.layout = layout
        self.scale = scale
        self.heights, self.forbidden = [], []
        for capacity in capacities:
            legal = _by_width(layout.legal(capacity).astype(np.float64))
            self.heights.append(_by_width(layout.heights(capacity), legal.shape[1]))
            # added, as no pain may be the least of all where rounding hides what a server relieves
            self.forbidden.append(np.where(legal > 0, 0.0, np.inf))
        lengths = [layout.longest(capacity) for capacity in capacities]
        self.movable = [index for index, length in enumerate(lengths) if length > 0]
        # those who can be but high and narrow choose first
        self.movable.sort(key=lambda index: (lengths[index] / (capacities[index].tokens_per_s or 1.0), index))
        self.places: list[Place | None] = [None] * len(capacities)
        self.weights = np.diff(layout.bounds).astype(np.float64)  # blocks between two cuts
        count = len(self.weights)
        self.totals = np.zeros(count) if base is None else np.minimum.reduceat(base, layout.bounds[:-1])
        self.sums = np.zeros(2 * count + 1)
        self.behind = np.zeros(2 * count + 1)  # zeros where there is nothing behind
        self.sum_windows = np.lib.stride_tricks.sliding_window_view(self.sums[1:], count)[:count]
        self.behind_windows = np.lib.stride_tricks.sliding_window_view(self.behind[1:], count)[:count]
        self._left: dict[tuple[int, float], Floats] = {}

    def left(self, index: int, sharpness: float) -> Floats:
        """For each place of a server, the share of a block's pressure that stays there."""
        key = (index, sharpness)
        found = self._left.get(key)
        if found is None:
            found = self._left[key] = np.exp(self.heights[index] * (-sharpness / self.scale))
        return found

    def turn(self, servers: Sequence[int], sharpness: float) -> bool:
        """Let each of ``servers`` go where it relieves most; whether any moved."""
        has_moved = False
        for index in servers:
            old = self.places[index]
            self.take(index)
            self.put(index, self.best_place(index, sharpness))
            has_moved |= self.places[index] != old
        return has_moved

    def resettle(self, servers: Sequence[int]) -> None:
        """Take ``servers`` out and let them come back one after the other."""
        for index in servers:
            self.take(index)
        for sharpness in SHARPENING:
            self.turn(servers, sharpness)

    def best_place(self, index: int, sharpness: float) -> Place:
        """Where a server that is taken out leaves the least pain; of equals the lowest start, then the narrowest."""
        left = self.left(index, sharpness)
        count, width = len(self.totals), left.shape[1]
        needs = np.exp((self.totals.min() - self.totals) * (sharpness / self.scale))
        needs *= self.weights
        needs.cumsum(out=self.sums[1 : count + 1])
        self.sums[count + 1 :] = self.sums[count]
        needs[::-1].cumsum(out=self.behind[count - 1 :: -1])
        # before the span, behind it, and inside of it: sums of what is left, not differences, which would drown in 1.0
        pains = self.sum_windows[:, :width] - self.sums[:count, None]
        pains *= left
        pains += self.sums[:count, None]
        pains += self.behind_windows[:, :width]
        pains += self.forbidden[index]
        start, further = divmod(int(pains.argmin()), width)
        return start, further

    def take(self, index: int) -> None:
        place = self.places[index]
        if place is not None:
            start, further = place
            self.totals[start : start + further + 1] -= self.heights[index][place]
            self.places[index] = None

    def put(self, index: int, place: Place) -> None:
        start, further = place
        self.totals[start : start + further + 1] += self.heights[index][place]
        self.places[index] = place

    def saved(self) -> tuple[list[Place | None], Floats]:
        return list(self.places), self.totals.copy()

    def restore(self, saved: tuple[list[Place | None], Floats]) -> None:
        self.places, self.totals = list(saved[0]), saved[1].copy()

    def place(self, span: Span) -> Place:
        """Of a span between two cuts."""
        start, end = np.searchsorted(self.layout.bounds, (span.start, span.end))
        return int(start), int(end - start) - 1

    def span(self, place: Place) -> Span:
        return self.layout.span(place[0], place[0] + place[1] + 1)

    @property
    def bottleneck(self) -> float:
        return float(self.totals.min())

    @property
    def level(self) -> float:
        """The bottleneck, smoothed: between it and ``scale * log(blocks) / FINEST`` more."""
        least = self.bottleneck
        pains = np.exp((least - self.totals) * (FINEST / self.scale))
        pain = float(np.dot(pains, self.weights)) / self.layout.num_blocks
        return least - self.scale / FINEST * math.log(pain)

    def crowd(self, rng: Random, most: int) -> list[int]:
        """Some servers to resettle: mostly neighbours, often at the weakest block; and perhaps one from elsewhere."""
        crowd = self.movable
        if rng.random() >= ANYWHERE_SHARE:
            block = int(self.totals.argmin()) if rng.random() < 0.5 else rng.randrange(len(self.totals))
            crowd = self._around(block) or crowd
        chosen = rng.sample(crowd, min(len(crowd), most))
        if rng.random() < 0.5 and (other := rng.choice(self.movable)) not in chosen:
            chosen.append(other)
        return chosen

    def _around(self, block: int) -> list[int]:
        """Servers that hold ``block`` or one next to it."""
        return [
            index
            for index in self.movable
            if (place := self.places[index]) is not None and place[0] - NEAR <= block <= place[0] + place[1] + NEAR
        ]


def _by_width(table: Floats, num_widths: int | None = None) -> Floats:
    """``[K, K]`` from cut to cut, to ``[starts, widths]`` with the narrowest first; None: as few as there are."""
    count = len(table) - 1
    padded = np.zeros((count, 2 * count))
    padded[:, :count] = table[:-1, 1:]
    rows = np.arange(count)
    shifted: Floats = padded[rows[:, None], rows[:, None] + rows[None, :]]
    if num_widths is None:
        num_widths = int(np.max(rows + 1, where=shifted.any(axis=0), initial=1))
    return np.ascontiguousarray(shifted[:, :num_widths])
