"""Routes for training and batch work: peers get work in proportion to what they have free.

A pass of many tokens has no hurry to be the first to end; what counts is that all peers work. At each block the peers
that hold it share the passes in proportion to their free throughput, the tokens per second that the peer would give
to one more pass like this one: speed / (1 + load) for peers that are near. A route is a walk over the blocks that
leaves its peer no more often than these shares demand, so that routes have few hops.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Floats, Hop, prices
from remote_modules.plan.routing import legal_spans, no_route
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["SpreadRoute", "spread"]

MIN_PASS_S = 1e-6  # no peer is taken to be faster


@dataclass(frozen=True, slots=True)
class SpreadRoute:
    """One of several routes that are in use at once.

    Attributes:
        tokens_per_s: what its slowest peer has free: how much of a batch to send along it, against the others.
    """

    hops: tuple[Hop, ...]
    tokens_per_s: float


def spread(
    blocks: Span,
    candidates: Sequence[Candidate],
    demand: Demand,
    *,
    rng: Random,
    count: int = 1,
    least: float = 0.0,
    cuts: Collection[int] = (),
) -> list[SpreadRoute]:
    """``count`` routes over ``blocks``, each of peers of one group, the same for all: the one with most throughput.

    In the long run, over calls and over clients, each block's passes are shared in proportion to the free throughput of
    the peers that hold it; within one call more evenly than by chance.

    Args:
        least: peers that have less free than this part of the best one at a block get nothing of it. A lone pass
            waits for its slowest hop, and would wait for them most of the time.
        cuts: see `plan.routing.find_route`.

    Raises:
        NoRouteError: no group covers the blocks.
    """
    priced = prices(candidates, demand, cuts)
    pass_s = priced.hop_s + priced.queue_s + priced.block_s * (priced.ends - priced.starts)
    free = demand.num_tokens * demand.rows / np.maximum(pass_s, MIN_PASS_S)
    edges = [block for block in range(blocks.start + 1, blocks.end) if not cuts or block in cuts]
    legs = [Span(start, end) for start, end in zip([blocks.start, *edges], [*edges, blocks.end], strict=True)]
    rows = np.array([leg.start for leg in legs])[:, None]
    weights = np.where((priced.starts <= rows) & (rows < priced.ends), free, 0.0)
    in_groups = [weights * (priced.groups == group) for group in range(int(priced.groups.max(initial=-1)) + 1)]
    weights = max(in_groups, key=lambda group: group.sum(axis=1).min(), default=np.zeros((1, 1)))
    if not weights.any(axis=1).all():
        raise no_route(blocks, legal_spans(candidates, cuts), len(candidates))
    weights = np.where(weights >= least * weights.max(axis=1, keepdims=True), weights, 0.0)
    shares = weights / weights.sum(axis=1, keepdims=True)
    walks = [_walk(shares, (number + rng.random()) / count, rng) for number in range(count)]
    return [SpreadRoute(_hops(walk, legs, priced.peer_ids), float(free[walk].min())) for walk in walks]


def _walk(shares: Floats, point: float, rng: Random) -> list[int]:
    """Which peer runs each leg.

    Every leg's peer has the probability that ``shares`` says; the peer changes only where its share shrinks.

    Args:
        shares: ``[legs, peers]``, rows that add up to one.
        point: in [0, 1): decides the first leg.
    """
    walk = [_pick(shares[0], point)]
    for before, after in zip(shares, shares[1:], strict=False):
        current = walk[-1]
        if after[current] == 0.0 or rng.random() * before[current] >= after[current] + 1e-12:
            current = _pick(np.maximum(after - before, 0.0), rng.random())
        walk.append(current)
    return walk


def _pick(weights: Floats, point: float) -> int:
    """The index where ``point`` in [0, 1) falls when the indices have lengths in proportion to ``weights``."""
    sums = weights.cumsum()
    last = int(np.searchsorted(sums, sums[-1]))
    return min(last, int(np.searchsorted(sums, sums[-1] * point, "right")))


def _hops(walk: Sequence[int], legs: Sequence[Span], peer_ids: Sequence[PeerId]) -> tuple[Hop, ...]:
    hops: list[Hop] = []
    for index, leg in zip(walk, legs, strict=True):
        if hops and hops[-1].peer_id == peer_ids[index]:
            hops[-1] = Hop(peer_ids[index], Span(hops[-1].span.start, leg.end))
        else:
            hops.append(Hop(peer_ids[index], leg))
    return tuple(hops)
