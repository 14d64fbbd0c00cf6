"""Which peers run which blocks of one pass: the cheapest route through the swarm.

Pure: what the client knows goes in, hops come out; `plan.candidates` says what a hop costs. All terms of that cost but
one are paid once by each hop, whatever its length. That is what makes the search linear in blocks and peers although
a hop may start and end anywhere inside its peer's span. The cost of each peer is multiplied by a random factor in
[1, 1.05), so that clients which see the same swarm do not all pick the same peers.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Floats, Hop, Ints, prices
from remote_modules.spans import Span, missing_spans

if TYPE_CHECKING:
    from random import Random

__all__ = ["Candidate", "Demand", "Hop", "find_route", "legal_spans", "no_route", "uncovered"]

NEAR_EQUAL = 0.05  # peers whose costs differ by less share the work
KEPT = 0.8  # a peer of the route in use counts as so much of its cost


def find_route(
    blocks: Span,
    candidates: Sequence[Candidate],
    demand: Demand,
    *,
    rng: Random,
    cuts: Collection[int] = (),
    keep: Collection[PeerId] = (),
) -> tuple[Hop, ...]:
    """The cheapest hops that cover ``blocks`` exactly once, in order, all of one group.

    The same candidates (in any order), demand and ``rng`` state give the same route. Neighbouring hops are on
    different peers, but a slow peer may come back later in the route when a much faster one holds blocks in
    the middle of its span. Takes O(blocks x candidates) time: milliseconds for 80 blocks and 1,000 peers.

    Args:
        blocks: what to cover; longer spans are clipped to it.
        candidates: at most one for each peer.
        rng: drawn from once for each peer, in the order of their ids.
        cuts: where one hop may end and the next begin, the ends of ``blocks`` among them; empty for everywhere. The
            part of a peer's span outside of its outermost cuts is of no use.
        keep: peers of the route in use, left only for others that are a good deal cheaper.

    Raises:
        NoRouteError: no group covers the blocks; ``missing`` is for the group that lacks the fewest.
    """
    priced = prices(candidates, demand, cuts)
    blurs = ((KEPT if peer in keep else 1.0) * (1.0 + NEAR_EQUAL * rng.random()) for peer in priced.peer_ids)
    blur = np.fromiter(blurs, np.float64, len(priced.peer_ids))
    hop_s, block_s = (priced.hop_s + priced.queue_s) * blur, priced.block_s * blur
    rows = np.arange(blocks.start, blocks.end)[:, None]
    holds = (priced.starts <= rows) & (rows < priced.ends)
    best: tuple[float, tuple[Hop, ...]] | None = None
    for group in range(int(priced.groups.max(initial=-1)) + 1):
        members = np.flatnonzero(priced.groups == group)
        held = holds[:, members]
        if held.any(axis=1).all():
            peer_ids = [priced.peer_ids[index] for index in members]
            found = _cheapest(blocks, peer_ids, hop_s[members], np.where(held, block_s[members], np.inf), cuts)
            best = found if best is None or found[0] < best[0] else best
    if best is None:
        raise no_route(blocks, legal_spans(candidates, cuts), len(candidates))
    return best[1]


def uncovered(blocks: Span, candidates: Sequence[Candidate]) -> tuple[Span, ...]:
    """The blocks that the best-covering group lacks, in order; empty exactly when `find_route` succeeds."""
    return _uncovered(blocks, [(candidate.group, candidate.span) for candidate in candidates])


def _uncovered(blocks: Span, held: Sequence[tuple[str, Span]]) -> tuple[Span, ...]:
    by_group = [missing_spans(spans, blocks) for spans in _by_group(held)]
    return min(by_group, key=lambda missing: sum(map(len, missing)), default=(blocks,))


def _by_group(held: Sequence[tuple[str, Span]]) -> Iterator[list[Span]]:
    for _, members in itertools.groupby(sorted(held), key=lambda member: member[0]):
        yield [span for _, span in members]


def legal_spans(candidates: Sequence[Candidate], cuts: Collection[int]) -> list[tuple[str, Span]]:
    """Group of each candidate, and the part of its span between the outermost cuts in it."""
    held = []
    for candidate in candidates:
        span = candidate.span
        inside = [cut for cut in cuts if span.start <= cut <= span.end] or ([] if cuts else [span.start, span.end])
        if len(inside) > 1:
            held.append((candidate.group, Span(min(inside), max(inside))))
    return held


def _cheapest(
    blocks: Span, peer_ids: Sequence[PeerId], hop_s: Floats, block_s: Floats, cuts: Collection[int]
) -> tuple[float, tuple[Hop, ...]]:
    """Total cost and hops of the cheapest route over peers that cover ``blocks``.

    Walks the blocks once. ``cost_s`` holds, for each peer that has the current block, the cheapest cost of a route
    whose last hop is on that peer and still open, and ``begun`` the block where that hop began. At every block a peer
    either keeps its open hop or, at a cut, begins another from the cheapest route so far; ties go to the longer hop.

    Args:
        hop_s: ``[peers]``.
        block_s: ``[blocks, peers]``, infinite for blocks that a peer does not hold.
    """
    reached_s = 0.0
    cost_s = np.full(len(hop_s), np.inf)
    begun: Ints = np.full(len(hop_s), blocks.start)
    ended: list[tuple[int, int]] = []  # by block: where the cheapest hop that may end with it began, on whose price
    for row, block in enumerate(blocks):
        if row == 0 or not cuts or block in cuts:
            fresh_s = hop_s + reached_s
            begun = np.where(fresh_s < cost_s, block, begun)
            cost_s = np.minimum(cost_s, fresh_s)
        cost_s = cost_s + block_s[row]
        reached_s = float(cost_s.min())
        cheapest = np.flatnonzero(cost_s == reached_s)
        index = int(cheapest[begun[cheapest].argmin()])
        ended.append((int(begun[index]), index))

    hops = []
    end = blocks.end
    while end > blocks.start:
        start, index = ended[end - blocks.start - 1]
        hops.append(Hop(peer_ids[index], Span(start, end)))
        end = start
    return reached_s, tuple(reversed(hops))


def no_route(blocks: Span, held: Sequence[tuple[str, Span]], num_known: int) -> NoRouteError:
    """The error that names the blocks which the best-covering group of ``held`` lacks."""
    missing = _uncovered(blocks, held)
    if missing_spans((span for _, span in held), blocks) == missing:
        why = "none holds them"
    else:
        why = "but those that hold them differ in weights or dtype from the rest"
    text = ", ".join(map(str, missing))
    return NoRouteError(f"no route for blocks {text}: {num_known} peers known, {why}", missing=missing)
