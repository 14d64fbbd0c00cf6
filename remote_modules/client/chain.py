"""THE retry loop: work on hops, in order, until all of it is done or the pass gives up.

Steps, forwards and backwards differ in what they do on one hop; what happens when a hop fails is decided here, by
`plan.recovery`, the same way for all of them. Only `PeerError` and `NoRouteError` are handled; anything else is a
bug or the caller's mistake and goes up.

A peer that answers pings but not the request is slow, not dead. When the answer is later than expected the same work
starts on other peers that hold the blocks, and whoever is first is believed. A session's work needs its KV cache there,
so these peers are fed the history first, and are asked only after the first one has let us wait for about as long as
that takes. There is never more than one such hedge at a time, and none without a share of the retry budget.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from remote_modules.client.answers import AnswerChecker
from remote_modules.client.coding import Coding
from remote_modules.client.failures import PassFailures
from remote_modules.client.fitness import obstacle, refusal
from remote_modules.client.hedging import Hedge, Outrun
from remote_modules.client.hop_requests import HopRequests
from remote_modules.client.swarm import Swarm
from remote_modules.errors import (
    NoRouteError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalReason,
    SpanUnavailable,
)
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId, short_id
from remote_modules.plan.recovery import Failure, GiveUp, Recovery, Replay, Reroute, failure_of
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span

__all__ = ["Chain", "Work"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROOM_WAIT_S = 30.0  # for memory, where there is one row and nobody can stand in
HEDGE_RESERVE = 8.0  # retries that hedges leave to failures


class Work(ABC):
    """What one pass does on its hops. `hops` holds those still to do, the next one first."""

    hops: list[Hop]
    demand: Demand
    is_pass = False  # whether it holds no session: rows may be done apart
    autocast: str | None = None  # of a pass

    @abstractmethod
    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        """Do the next hop.

        Raises:
            PeerError: its peer failed; the state is as before.
        """

    @abstractmethod
    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        """Put ``hops`` in the place of the next one."""

    def forget_hop(self, hop: Hop) -> None:  # noqa: B027 - only sessions have something to forget
        """The peer lost the hop's session: build it anew when the hop is done next."""

    @abstractmethod
    def rival(self, hop: Hop) -> Work | None:
        """The next hop's work alone, to be done elsewhere at the same time; None if that cannot be.

        It changes nothing of this one, and is given other hops by `replace_hop`.
        """

    @abstractmethod
    def adopt(self, hop: Hop, rival: Work) -> None:
        """Take what the rival did for the work of the next hop, which was stopped."""

    def discard(self) -> None:  # noqa: B027 - only sessions hold something
        """This rival lost: free what peers hold for it."""

    def num_past_tokens(self) -> int:
        """Tokens of each row that another peer must be fed before it can do the next hop's work."""
        return 0


