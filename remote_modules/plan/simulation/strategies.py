"""How servers of a simulated swarm choose their spans: the three ways that the paper compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from remote_modules.peers import PeerId
from remote_modules.plan.election import Member, Proposal, Rule, elect, view_seed
from remote_modules.plan.placement import best_span
from remote_modules.plan.rebalance import Move, decide_move
from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.simulation.coverage import Coverage
from remote_modules.plan.simulation.peer import Peer
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["BalanceAlways", "BalanceAtJoin", "RandomSpans", "Strategy", "View"]


@dataclass(frozen=True, slots=True)
class View:
    """What a server knows when it decides: all records in the tracker, and their sums.

    Attributes:
        version: rises with every change of ``members``.
    """

    conditions: Conditions
    layout: Layout
    announced: Coverage
    members: Mapping[PeerId, Member]
    version: int
    now_s: float


class Strategy(Protocol):
    """What a server does when it comes, and at each of its checks."""

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        """The span of a newcomer, which is not in ``view`` yet."""

    def next_check_s(self, num_servers: int, rng: Random) -> float:
        """Time until one of ``num_servers`` checks again whether to move; infinite for never."""

    def reconsider(self, view: View, peer: Peer) -> Span | None:
        """Where a serving peer, which is in ``view``, should move to; None: stay."""


class RandomSpans:
    """Any span of as many blocks as fit, for life."""

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        length = min(capacity.max_blocks, view.layout.num_blocks)
        start = rng.randint(0, view.layout.num_blocks - length)
        return Span(start, start + length)

    def next_check_s(self, num_servers: int, rng: Random) -> float:
        return math.inf

    def reconsider(self, view: View, peer: Peer) -> Span | None:
        return None


class BalanceAtJoin(RandomSpans):
    """The span that the swarm needs most at the moment of joining, for life."""

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        return best_span(view.layout, capacity, view.announced.tokens_per_s)[0]


class BalanceAlways(BalanceAtJoin):
    """The same, and later every server moves as `rebalance.decide_move` says.

    One instance for each swarm: elections are functions of the view, so one is made for all who see the same.

    Args:
        rng: for elections, which seed it anew.
    """

    def __init__(self, rule: Rule, rng: Random) -> None:
        self.rule = rule
        self._rng = rng
        self._members: Sequence[Member] = ()
        self._proposals: tuple[Proposal, ...] = ()
        self._spans: dict[PeerId, Span] = {}  # of those who are proposed, when they were
        self._version = -1
        self._elected_at_s = -math.inf

    def next_check_s(self, num_servers: int, rng: Random) -> float:
        return self.rule.next_check_s(num_servers, rng)

    def reconsider(self, view: View, peer: Peer) -> Span | None:
        self._elect(view)
        waited_s = peer.turns.waited_s(self._proposals, view.now_s)
        if self._spans.get(peer.peer_id) != peer.span:
            return None  # not proposed, as `decide_move` would find after a look at all members; or moved since
        decision = decide_move(
            self._members,
            peer.peer_id,
            self._proposals,
            rule=self.rule,
            cost=peer.cost(view.conditions, is_fetched=view.conditions.fetches_ahead),
            waited_s=waited_s,
        )
        return decision.span if isinstance(decision, Move) else None

    def _elect(self, view: View) -> None:
        """Bring the election up to date, unless what it saw is young enough."""
        is_old = view.now_s - self._elected_at_s >= view.conditions.view_age_s
        if view.version != self._version and is_old:
            self._members = list(view.members.values())
            self._rng.seed(view_seed(self._members))
            self._proposals = elect(view.layout, self._members, rule=self.rule, rng=self._rng)
            self._spans = {proposal.peer_id: view.members[proposal.peer_id].span for proposal in self._proposals}
            self._version, self._elected_at_s = view.version, view.now_s
