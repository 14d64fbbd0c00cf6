"""Which peers run which blocks of one pass: the cheapest route through the swarm.

Pure: what the client knows goes in, hops come out. The cost of a hop, in seconds, is::

    round trip   rtt_s, or DEFAULT_RTT_S while unmeasured
    + transfer   2 x payload / bandwidth: every hop answers to the client, so each pays both ways
    + queue      load x this request over the peer's whole span: the others are taken to ask for as much
    + KV room    KV_PENALTY_S if the session does not fit into free_kv_tokens
    + compute    tokens x blocks of the hop / speed (decode or prefill; a default one while unmeasured)

Only the last term grows with the hop; the others are paid once by each hop. That is what makes the search
linear in blocks and peers although a hop may start and end anywhere inside its peer's span. The cost of each
peer is multiplied by a random factor in [1, 1.05), so that clients which see the same swarm do not all pick
the same peers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerId
from remote_modules.spans import Span, missing_spans

if TYPE_CHECKING:
    from random import Random

__all__ = ["Candidate", "Demand", "Hop", "find_route", "uncovered"]

DEFAULT_RTT_S = 0.05
DEFAULT_DECODE_TOKENS_PER_S = 300.0  # the value Petals assumes for a server that announced none
DEFAULT_PREFILL_TOKENS_PER_S = 3000.0
DEFAULT_BANDWIDTH_BYTES_PER_S = 12.5e6  # 100 Mbit/s
KV_PENALTY_S = 300.0  # beyond what a pass may take: such a peer is asked only where no other has room
NEAR_EQUAL = 0.05  # peers whose costs differ by less share the work


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the client knows of one peer, right now.

    Attributes:
        span: all the blocks that the peer holds; hops are cut from it.
        rtt_s: measured, finite; None while unknown.
        decode_tokens_per_s, prefill_tokens_per_s: through one block; 0 while unknown.
        free_kv_tokens: tokens of one sequence that the peer still admits.
        load: requests queued or running, from its latest reply or announcement.
        group: peers of one route must share it (model weights and dtype policy).
    """

    peer_id: PeerId
    span: Span
    rtt_s: float | None
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    free_kv_tokens: int
    load: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Hop:
    """One peer and the blocks that it will run."""

    peer_id: PeerId
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one pass asks of every hop.

    Attributes:
        num_tokens: tokens of each row that this pass will process.
        kv_tokens: tokens of each row that the session may come to hold; 0 for a stateless pass.
        bytes_per_token: hidden states on the wire.
        is_decode: whether the peers' decode speed applies, not their prefill speed.
    """

    num_tokens: int
    kv_tokens: int
    bytes_per_token: int
    is_decode: bool
    rows: int = 1
    bandwidth_bytes_per_s: float = DEFAULT_BANDWIDTH_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class _Price:
    """The cost of a candidate: ``hop_s`` for each hop on it, ``block_s`` for each block of that hop."""

    peer_id: PeerId
    span: Span
    hop_s: float
    block_s: float


def find_route(
    blocks: Span, candidates: Sequence[Candidate], demand: Demand, *, rng: Random, cuts: Collection[int] = ()
) -> tuple[Hop, ...]:
    """The cheapest hops that cover ``blocks`` exactly once, in order, all of one group.

    The same candidates (in any order), demand and ``rng`` state give the same route. Neighbouring hops are on
    different peers, but a slow peer may come back later in the route when a much faster one holds blocks in
    the middle of its span. Takes O(blocks x candidates) time.

    Args:
        blocks: what to cover; longer spans are clipped to it.
        candidates: at most one for each peer.
        rng: drawn from once for each peer, in the order of their ids.
        cuts: where one hop may end and the next begin, the ends of ``blocks`` among them; empty for everywhere. The
            part of a peer's span outside of its outermost cuts is of no use.

    Raises:
        NoRouteError: no group covers the blocks; ``missing`` is for the group that lacks the fewest.
    """
    num_known = len(candidates)
    candidates = [legal for candidate in candidates if (legal := _clipped(candidate, cuts)) is not None]
    peer_ids = sorted(candidate.peer_id for candidate in candidates)
    factors = {peer_id: 1.0 + NEAR_EQUAL * rng.random() for peer_id in peer_ids}
    routes = [
        _cheapest(blocks, [_price(member, demand, factors[member.peer_id]) for member in members], cuts)
        for members in _by_group(candidates)
        if not missing_spans((member.span for member in members), blocks)
    ]
    if not routes:
        raise _no_route(blocks, candidates, num_known)
    _, route = min(routes, key=lambda priced: priced[0])
    return route


def _clipped(candidate: Candidate, cuts: Collection[int]) -> Candidate | None:
    """The part of a candidate between the outermost cuts that it holds."""
    if not cuts:
        return candidate
    inside = [cut for cut in cuts if candidate.span.start <= cut <= candidate.span.end]
    return replace(candidate, span=Span(min(inside), max(inside))) if len(inside) > 1 else None


def uncovered(blocks: Span, candidates: Sequence[Candidate]) -> tuple[Span, ...]:
    """The blocks that the best-covering group lacks, in order; empty exactly when `find_route` succeeds."""
    by_group = [missing_spans((member.span for member in members), blocks) for members in _by_group(candidates)]
    return min(by_group, key=lambda missing: sum(map(len, missing)), default=(blocks,))


def _by_group(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    ordered = sorted(candidates, key=lambda candidate: (candidate.group, candidate.peer_id))
    for _, members in itertools.groupby(ordered, key=lambda candidate: candidate.group):
        yield list(members)


def _price(candidate: Candidate, demand: Demand, factor: float) -> _Price:
    if demand.is_decode:
        speed, default_speed = candidate.decode_tokens_per_s, DEFAULT_DECODE_TOKENS_PER_S
    else:
        speed, default_speed = candidate.prefill_tokens_per_s, DEFAULT_PREFILL_TOKENS_PER_S
    num_tokens = demand.num_tokens * demand.rows
    block_s = num_tokens / (speed if speed > 0 else default_speed)
    hop_s = DEFAULT_RTT_S if candidate.rtt_s is None else candidate.rtt_s
    hop_s += 2 * num_tokens * demand.bytes_per_token / demand.bandwidth_bytes_per_s
    hop_s += max(0, candidate.load) * block_s * len(candidate.span)  # peers may announce any number
    if demand.kv_tokens * demand.rows > candidate.free_kv_tokens:
        hop_s += KV_PENALTY_S
    return _Price(candidate.peer_id, candidate.span, hop_s * factor, block_s * factor)


def _cheapest(blocks: Span, prices: Sequence[_Price], cuts: Collection[int]) -> tuple[float, tuple[Hop, ...]]:
    """Total cost and hops of the cheapest route; the prices cover ``blocks``.

    Walks the blocks once. ``running`` holds, for each peer that has the current block, the cheapest cost of a
    route whose last hop is on that peer and still open, and the block where that hop began. At every block a
    peer either keeps its open hop or, at a cut, begins another from the cheapest route so far; ties go to the longer
    hop.
    """
    reached_s = 0.0
    running: dict[int, tuple[float, int]] = {}
    last_hops: dict[int, tuple[int, int]] = {}  # by boundary: where the hop that ends there began, on whose price
    for block in blocks:
        advanced = {}
        begun_s = reached_s if not cuts or block in cuts or block == blocks.start else math.inf
        for index, price in enumerate(prices):
            if block in price.span:
                fresh = (begun_s + price.hop_s, block)
                cost_s, start = min(running.get(index, fresh), fresh)
                advanced[index] = (cost_s + price.block_s, start)
        running = advanced
        reached_s, start, index = min((cost_s, start, index) for index, (cost_s, start) in running.items())
        last_hops[block + 1] = (start, index)

    hops = []
    end = blocks.end
    while end > blocks.start:
        start, index = last_hops[end]
        hops.append(Hop(prices[index].peer_id, Span(start, end)))
        end = start
    return reached_s, tuple(reversed(hops))


def _no_route(blocks: Span, candidates: Sequence[Candidate], num_known: int) -> NoRouteError:
    missing = uncovered(blocks, candidates)
    if missing_spans((candidate.span for candidate in candidates), blocks) == missing:
        why = "none holds them"
    else:
        why = "but those that hold them differ in weights or dtype from the rest"
    text = ", ".join(map(str, missing))
    return NoRouteError(f"no route for blocks {text}: {num_known} peers known, {why}", missing=missing)
