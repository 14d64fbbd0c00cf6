"""Who should move where: a function of the announced swarm alone, so that all who see it agree without a word.

Two reasons to move::

    healing    a block is held by nobody. Those go first who leave nothing bare meanwhile, then those who cover most
    balance    the level of the swarm would rise by `Rule.min_gain`. The greatest gain goes first

No move takes the last holder from a block. The *level* is the bottleneck, smoothed (`plan.search`): where two places
have to be helped before the bottleneck rises, the first move counts already. Groups of servers that would have to
move together are looked for too; their gain is divided among them, and they move one after the other.

Peers that drain count as gone. Peers that join count as if they served already, so that two do not heal one gap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.placement import best_span
from remote_modules.plan.search import Place, Search
from remote_modules.plan.throughput import Capacity, Floats, Holder, Layout, coverage
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["Member", "Proposal", "Rule", "elect", "gaps", "members_of", "view_seed"]

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
        check_interval_s: least mean time between two checks of a server.
        max_records_per_s: how many records the checks of all servers together may ask for: larger swarms check less
            often.
        servers_per_mover: for so many servers one may move or join; beyond that nobody moves for balance meanwhile.
        num_groups: groups of servers that are tried in an election; 0: single moves only.
    """

    min_gain: float = 0.003
    horizon_s: float = 1800.0
    turn_s: float = 10.0
    heal_turn_s: float = 5.0
    check_interval_s: float = 2.0
    max_records_per_s: float = 5000.0
    servers_per_mover: int = 10
    num_groups: int = 40

    def next_check_s(self, num_servers: int, rng: Random) -> float:
        """Time to the next check of one of so many, so drawn that they do not check in step."""
        interval_s = max(self.check_interval_s, num_servers**2 / self.max_records_per_s)
        return interval_s * rng.uniform(0.5, 1.5)

    def max_joining(self, num_servers: int) -> int:
        """How many others may be joining while one of ``num_servers`` moves for balance."""
        return num_servers // self.servers_per_mover


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


def members_of(
    records: Sequence[PeerRecord], *, token_bytes: int, default_tokens_per_s: float = 0.0
) -> tuple[Member, ...]:
    """Announced servers as placement sees them.

    Their speed is that of decoding, as generation is what a peer is busy with: its tokens come one at a time.

    Args:
        token_bytes: of one token between blocks.
        default_tokens_per_s: for those that have not measured yet, if no other is faster: their blocks count as held.
    """
    fastest = max((record.decode_tokens_per_s for record in records), default=0.0)
    default = max(fastest, default_tokens_per_s) or 1.0
    return tuple(
        Member(
            peer_id=PeerId(record.peer_id),
            span=record.span,
            capacity=Capacity(
                tokens_per_s=record.decode_tokens_per_s or default,
                max_blocks=max(record.max_blocks, len(record.span)),
                network_tokens_per_s=record.bandwidth_bytes_per_s / token_bytes or math.inf,
            ),
            state=record.state,
        )
        for record in records
    )


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
        self.has_gap = bool(gaps(layout, staying))
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

    def _propose(self, index: int, places: Sequence[Place | None], gain: float, loss: float) -> None:
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
