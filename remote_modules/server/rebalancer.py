"""The loop in which a server looks whether it should hold other blocks, and moves.

It looks every few seconds for blocks that nobody holds and for a better balance; `plan.rebalance` decides. A move is
claimed first: announced, and then the swarm is looked up once more, so that of two that moved at the same time one
takes its claim back before anything is unloaded. Before that, those who hold the blocks that it leaves must answer: one
of them may have crashed, and be listed until its lease ends. Nothing here touches the model: that is the
`MovingServer`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Protocol

from remote_modules.errors import DiscoveryError, RemoteModulesError
from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.rebalance import (
    Member,
    Move,
    MoveCost,
    Proposal,
    Rule,
    Turns,
    decide_move,
    elect,
    members_of,
    should_yield,
    view_seed,
)
from remote_modules.plan.throughput import Layout
from remote_modules.spans import Span

__all__ = ["MovingServer", "Rebalancer"]

logger = logging.getLogger(__name__)


class MovingServer(Protocol):
    """What the loop asks of the server."""

    @property
    def span(self) -> Span:
        """What it holds."""
        ...

    def move_cost(self) -> MoveCost:
        """What a move would cost it now."""
        ...

    async def claim(self, span: Span) -> None:
        """Announce itself as joining with ``span``; sessions go on."""
        ...

    async def release(self) -> None:
        """Take the claim back: announce itself as online with what it holds."""
        ...

    async def move(self, span: Span, *, is_urgent: bool = False) -> None:
        """Hand sessions over, load ``span``, and announce itself as online with it.

        Args:
            is_urgent: others wait for these blocks: sessions that are slow to go are replayed elsewhere.
        """
        ...


class Rebalancer:
    """Runs until cancelled.

    Args:
        layout: with the sizes of blocks only if all servers announce the same room; usually without.
        lookup: the records of all servers of the model, this one's own among them.
        answers: whether the peer of a record can be reached now.
        token_bytes: of one token between blocks.
        rule: the same for all servers of the model.
        rng: spreads the checks.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        server: MovingServer,
        me: PeerId,
        layout: Layout,
        *,
        lookup: Callable[[], Awaitable[Sequence[PeerRecord]]],
        answers: Callable[[PeerRecord], Awaitable[bool]],
        token_bytes: int,
        rule: Rule,
        rng: Random,
        clock: Callable[[], float],
    ) -> None:
        self._server = server
        self._me = me
        self._layout = layout
        self._lookup = lookup
        self._answers = answers
        self._token_bytes = token_bytes
        self._rule = rule
        self._rng = rng
        self._clock = clock
        self._turns = Turns()
        self._records: Sequence[PeerRecord] = ()
        self._elected: tuple[int, tuple[Proposal, ...]] = (0, ())  # for which view
        self.num_moves = 0
        self.num_yields = 0

    async def run(self) -> None:
        """Look, decide and move, for ever. Failures are logged, and tried again at the next check."""
        while True:
            await asyncio.sleep(self._rule.next_check_s(len(self._records), self._rng))
            try:
                await self.check()
            except (RemoteModulesError, OSError) as exc:
                level = logging.INFO if isinstance(exc, DiscoveryError) else logging.WARNING
                logger.log(level, "not rebalanced: %s", exc)

    async def check(self) -> Span | None:
        """One check; where the server moved, if it did.

        Raises:
            DiscoveryError: the swarm cannot be looked up.
            RemoteModulesError, OSError: the move failed; the claim is taken back.
        """
        members = await self._members()
        proposals = self._elect(members)
        decision = decide_move(
            members,
            self._me,
            proposals,
            rule=self._rule,
            cost=self._server.move_cost(),
            waited_s=self._turns.waited_s(proposals, self._clock()),
        )
        if not isinstance(decision, Move):
            logger.debug("stays span=%s: %s", self._server.span, decision.reason)
            return None
        return await self._move(decision)

    async def _move(self, decision: Move) -> Span | None:
        old = self._server.span
        bare = await self._left_bare([block for block in old if block not in decision.span])
        if bare is not None:
            logger.info("stays span=%s: nobody else who holds block %d answers", old, bare)
            return None
        await self._server.claim(decision.span)
        is_moved = False
        try:
            if should_yield(await self._members(), self._me, old):
                self.num_yields += 1
                logger.info("stays span=%s: others moved at the same time", old)
                return None
            logger.info("moves span=%s to=%s: it %s", old, decision.span, decision.reason)
            await self._server.move(decision.span, is_urgent=decision.is_healing)
            is_moved = True
            self.num_moves += 1
            return decision.span
        finally:
            if not is_moved:
                await self._server.release()

    async def _left_bare(self, blocks: Sequence[int]) -> int | None:
        """One of ``blocks`` whose other holders do not answer, though some are listed; None if there is no such."""
        others = [
            record
            for record in self._records
            if record.peer_id != self._me
            and record.state is PeerState.ONLINE
            and any(block in record.span for block in blocks)
        ]
        answers = await asyncio.gather(*(self._answers(record) for record in others))
        alive = [record.span for record, is_alive in zip(others, answers, strict=True) if is_alive]
        for block in blocks:
            is_listed = any(block in record.span for record in others)
            if is_listed and not any(block in span for span in alive):
                return block
        return None

    def _elect(self, members: Sequence[Member]) -> tuple[Proposal, ...]:
        """The election, made anew only if the swarm has changed."""
        seed = view_seed(members)
        if self._elected[0] != seed:
            self._elected = seed, elect(self._layout, members, rule=self._rule, rng=Random(seed))
        return self._elected[1]

    async def _members(self) -> tuple[Member, ...]:
        self._records = await self._lookup()
        return members_of(self._records, token_bytes=self._token_bytes)
