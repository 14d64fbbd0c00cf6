"""Whether a server should move to other blocks, as one of many that ask themselves the same.

`plan.election` ranks the moves that would help, the same for all. The first in rank moves if that pays for its own
costs, which only it knows; if it does not move, the next ones may, each `Rule.turn_s` later. Only a few move for
balance at a time, one in a small swarm. A gap is healed at once, whatever it costs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from remote_modules.peers import PeerId, PeerState, short_id
from remote_modules.plan.election import Member, Proposal, Rule, elect, members_of, view_seed
from remote_modules.spans import Span

__all__ = [
    "Decision",
    "Member",
    "Move",
    "MoveCost",
    "Proposal",
    "Rule",
    "Stay",
    "Turns",
    "decide_move",
    "elect",
    "members_of",
    "should_yield",
    "view_seed",
]


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
    if num_joining > rule.max_joining(len(members)) and not first.is_healing:
        return Stay(f"{num_joining} joining")
    if waited_s < rank * (rule.heal_turn_s if first.is_healing else rule.turn_s):
        return Stay(f"peer '{short_id(first.peer_id)}' should move, then {rank - 1} others", first.peer_id)
    if proposal.is_healing:
        return Move(proposal.span, proposal.gain, f"covers {proposal.gain:.0f} blocks that nobody holds", True)
    reload_s = cost.seconds(proposal.span)
    if proposal.gain * (rule.horizon_s - reload_s) <= proposal.loss * reload_s:
        return Stay(f"{reload_s:.0f} s of reload cost more than is gained in {rule.horizon_s:.0f} s")
    return Move(proposal.span, proposal.gain, f"raises the level by {proposal.gain:.1%}")


def should_yield(members: Sequence[Member], me: PeerId, old: Span) -> bool:
    """Whether to take back a claim, when a fresh view shows that others moved at the same time.

    Args:
        members: with ``me`` as it announced its claim: joining, at its new span.
        old: the span that ``me`` holds yet.

    Returns:
        Whether ``me`` would leave a block without a holder, or a peer with a lower id loads all that ``me`` would.
    """
    claim = next((member.span for member in members if member.peer_id == me), old)
    others = [member for member in members if member.peer_id != me and member.state is not PeerState.DRAINING]
    leaves_bare = any(block not in claim and all(block not in other.span for other in others) for block in old)
    rivals = [other for other in others if other.state is PeerState.JOINING and other.peer_id < me]
    return leaves_bare or any(rival.span.covers(claim) for rival in rivals)


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
