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
from typing import NoReturn, TypeVar

import msgspec

from remote_modules.client.adapters import HopAdapter
from remote_modules.client.answers import AnswerChecker
from remote_modules.client.call import Named
from remote_modules.client.failures import PassFailures
from remote_modules.client.hedging import Hedge, Outrun
from remote_modules.client.stats import HopTiming
from remote_modules.client.swarm import Swarm
from remote_modules.errors import (
    LocalProtocolError,
    NoRouteError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalReason,
    SpanUnavailable,
    UnsupportedCallError,
)
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import short_id
from remote_modules.plan.recovery import Failure, GiveUp, Recovery, Replay, Reroute, failure_of
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta, Output, Request
from remote_modules.wire.tensors import body_bytes

__all__ = ["Chain", "Work"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEDGE_RESERVE = 8.0  # retries that hedges leave to failures


class Work(ABC):
    """What one pass does on its hops. `hops` holds those still to do, the next one first."""

    hops: list[Hop]
    demand: Demand

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

    def rival(self, hop: Hop) -> Work | None:
        """The next hop's work alone, to be done elsewhere at the same time; None if that cannot be.

        It changes nothing of this one, and is given other hops by `replace_hop`.
        """
        return None

    def adopt(self, hop: Hop, rival: Work) -> None:
        """Take what the rival did for the work of the next hop, which was stopped."""
        raise NotImplementedError

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
    """

    swarm: Swarm
    recovery: Recovery
    failures: PassFailures
    timings: list[HopTiming] = field(default_factory=list)
    may_hedge: bool = True
    answers: AnswerChecker = field(init=False)
    output: Output | None = None  # of the latest answer
    _hedge: Hedge[Work] | None = None  # of the hop that is being done
    _me: object = field(default_factory=object)  # to `failures`

    def __post_init__(self) -> None:
        self.answers = AnswerChecker(self.swarm.stack, self.swarm.hidden_size)

    @classmethod
    def begin(cls, swarm: Swarm, failures: PassFailures | None = None) -> Chain:
        """Args: failures: of the pass, where this is one of its microbatches."""
        deadline_s = swarm.clock() + swarm.config.pass_deadline_s
        router = swarm.router
        recovery = Recovery(router.breakers, router.budget, deadline_s=deadline_s, rng=swarm.rng)
        return cls(swarm, recovery, failures or PassFailures(swarm.stats), may_hedge=swarm.config.hedge)

    async def drive(self, work: Work) -> None:
        """Do all hops of ``work``.

        Raises:
            PeerError: the last failure, once the deadline has passed, or a refusal that no peer can mend.
            NoRouteError: nobody covered the blocks until the deadline.
        """
        while work.hops:
            hop = work.hops[0]
            hedge = self._hedge = self._new_hedge(work, hop)
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
                self._hedge = None
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

    async def connect(self, hop: Hop, lane: str, demand: Demand) -> ClientConnection:
        """The connection to the hop's peer; moves off one that failed or is leaving, if anybody else covers its blocks.

        Raises:
            PeerError: it cannot be reached, failed moments ago, or is leaving; the retry loop reroutes.
        """
        swarm, name = self.swarm, short_id(hop.peer_id)
        failed = swarm.router.is_backing_off(hop.peer_id)  # maybe at another hop of this very pass
        if failed and swarm.router.has_route(hop.span, demand, avoid={hop.peer_id}):
            text = f"peer '{name}' failed moments ago"
            raise PeerRefused(text, peer_id=hop.peer_id, reason=RefusalReason.BUSY)
        connection = await swarm.connect(hop.peer_id, lane)
        if connection.is_draining and swarm.router.has_route(hop.span, demand, avoid={hop.peer_id}):
            text = f"peer '{name}' is leaving"
            raise PeerRefused(text, peer_id=hop.peer_id, reason=RefusalReason.DRAINING)
        return connection

    async def request(
        self,
        hop: Hop,
        kind: str,
        message: Request,
        tensors: Named,
        connection: ClientConnection,
        adapter: HopAdapter | None = None,
    ) -> Named:
        """Send one request of ``hop`` and read its tensors; learns from the time it took.

        Args:
            adapter: what the peer lacks of it goes along.

        Raises:
            PeerError: no usable answer.
            LocalProtocolError: the request is larger than we, or the peer, allow.
        """
        if adapter is None:
            return await self._request(hop, kind, message, tensors, connection)
        if message.call.adapter_rows and not connection.knows_adapter_rows:
            self._refuse_rows(hop)

        async def send(call: CallMeta, brought: Named, *, is_first: bool) -> Named:
            request_id = message.request_id if is_first else connection.new_request_id()
            changed = msgspec.structs.replace(message, call=call, request_id=request_id)
            return await self._request(hop, kind, changed, {**tensors, **brought}, connection)

        return await self.swarm.uploads.send(connection, adapter, message.call, send)

    def _refuse_rows(self, hop: Hop) -> NoReturn:
        """The peer has one adapter for all rows: others are taken, if there are any."""
        router = self.swarm.router
        router.note_without_rows(hop.peer_id)
        text = f"peer '{short_id(hop.peer_id)}' speaks an older protocol, without several adapters in one batch"
        if router.may_take_rows(hop.span):
            raise PeerRefused(text, peer_id=hop.peer_id, reason=RefusalReason.NOT_SERVED)
        raise UnsupportedCallError(f"{text} (adapter_names), and nobody else has blocks {hop.span}; update it")

    async def _request(
        self, hop: Hop, kind: str, message: Request, tensors: Named, connection: ClientConnection
    ) -> Named:
        swarm = self.swarm
        num_tokens = message.call.num_tokens
        work = float(message.call.rows * num_tokens * len(hop.span))
        message, body = swarm.coding.encode(message, tensors, connection)
        num_bytes, limit = sum(map(len, body)), swarm.config.max_request_bytes
        if num_bytes > limit:  # the answer, of like size, would be refused here and look like the peer's fault
            text = f"request of {num_bytes} bytes exceeds max_request_bytes={limit}; send fewer tokens"
            raise LocalProtocolError(text)
        hedge, router = self._hedge, swarm.router
        alone_s = router.timeout_s(hop, kind, work, num_bytes)
        sent = router.send(hop, kind, work, alone_s)
        try:
            timeout_s = min(alone_s + sent.ahead_s, max(0.1, self.recovery.deadline_s - swarm.clock()))
            message = msgspec.structs.replace(message, timeout_s=timeout_s)
            if hedge is not None:
                patience_s = sent.ahead_s + router.patience_s(hop, kind, work)
                hedge.request_begins(patience_s, partial(connection.abandon, message.request_id))
            output, replies = await connection.request(message, body, timeout_s=timeout_s)
            self.output = output
            took_s, moved = swarm.clock() - sent.began_s, num_bytes + body_bytes(output.tensors)
            router.observe(hop, kind, work, output, num_bytes=moved, took_s=took_s, rtt_s=connection.rtt_s, sent=sent)
        except PeerTimeout:
            router.estimator.miss(hop.peer_id)
            raise
        finally:
            router.requests.end(sent, now_s=swarm.clock())
            if hedge is not None:
                hedge.request_ends()
            swarm.count_bytes(connection)
        self._note(hop, num_tokens, took_s, output)
        return swarm.coding.settle(output, replies)

    def check_outputs(
        self, hop: Hop, outputs: Named, like: Named, call: CallMeta, num_tokens: int | None = None
    ) -> Named:
        """See `AnswerChecker.check_outputs`."""
        return self.answers.check_outputs(hop, outputs, like, call, num_tokens)

    def check_gradients(self, hop: Hop, grads: Named, inputs: Named, of_outputs: Named) -> Named:
        """See `AnswerChecker.check_gradients`."""
        return self.answers.check_gradients(hop, grads, inputs, of_outputs)

    def _note(self, hop: Hop, num_tokens: int, took_s: float, output: Output) -> None:
        self.timings.append(
            HopTiming(
                hop=hop,
                num_tokens=num_tokens,
                total_s=took_s,
                queue_s=output.queue_s,
                compute_s=output.compute_s,
            )
        )

    def _new_hedge(self, work: Work, hop: Hop) -> Hedge[Work] | None:
        if not (self.may_hedge and self.swarm.router.is_replicated(hop.span)):
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
        chain = Chain(swarm, self.recovery, self.failures, may_hedge=False)
        is_done = False
        try:
            is_done = await chain._do_all(rival, hop, hops)
        finally:
            if not is_done:
                rival.discard()
        self.timings += chain.timings
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
        self.recovery.on_hop_done(hop.peer_id, self.swarm.router.instance_of(hop.peer_id))
        self.failures.go_on(self._me, self.swarm.clock())

    async def _recover(self, work: Work, hop: Hop, error: PeerError) -> None:
        swarm = self.swarm
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
