"""Spans for all servers of a swarm at once, and how good any such plan could be.

Everybody's best answer to the others, in turns, under a *pressure* that sharpens from turn to turn: at first every
block counts alike, so that the work is spread evenly, at last only the weakest ones do (`plan.placement.pressure` is
the same measure with one sharpness). Then neighbours are taken out and put back one after the other, for as long as
that helps the weakest blocks. In a small swarm all spans are tried after that (`plan.exhaustive`), up to a limit.
Deterministic for a given ``rng``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from remote_modules.plan.exhaustive import better_spans
from remote_modules.plan.throughput import Capacity, Floats, Layout
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["assign_spans", "bottleneck_bound", "bottleneck_of"]

SHARPENING = ((8.0, 2), (16.0, 2), (32.0, 2), (64.0, 2))
FINEST = 64.0
KICK_SIZES = (3, 4, 5)
ANYWHERE_SHARE = 0.3  # of the kicks
NEAR = 2
WORSE, WORSE_SHARE = 1.2, 0.3
QUICK, THOROUGH = 30, 1000  # kicks
SMALL = 8  # servers, for which all spans may be tried
VISITS_PER_KICK = 30  # take as long
GOOD_ENOUGH = 0.995  # of the bound: no search goes on from there


def bottleneck_bound(layout: Layout, capacities: Iterable[Capacity]) -> float:
    """A bottleneck, in tokens per second, that no choice of spans exceeds.

    The largest ``F`` with ``num_blocks * F <= sum of min(rate, longest * min(network, F))`` over the servers.

    Proof. Take any spans with a bottleneck of at least ``F``. A server with ``L`` blocks adds ``h = min(rate / L,
    network)`` to each. Of what reaches a block count only ``F``; then every block still has ``F``, and the sum over
    blocks is ``num_blocks * F``. A server has a part of at most ``L * min(h, F) = min(rate, L * network, L * F)`` in
    it, which grows with ``L``, and ``L`` is at most the longest span that it may hold. So ``F`` satisfies the
    inequality. The right side is concave in ``F``, piecewise linear and 0 at 0, so that the largest solution is where
    it last meets the left side. The bound also holds if servers do not split their time evenly over their blocks, as
    ``L * h`` is all that they can do.
    """
    servers = [
        (min(capacity.tokens_per_s, longest * capacity.network_tokens_per_s), longest)
        for capacity in capacities
        if (longest := layout.longest(capacity)) > 0
    ]
    # up to F = most / longest a server adds longest * F to the right side, from there on most
    servers.sort(key=lambda server: server[0] / server[1])
    constant, slope = 0.0, sum(longest for _, longest in servers)
    for most, longest in servers:
        if slope < layout.num_blocks and constant * longest <= most * (layout.num_blocks - slope):
            break
        constant, slope = constant + most, slope - longest
    return constant / (layout.num_blocks - slope)


def bottleneck_of(layout: Layout, capacities: Sequence[Capacity], spans: Sequence[Span | None]) -> float:
    """The least throughput of a block, tokens per second. None: the server holds nothing."""
    totals = np.zeros(layout.num_blocks)
    for capacity, span in zip(capacities, spans, strict=True):
        if span is not None:
            totals[span.start : span.end] += min(capacity.tokens_per_s / len(span), capacity.network_tokens_per_s)
    return float(totals.min())


def assign_spans(
    layout: Layout, capacities: Sequence[Capacity], *, rng: Random, num_kicks: int = THOROUGH
) -> tuple[Span | None, ...]:
    """Spans with a bottleneck close to the highest possible.

    Args:
        capacities: of all servers.
        rng: decides which servers are tried elsewhere.
        num_kicks: how often that is tried.

    Returns:
        One span for each server, None for one that no legal span fits into. Where the blocks of all are too few,
        as many blocks as possible are covered.
    """
    search = _Search(layout, capacities)
    search.anneal()
    is_small = len(search.movable) <= SMALL
    search.polish(rng, min(num_kicks, QUICK) if is_small else num_kicks)
    spans = tuple(None if place is None else layout.span(place[0], place[0] + place[1] + 1) for place in search.places)
    if is_small and search.bottleneck < search.bound:
        better, _ = better_spans(layout, capacities, than=search.bottleneck, max_visits=num_kicks * VISITS_PER_KICK)
        return better or spans
    return spans


class _Search:
    """Places of all servers, and what they add up to.

    A place is the number of the cut where a span begins, and how many cuts further on it ends, less one. Tables are
    ``[starts, widths]``; a width that goes beyond the last cut relieves nothing that a narrower one does not.
    """

    def __init__(self, layout: Layout, capacities: Sequence[Capacity]) -> None:
        self.layout = layout
        self.bound = bottleneck_bound(layout, capacities)
        mean = sum(capacity.tokens_per_s for capacity in capacities) / layout.num_blocks
        self.scale = self.bound or mean or 1.0
        self.heights = [_by_width(layout.heights(capacity)) for capacity in capacities]
        lengths = [layout.longest(capacity) for capacity in capacities]
        self.movable = [index for index, length in enumerate(lengths) if length > 0]
        # those who can be but high and narrow choose first
        self.movable.sort(key=lambda index: (lengths[index] / capacities[index].tokens_per_s, index))
        self.places: list[tuple[int, int] | None] = [None] * len(capacities)
        self.weights = np.diff(layout.bounds).astype(np.float64)  # blocks between two cuts
        count = len(self.weights)
        self.totals = np.zeros(count)
        self.sums = np.zeros(2 * count + 1)
        self.windows = np.lib.stride_tricks.sliding_window_view(self.sums[1:], count)[:count]
        self._reliefs: dict[float, list[Floats]] = {}

    def anneal(self) -> None:
        for sharpness, num_turns in SHARPENING:
            for _ in range(num_turns):
                if not self.turn(self.movable, sharpness):
                    break

    def reliefs(self, sharpness: float) -> list[Floats]:
        """For each server and place, the share of a block's pressure that it takes away."""
        found = self._reliefs.get(sharpness)
        if found is None:
            factor = -sharpness / self.scale
            found = self._reliefs[sharpness] = [-np.expm1(factor * heights) for heights in self.heights]
        return found

    def turn(self, servers: Sequence[int], sharpness: float) -> bool:
        """Let each of ``servers`` go where it relieves most; whether any moved."""
        has_moved = False
        reliefs = self.reliefs(sharpness)
        for index in servers:
            old = self.places[index]
            self.take(index)
            self.put(index, self.best_place(reliefs[index], sharpness))
            has_moved |= self.places[index] != old
        return has_moved

    def best_place(self, relief: Floats, sharpness: float) -> tuple[int, int]:
        count, width = len(self.totals), relief.shape[1]
        needs = np.exp(self.totals * (-sharpness / self.scale))
        needs *= self.weights
        needs.cumsum(out=self.sums[1 : count + 1])
        self.sums[count + 1 :] = self.sums[count]
        gains = self.windows[:, :width] - self.sums[:count, None]
        gains *= relief
        return divmod(int(gains.argmax()), width)

    def take(self, index: int) -> None:
        place = self.places[index]
        if place is not None:
            start, width = place
            self.totals[start : start + width + 1] -= self.heights[index][place]
            self.places[index] = None

    def put(self, index: int, place: tuple[int, int]) -> None:
        start, width = place
        self.totals[start : start + width + 1] += self.heights[index][place]
        self.places[index] = place

    def polish(self, rng: Random, num_kicks: int) -> None:
        """Take a few servers out and let them settle anew; keep what is no worse, sometimes what is little worse."""
        best, best_places = self.bottleneck, list(self.places)
        now = self.pain
        for _ in range(num_kicks if len(self.movable) > 1 else 0):
            if best >= GOOD_ENOUGH * self.bound:
                break
            kept = list(self.places), self.totals.copy()
            self.kick(rng)
            after = self.pain
            if after > now * (WORSE if rng.random() < WORSE_SHARE else 1.0):
                self.places, self.totals = kept
                continue
            now = after
            if self.bottleneck > best:
                best, best_places = self.bottleneck, list(self.places)
        self.places = best_places

    @property
    def bottleneck(self) -> float:
        return float(self.totals.min())

    @property
    def pain(self) -> float:
        """A smooth stand-in for the bottleneck, less is better."""
        return float(np.dot(np.exp((self.bound - self.totals) * (FINEST / self.scale)), self.weights))

    def kick(self, rng: Random) -> None:
        """Take out some servers, often neighbours at the weakest block, and let them come back one after the other."""
        crowd = self.movable if rng.random() < ANYWHERE_SHARE else self.around(self.weak_block(rng))
        chosen = rng.sample(crowd, min(len(crowd), rng.choice(KICK_SIZES)))
        if rng.random() < 0.5 and (other := rng.choice(self.movable)) not in chosen:
            chosen.append(other)
        for index in chosen:
            self.take(index)
        for sharpness, _ in SHARPENING:
            self.turn(chosen, sharpness)

    def weak_block(self, rng: Random) -> int:
        return int(self.totals.argmin()) if rng.random() < 0.5 else rng.randrange(len(self.totals))

    def around(self, block: int) -> list[int]:
        """Servers that hold ``block`` or one next to it."""
        return [
            index
            for index in self.movable
            if (place := self.places[index]) is not None and place[0] - NEAR <= block <= place[0] + place[1] + NEAR
        ]


def _by_width(heights: Floats) -> Floats:
    """``[K, K]`` from cut to cut, to ``[starts, widths]`` with the narrowest first, as few as there are."""
    count = len(heights) - 1
    padded = np.zeros((count, 2 * count))
    padded[:, :count] = heights[:-1, 1:]
    rows = np.arange(count)
    shifted = padded[rows[:, None], rows[:, None] + rows[None, :]]
    return shifted[:, : int(np.max(rows + 1, where=shifted.any(axis=0), initial=1))]
