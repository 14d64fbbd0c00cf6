"""Whether a running session should leave its peers for others: only for a clear gain that soon pays back the move."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Hop, seconds_of
from remote_modules.plan.routing import find_route
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["find_better", "is_clearly_better", "move_seconds", "route_seconds"]

CLEARLY = 0.75  # the new route takes at most so much of the old one's time
PAYBACK_STEPS = 128  # within so many steps the gain must outweigh the move


def is_clearly_better(old_s: float, new_s: float, move_s: float, *, steps: int = PAYBACK_STEPS) -> bool:
    """Whether to move from a route whose step takes ``old_s`` to one of ``new_s``, once for ``move_s`` seconds."""
    return new_s <= CLEARLY * old_s and move_s <= steps * (old_s - new_s)


def route_seconds(hops: Sequence[Hop], known: Mapping[PeerId, Candidate], demand: Demand) -> float:
    """What a pass along ``hops`` takes; infinite if a peer is not known or does not hold its blocks."""
    return sum(seconds_of(hop, known[hop.peer_id], demand) if hop.peer_id in known else math.inf for hop in hops)


def move_seconds(
    old: Collection[Hop],
    new: Collection[Hop],
    known: Mapping[PeerId, Candidate],
    position: int,
    demand: Demand,
    *,
    kv_bytes_per_token: float | None = None,
) -> float:
    """What it takes to fill the KV caches of the hops in ``new`` that are not in ``old``.

    Args:
        position: tokens of each row that they must hold.
        kv_bytes_per_token: of one row in one block, where caches can be copied from peer to peer; None where they are
            replayed from the history.
    """
    if position == 0:
        return 0.0
    total_s = 0.0
    replay = replace(demand, num_tokens=position, kv_tokens=0, is_decode=False)
    for hop in new:
        if hop not in old:
            move_s = seconds_of(hop, known[hop.peer_id], replay)
            if kv_bytes_per_token is not None:
                copy = replace(replay, bytes_per_token=math.ceil(kv_bytes_per_token * len(hop.span) / 2))  # one way
                candidate = replace(known[hop.peer_id], prefill_tokens_per_s=math.inf)
                move_s = min(move_s, seconds_of(hop, candidate, copy))
            total_s += move_s
    return total_s


def find_better(
    hops: Sequence[Hop],
    candidates: Sequence[Candidate],
    demand: Demand,
    position: int,
    *,
    rng: Random,
    cuts: Collection[int] = (),
    kv_bytes_per_token: float | None = None,
    steps: int = PAYBACK_STEPS,
) -> tuple[Hop, ...] | None:
    """The hops to move to in the middle of a session, or None to stay.

    Args:
        hops: the session's route; contiguous. Its peers have room for it already.
        candidates: of which only the group of the session's own peers is considered: others compute other numbers.
        demand: of the steps to come.
        position: tokens in the session.
        kv_bytes_per_token: see `move_seconds`.
        steps: how many are certain to come; see `is_clearly_better`.
    """
    used = {hop.peer_id for hop in hops}
    groups = {candidate.group for candidate in candidates if candidate.peer_id in used}
    if len(groups) != 1:
        return None
    room = demand.kv_tokens * demand.rows
    known = {
        one.peer_id: replace(one, free_kv_tokens=max(room, one.free_kv_tokens)) if one.peer_id in used else one
        for one in candidates
        if one.group in groups
    }
    blocks = Span(hops[0].span.start, hops[-1].span.end)
    try:
        found = find_route(blocks, list(known.values()), demand, rng=rng, cuts=cuts, keep=used)
    except NoRouteError:
        return None
    old_s, new_s = route_seconds(hops, known, demand), route_seconds(found, known, demand)
    move_s = move_seconds(hops, found, known, position, demand, kv_bytes_per_token=kv_bytes_per_token)
    return found if is_clearly_better(old_s, new_s, move_s, steps=steps) else None
