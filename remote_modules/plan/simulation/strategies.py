"""How servers of a simulated swarm choose their spans: the three ways that the paper compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from remote_modules.plan.placement import best_span
from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.simulation.coverage import Coverage
from remote_modules.plan.simulation.peer import Peer
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["BalanceAtJoin", "RandomSpans", "Strategy", "View"]


@dataclass(frozen=True, slots=True)
class View:
    """What a server knows when it decides: the sums over all records in the tracker."""

    conditions: Conditions
    layout: Layout
    announced: Coverage
    now_s: float


class Strategy(Protocol):
    """What a server does when it comes, and at each of its checks."""

    has_checks: bool

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        """The span of a newcomer, which is not in ``view`` yet."""

    def reconsider(self, view: View, peer: Peer, rng: Random) -> Span | None:
        """Where a serving peer, which is in ``view``, should move to; None: stay."""


class RandomSpans:
    """Any span of as many blocks as fit, for life."""

    has_checks = False

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        length = min(capacity.max_blocks, view.layout.num_blocks)
        start = rng.randint(0, view.layout.num_blocks - length)
        return Span(start, start + length)

    def reconsider(self, view: View, peer: Peer, rng: Random) -> Span | None:
        return None


class BalanceAtJoin(RandomSpans):
    """The span that the swarm needs most at the moment of joining, for life."""

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        return best_span(view.layout, capacity, view.announced.tokens_per_s)[0]