@dataclass(slots=True)
class Chain:
    """One pass, or one microbatch of one, under way.

    Args:
        swarm: where peers come from.
        recovery: decides what follows a failure.
        failures: of the whole pass.
        coding: of its tensors.
    """

    swarm: Swarm
    recovery: Recovery
    failures: PassFailures
    coding: Coding
    may_hedge: bool = True
    answers: AnswerChecker = field(init=False)
    requests: HopRequests = field(init=False)
    _full: dict[PeerId, float] = field(default_factory=dict)  # when peers first had no memory
    _me: object = field(default_factory=object)  # to `failures`

    def __post_init__(self) -> None:
        self.answers = AnswerChecker(self.swarm.stack, self.swarm.hidden_size)
        self.requests = HopRequests(self.swarm, self.recovery.deadline_s, self.coding)

    @classmethod
    def begin(cls, swarm: Swarm, coding: Coding, failures: PassFailures | None = None) -> Chain:
        """Args: failures: of the pass, where this is one of its microbatches."""
        deadline_s = swarm.clock() + swarm.config.pass_deadline_s
        router = swarm.router
        recovery = Recovery(router.breakers, router.budget, deadline_s=deadline_s, rng=swarm.rng)
        return cls(swarm, recovery, failures or PassFailures(swarm.stats), coding, may_hedge=swarm.config.hedge)

    async def drive(self, work: Work) -> None:
        """Do all hops of ``work``.

        Raises:
            PeerError: the last failure, once the deadline has passed, or a refusal that no peer can mend.
            NoRouteError: nobody covered the blocks until the deadline.
        """
        while work.hops:
            hop = work.hops[0]
            hedge = self.requests.hedge = self._new_hedge(work, hop)
            began_s = self.swarm.clock()
            try:
                await work.do_hop(hop, self)
            except Outrun:
                assert hedge is not None
                self._adopt(work, hop, hedge, self.swarm.clock() - began_s)
            except PeerError as exc:
                if hedge is None or failure_of(exc) is Failure.BAD_REQUEST or await hedge.outcome() is None:
                    await self._recover(work, hop, exc)
                else:
                    self.recovery.blame(
                        hop.peer_id, self.swarm.router.instance_of(hop.peer_id), exc, now_s=self.swarm.clock()
                    )
                    self._adopt(work, hop, hedge)
            else:
                self._succeed(hop)
                if hedge is not None and hedge.won is not None:
                    hedge.won.discard()
            finally:
                self.requests.hedge = None
                if hedge is not None:
                    await hedge.stop()

    async def route(self, blocks: Span, demand: Demand) -> tuple[Hop, ...]:
        """A route for ``blocks``, waiting for peers to appear until the deadline.

        Raises:
            NoRouteError: none did, or (at once) nobody has ever answered a lookup.
        """
        return await self._found(lambda: self.swarm.route(blocks, demand))

    async def shares(self, blocks: Span, demand: Demand, count: int) -> list[tuple[Hop, ...]]:
        """A route for each of ``count`` microbatches, by `Swarm.shares`. As `route`."""
        return await self._found(lambda: self.swarm.shares(blocks, demand, count))

    async def _found(self, find: Callable[[], Awaitable[T]]) -> T:
        stats = self.swarm.stats
        try:
            while True:
                try:
                    return await find()
                except NoRouteError as exc:
                    if self.swarm.is_unanswered:
                        raise
                    action = self.recovery.on_no_route(exc, now_s=self.swarm.clock())
                    if isinstance(action, GiveUp):
                        raise action.error from action.error.__cause__  # from itself would hide the last failure
                    logger.warning("no route, waiting wait=%.2fs: %s", action.wait_s, exc)
                    stats.waiting_for = tuple(span for span in exc.missing if isinstance(span, Span))
                    await asyncio.sleep(action.wait_s)
                    await self.swarm.refresh()
        finally:
            stats.waiting_for = ()

    async def connect(self, hop: Hop, lane: str, demand: Demand, *, has_cache: bool = False) -> ClientConnection:
        """The connection to the hop's peer; moves off one that failed or is leaving, if anybody else covers its blocks.

        Args:
            has_cache: whether it holds what the work needs: one that is leaving serves that until it is elsewhere.

        Raises:
            PeerError: it cannot be reached, failed moments ago, or is leaving; the retry loop reroutes.
        """
        swarm, name = self.swarm, short_id(hop.peer_id)
        failed = swarm.router.is_backing_off(hop.peer_id)  # maybe at another hop of this very pass
        if failed and swarm.router.has_route(hop.span, demand, avoid={hop.peer_id}):
            text = f"peer '{name}' failed moments ago"
            raise PeerRefused(text, peer_id=hop.peer_id, reason=RefusalReason.BUSY)
        connection = await swarm.connect(hop.peer_id, lane)
        if has_cache:
            return connection
        if connection.is_draining and swarm.router.has_route(hop.span, demand, avoid={hop.peer_id}):
            text = f"peer '{name}' is leaving"
            raise PeerRefused(text, peer_id=hop.peer_id, reason=RefusalReason.DRAINING)
        num_tokens = demand.rows * demand.num_tokens if lane == "bulk" else 0
        if text := obstacle(connection, demand, num_tokens):
            has_others = swarm.router.has_route(hop.span, demand, avoid=swarm.unfit_peers(demand, num_tokens))
            raise refusal(connection, demand, text, has_others=has_others)
        return connection

    def _new_hedge(self, work: Work, hop: Hop) -> Hedge[Work] | None:
        if not (self.may_hedge and self.swarm.router.is_replicated(hop.span, work.demand.adapter)):
            return None
        return Hedge(partial(self._do_elsewhere, work, hop))

    async def _do_elsewhere(self, work: Work, hop: Hop, hedge: Hedge[Work]) -> Work | None:
        """Have other peers do the hop that is under way: what they did, or None."""
        swarm = self.swarm
        rival = work.rival(hop)
        hops = None if rival is None else swarm.router.find_rival(hop, work.demand)
        if rival is None or hops is None:
            return None
        replay_s = swarm.router.replay_seconds(hops, work.demand, work.num_past_tokens())
        await hedge.hold_back(min(replay_s, swarm.config.silence_timeout_s))
        if not swarm.router.budget.take(now_s=swarm.clock(), keep=HEDGE_RESERVE):
            return None
        swarm.router.claim(hops)
        swarm.stats.hedges += 1
        logger.info("hop is slow peer=%s span=%s, asking others too", short_id(hop.peer_id), hop.span)
        chain = Chain(swarm, self.recovery, self.failures, self.coding, may_hedge=False)
        is_done = False
        try:
            is_done = await chain._do_all(rival, hop, hops)
        finally:
            if not is_done:
                rival.discard()
        self.requests.timings += chain.requests.timings
        return rival if is_done else None

    async def _do_all(self, rival: Work, hop: Hop, hops: tuple[Hop, ...]) -> bool:
        """Do all hops of a rival, once; whether none failed."""
        try:
            await rival.replace_hop(hop, hops, self)
            while rival.hops:
                hop = rival.hops[0]
                await rival.do_hop(hop, self)
                self._succeed(hop)
        except PeerError as exc:
            instance_id = self.swarm.router.instance_of(hop.peer_id)
            self.recovery.blame(hop.peer_id, instance_id, exc, now_s=self.swarm.clock())
            return False
        return True

    def _adopt(self, work: Work, hop: Hop, hedge: Hedge[Work], waited_s: float | None = None) -> None:
        """Go on from what others did; find out about the peer that let us wait so long."""
        swarm = self.swarm
        assert hedge.won is not None
        work.adopt(hop, hedge.won)
        swarm.stats.hedges_won += 1
        swarm.stats.failovers += 1
        if waited_s is not None:
            swarm.router.measurements.observe_lag(hop.peer_id, waited_s, now_s=swarm.clock())
            swarm.check_soon(hop.peer_id, "step")
            swarm.check_soon(hop.peer_id, "bulk")

    def _succeed(self, hop: Hop) -> None:
        for peer_id in (hop.peer_id, *self.answers.take_cleared()):
            self.recovery.on_hop_done(peer_id, self.swarm.router.instance_of(peer_id))
        self.failures.go_on(self._me, self.swarm.clock())

    def _is_too_much(self, work: Work, hop: Hop, error: PeerError) -> bool:
        """Whether all who could do this hop of a pass have no memory for it; fewer rows may fit."""
        if not (work.is_pass and isinstance(error, PeerRefused) and error.reason is RefusalReason.OUT_OF_MEMORY):
            return False
        now_s = self.swarm.clock()
        waited_s = now_s - self._full.setdefault(hop.peer_id, now_s)
        is_last = not self.swarm.router.is_held(hop.span, work.demand.adapter, avoid=self._full)
        return is_last and (work.demand.rows > 1 or waited_s >= ROOM_WAIT_S)

    async def _recover(self, work: Work, hop: Hop, error: PeerError) -> None:
        swarm = self.swarm
        if self._is_too_much(work, hop, error):
            raise error
        if swarm.router.may_overflow(hop, work.autocast, work.demand.adapter) and self.answers.ask_again(hop.peer_id):
            logger.info("asked again peer=%s: %s", short_id(hop.peer_id), error)
            return
        now_s = swarm.clock()
        instance_id = swarm.router.instance_of(hop.peer_id)
        is_known = self.failures.meet(self._me, hop.peer_id, instance_id, now_s)
        action = self.recovery.on_hop_failed(hop.peer_id, instance_id, error, now_s=now_s, is_known=is_known)
        if isinstance(action, GiveUp):
            is_gone = isinstance(error, PeerUnreachable | PeerTimeout)
            if is_gone and not swarm.router.has_route(hop.span, work.demand, avoid={hop.peer_id}):
                text = f"nobody that holds blocks {hop.span} was there until the deadline: {error}"
                raise SpanUnavailable(text, missing=(hop.span,)) from error
            raise action.error
        logger.warning("hop failed peer=%s span=%s: %s", short_id(hop.peer_id), hop.span, error)
        swarm.stats.failovers += not is_known
        if isinstance(action, Replay):
            work.forget_hop(hop)
            return
        assert isinstance(action, Reroute)
        if action.wait_s:
            logger.warning("many failures, waiting wait=%.2fs before the next try", action.wait_s)
            await asyncio.sleep(action.wait_s)
        hops = await self.route(hop.span, work.demand)
        swarm.stats.reroutes += not is_known
        logger.info("route %s", " => ".join(f"{new.span} {short_id(new.peer_id)}" for new in hops))
        await work.replace_hop(hop, hops, self)
