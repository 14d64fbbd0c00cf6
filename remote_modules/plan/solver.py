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
from remote_modules.plan.search import SHARPENING, Search
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["assign_spans", "bottleneck_bound", "bottleneck_of"]

EQUAL = 1e-9
QUICK, THOROUGH = 30, 1000  # kicks
KICK_SIZES = (3, 4, 5)  # servers that are taken out
WORSE, WORSE_SHARE = 0.003, 0.3  # some kicks may lower the level by so much of the bound
MAX_TURNS = 2  # of all servers at each sharpness, to begin with
SMALL = 8  # servers, for which all spans may be tried
VISITS_PER_KICK = 100  # of the search through all spans
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
            totals[span.start : span.end] += capacity.throughput(len(span))
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
    bound = bottleneck_bound(layout, capacities)
    mean = sum(capacity.tokens_per_s for capacity in capacities) / layout.num_blocks
    search = Search(layout, capacities, scale=bound or mean or 1.0)
    for sharpness in SHARPENING:
        for _ in range(MAX_TURNS):
            if not search.turn(search.movable, sharpness):
                break
    is_small = len(search.movable) <= SMALL
    _polish(search, rng, min(num_kicks, QUICK) if is_small else num_kicks, bound)
    spans = tuple(None if place is None else search.span(place) for place in search.places)
    if is_small and search.bottleneck < bound * (1 - EQUAL):
        better, _ = better_spans(layout, capacities, than=search.bottleneck, max_visits=num_kicks * VISITS_PER_KICK)
        return better or spans
    return spans


def _polish(search: Search, rng: Random, num_kicks: int, bound: float) -> None:
    """Resettle a few servers at a time; keep what is no worse, sometimes what is little worse."""
    best, best_state = search.bottleneck, search.saved()
    level = search.level
    for _ in range(num_kicks if len(search.movable) > 1 else 0):
        if best >= GOOD_ENOUGH * bound:
            break
        before = search.saved()
        search.resettle(search.crowd(rng, rng.choice(KICK_SIZES)))
        after = search.level
        if after < level - (WORSE * search.scale if rng.random() < WORSE_SHARE else 0.0):
            search.restore(before)
            continue
        level = after
        if search.bottleneck > best:
            best, best_state = search.bottleneck, search.saved()
    search.restore(best_state)
