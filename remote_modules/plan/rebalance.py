"""Whether a server should move to other blocks, as one of many that ask themselves the same.

All servers see the announced swarm, and from it work out who should go first: the *election* is a function of the view
alone, so that they agree without a word. The first in rank moves if the move pays for its own costs, which only it
knows; if it does not move, the next ones may, each `Rule.turn_s` later. Nobody begins while others are joining.

Two reasons to move::

    healing    a block is held by nobody: at once, whatever it costs. Those go first who leave nothing bare meanwhile
    balance    the level of the swarm would rise by `Rule.min_gain`, and by more than the reload costs it

A move never takes the last holder from a block. The *level* is the bottleneck, smoothed (`plan.search`): where two weak
places have to be helped before the bottleneck rises, the first move counts already. Groups of servers that would
have to move together are looked for too; their gain is divided among them, and they move one after the other.

Peers that drain count as gone. Peers that join count as if they served already, so that two do not heal one gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from remote_modules.peers import PeerId, PeerState, short_id
from remote_modules.plan.placement import best_span
from remote_modules.plan.search import Search
from remote_modules.plan.throughput import Capacity, Floats, Holder, Layout, coverage
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = [
    "Member",
    "Move",
    "MoveCost",
    "Proposal",
    "Rule",
    "Stay",
    "Turns",
    "decide_move",
    "elect",
    "gaps",
    "view_seed",
]

GROUP_SIZES = (2, 3)
MAX_CANDIDATES = 64  # of an election; in a larger swarm those whose blocks miss them least


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When to move. All servers of a model must use the same. Durations are seconds.

    Attributes:
        min_gain: least rise of the level by one move, as a part of the highest possible bottleneck.
        horizon_s: for how long a placement is taken to be good: the time in which a move must have paid.
        turn_s: how long the next in rank waits for the one before it.
        heal_turn_s: the same while a block is held by nobody.
        check_interval_s: mean time between two checks.
        max_joining: nobody moves for balance while more servers than that are joining.
        num_groups: groups of servers that are tried in an election; 0: single moves only.
    """

    min_gain: float = 0.003
    horizon_s: float = 1800.0
    turn_s: float = 120.0
    heal_turn_s: float = 10.0
    check_interval_s: float = 60.0
    max_joining: int = 0
    num_groups: int = 40

    def next_check_s(self, rng: Random) -> float:
        """Time to the next check, so drawn that servers do not check in step."""
        return self.check_interval_s * rng.uniform(0.5, 1.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One server, as announced.

    Attributes:
        capacity: its speed must be an estimate where it is not known; `max_blocks` at least its span.
    """

    peer_id: PeerId
    span: Span
    capacity: Capacity
    state: PeerState = PeerState.ONLINE

    @property
    def holder(self) -> Holder:
        return Holder(self.span, self.capacity.tokens_per_s, self.capacity.network_tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """What a move costs the one who moves.

    Attributes:
        load_s: to bring one block into memory, from this machine's disk.
        fetch_s: to bring one block onto the disk first.
        cached: blocks that are on the disk.
        handover_s: to hand the live sessions over to others, or have them replayed.
    """

    load_s: float = 0.0
    fetch_s: float = 0.0
    cached: Collection[int] = ()
    handover_s: float = 0.0

    def seconds(self, span: Span) -> float:
        """Time without service for a move to ``span``."""
        num_missing = sum(block not in self.cached for block in span)
        return self.handover_s + len(span) * self.load_s + num_missing * self.fetch_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One move that would do the swarm good.

    Attributes:
        gain: rise of the level, as a part of the scale; for healing the number of blocks that are covered again.
        loss: the same lost while the server reloads.
    """

    peer_id: PeerId
    span: Span
    gain: float
    loss: float
    is_healing: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Go to ``span``."""

    span: Span
    gain: float
    reason: str
    is_healing: bool = False


@dataclass(frozen=True, slots=True)
class Stay:
    """Stay, and ask again later.

    Attributes:
        awaited: who is expected to move; None: nobody.
    """

    reason: str
    awaited: PeerId | None = None


Decision: TypeAlias = Move | Stay


def decide_move(
    members: Sequence[Member],
    me: PeerId,
    proposals: Sequence[Proposal],
    *,
    rule: Rule,
    cost: MoveCost,
    waited_s: float = 0.0,
) -> Decision:
    """What ``me`` should do.

    Args:
        members: all servers of the model that discovery knows, ``me`` among them.
        proposals: what `elect` made of ``members``.
        waited_s: for how long the first of ``proposals`` has been the same peer, and has not moved.
    """
    own = next((member for member in members if member.peer_id == me), None)
    if own is None or own.state is not PeerState.ONLINE:
        return Stay("not online")
    if not proposals:
        return Stay("no move would help")
    first = proposals[0]
    rank = next((rank for rank, proposal in enumerate(proposals) if proposal.peer_id == me), None)
    if rank is None:
        return Stay(f"peer '{short_id(first.peer_id)}' should move", first.peer_id)
    proposal = proposals[rank]
    num_joining = sum(member.state is PeerState.JOINING for member in members)
    if num_joining > rule.max_joining and not first.is_healing:
        return Stay(f"{num_joining} joining")
    if waited_s < rank * (rule.heal_turn_s if first.is_healing else rule.turn_s):
        return Stay(f"peer '{short_id(first.peer_id)}' should move, then {rank - 1} others", first.peer_id)
    if proposal.is_healing:
        return Move(proposal.span, proposal.gain, f"covers {proposal.gain:.0f} blocks that nobody holds", True)
    reload_s = cost.seconds(proposal.span)
    if proposal.gain * (rule.horizon_s - reload_s) <= proposal.loss * reload_s:
        return Stay(f"{reload_s:.0f} s of reload cost more than is gained in {rule.horizon_s:.0f} s")
    return Move(proposal.span, proposal.gain, f"raises the level by {proposal.gain:.1%}")


class Turns:
    """For how long the same server has been the first in rank without moving."""

    def __init__(self) -> None:
        self._first: tuple[PeerId, bool] | None = None
        self._since_s = 0.0

    def waited_s(self, proposals: Sequence[Proposal], now_s: float) -> float:
        """To be asked at each check, with what `elect` answered."""
        first = (proposals[0].peer_id, proposals[0].is_healing) if proposals else None
        if first != self._first:
            self._first, self._since_s = first, now_s
        return now_s - self._since_s


def gaps(layout: Layout, members: Sequence[Member]) -> tuple[int, ...]:
    """Blocks that nobody holds or loads."""
    totals = _counts(layout, _staying(members))
    return tuple(int(block) for block in np.flatnonzero(totals == 0))


def view_seed(members: Sequence[Member]) -> int:
    """A number that is the same for all who see the same, for the ``rng`` of `elect`."""
    lines = sorted(f"{member.peer_id} {member.span} {member.state.value}" for member in members)
    return int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:8], "big")


def elect(layout: Layout, members: Sequence[Member], *, rule: Rule, rng: Random) -> tuple[Proposal, ...]:
    """Who should move where, the first to move first; at most one proposal for each server.

    The same for all who see the same ``members``, in any order, with an ``rng`` seeded by `view_seed`.

    Takes about 3 ms for 50 servers of 70 blocks, and 0.4 ms for each group that is tried.
    """
    staying = sorted(_staying(members), key=lambda member: member.peer_id)
    counts = _counts(layout, staying)
    if (counts == 0).any():
        healing = _heal(layout, staying, counts)
        if healing:
            return healing
    return _Election(layout, staying, rule).run(rng)


def _staying(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.state is not PeerState.DRAINING]


def _counts(layout: Layout, members: Sequence[Member]) -> NDArray[np.int64]:
    """How many hold each block."""
    counts = np.zeros(layout.num_blocks, dtype=np.int64)
    for member in members:
        counts[member.span.start : member.span.end] += 1
    return counts


def _totals(layout: Layout, members: Sequence[Member]) -> Floats:
    return np.array(coverage(layout.num_blocks, [member.holder for member in members]))


def _without(totals: Floats, member: Member) -> Floats:
    rest: Floats = totals.copy()
    rest[member.span.start : member.span.end] -= member.holder.throughput
    np.maximum(rest, 0.0, out=rest)
    return rest


# ---------------------------------------------------------------------------------------------------- healing


def _heal(layout: Layout, members: Sequence[Member], counts: NDArray[np.int64]) -> tuple[Proposal, ...]:
    """Single moves that cover blocks that nobody holds, and leave no other without a holder."""
    totals = _totals(layout, members)
    ranked = []
    for member in members:
        if member.state is not PeerState.ONLINE:
            continue
        held = np.zeros(layout.num_blocks, dtype=bool)
        held[member.span.start : member.span.end] = True
        alone = np.flatnonzero(held & (counts == 1))
        allowed = layout.legal(member.capacity)
        if len(alone):
            allowed &= (layout.bounds[:, None] <= alone[0]) & (layout.bounds[None, :] > alone[-1])
        sums = np.concatenate(([0], np.cumsum(counts == 0)))[layout.bounds]
        covered = np.where(allowed, sums[None, :] - sums[:, None], 0)
        most = int(covered.max())
        if most:
            rest = np.where(counts - held == 0, 0.0, _without(totals, member))
            span, bottleneck = best_span(layout, member.capacity, rest, allowed=covered == most)
            key = (len(alone) > 0, -most, -float(f"{bottleneck:.9g}"), member.peer_id)
            ranked.append((key, Proposal(peer_id=member.peer_id, span=span, gain=most, loss=0.0, is_healing=True)))
    return tuple(proposal for _, proposal in sorted(ranked, key=lambda entry: entry[0]))


# ---------------------------------------------------------------------------------------------------- balance


class _Election:
    """Looks for moves, alone and in groups, that raise the level."""

    def __init__(self, layout: Layout, staying: Sequence[Member], rule: Rule) -> None:
        self.layout = layout
        self.rule = rule
        self.members = staying
        self.counts = _counts(layout, [member for member in staying if member.state is PeerState.ONLINE])
        self.has_gap = bool((_counts(layout, staying) == 0).any())
        candidates = [member for member in staying if self._may_move(member)]
        if len(candidates) > MAX_CANDIDATES:
            totals = _totals(layout, staying)
            candidates.sort(key=lambda member: (-_spare(totals, member), member.peer_id))
            candidates = sorted(candidates[:MAX_CANDIDATES], key=lambda member: member.peer_id)
        self.candidates = candidates
        chosen = {member.peer_id for member in candidates}
        base = _totals(layout, [member for member in staying if member.peer_id not in chosen])
        scale = sum(member.capacity.tokens_per_s for member in staying) / layout.num_blocks
        self.search = Search(layout, [member.capacity for member in candidates], scale=scale or 1.0, base=base)
        for index, member in enumerate(candidates):
            self.search.put(index, self.search.place(member.span))
        self.start = self.search.saved()
        self.level = self.search.level
        self.found: dict[int, Proposal] = {}

    def _may_move(self, member: Member) -> bool:
        """Whether others serve all its blocks; if some are served by nobody anyhow, whether that gets no worse is
        looked at later."""
        if member.state is not PeerState.ONLINE or not self.layout.allows(member.span, member.capacity):
            return False
        return self.has_gap or bool((self.counts[member.span.start : member.span.end] > 1).all())

    def run(self, rng: Random) -> tuple[Proposal, ...]:
        search = self.search
        for index in search.movable:
            self._try([index])
        for _ in range(self.rule.num_groups if len(search.movable) > 1 else 0):
            self._try(search.crowd(rng, rng.choice(GROUP_SIZES)))
        proposals = self.found.values()
        return tuple(sorted(proposals, key=lambda proposal: (-round(proposal.gain, 6), proposal.peer_id)))

    def _try(self, group: list[int]) -> None:
        """Resettle a group; note its best single move first."""
        search = self.search
        search.resettle(group)
        places = list(search.places)
        movers = [index for index in group if places[index] != self.start[0][index]]
        gain = (search.level - self.level) / search.scale / max(1, len(movers))
        search.restore(self.start)
        if not movers or gain < self.rule.min_gain:
            return
        steps = []
        for index in movers:
            place = places[index]
            assert place is not None
            search.take(index)
            during = search.level
            search.put(index, place)
            if self._is_safe(index, search.span(place)):
                steps.append((search.level, -index, (self.level - during) / search.scale))
            search.restore(self.start)
        if steps:
            _, number, loss = max(steps)
            self._propose(-number, places, gain, loss)

    def _propose(self, index: int, places: Sequence[tuple[int, int] | None], gain: float, loss: float) -> None:
        place = places[index]
        assert place is not None
        held = self.found.get(index)
        if held is None or gain > held.gain:
            peer_id = self.candidates[index].peer_id
            self.found[index] = Proposal(peer_id=peer_id, span=self.search.span(place), gain=gain, loss=loss)

    def _is_safe(self, index: int, span: Span) -> bool:
        """Whether no block that has a holder loses the last one."""
        old = self.candidates[index].span
        return all(self.counts[block] != 1 or block in span for block in old)


def _spare(totals: Floats, member: Member) -> float:
    """Least throughput of its blocks without it."""
    return float(totals[member.span.start : member.span.end].min()) - member.holder.throughput
