"""THE retry loop: work on hops, in order, until all of it is done or the pass gives up.

Steps, forwards and backwards differ in what they do on one hop; what happens when a hop fails is decided here, by
`plan.recovery`, the same way for all of them. Only `PeerError` and `NoRouteError` are handled; anything else is a
bug or the caller's mistake and goes up.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import msgspec
import torch

from remote_modules.client.adapters import HopAdapter
from remote_modules.client.call import CallArguments, Named
from remote_modules.client.stats import HopTiming
from remote_modules.client.swarm import Swarm
from remote_modules.errors import LocalProtocolError, NoRouteError, PeerError, PeerRefused, PeerTimeout, RefusalReason
from remote_modules.model.tensors import num_bytes
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId, short_id
from remote_modules.plan.recovery import GiveUp, Recovery, Replay, Reroute
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta, Output, Request
from remote_modules.wire.tensors import encode_tensors

__all__ = ["Chain", "Work", "demand_of"]

logger = logging.getLogger(__name__)


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


@dataclass(slots=True)
class Chain:
    """One pass under way.

    Args:
        swarm: where peers come from.
        recovery: decides what follows a failure.
    """

    swarm: Swarm
    recovery: Recovery
    timings: list[HopTiming] = field(default_factory=list)
    suspects: set[PeerId] = field(default_factory=set)
    _failed_s: float | None = None

    @classmethod
    def begin(cls, swarm: Swarm) -> Chain:
        deadline_s = swarm.clock() + swarm.config.pass_deadline_s
        return cls(swarm, Recovery(swarm.bans, deadline_s=deadline_s, rng=swarm.rng))

    async def drive(self, work: Work) -> None:
        """Do all hops of ``work``.

        Raises:
            PeerError: the last failure, once the deadline has passed, or a refusal that no peer can mend.
            NoRouteError: nobody covered the blocks until the deadline.
        """
        while work.hops:
            hop = work.hops[0]
            try:
                await work.do_hop(hop, self)
            except PeerError as exc:
                await self._recover(work, hop, exc)
            else:
                self._succeed(hop)

    async def route(self, blocks: Span, demand: Demand) -> tuple[Hop, ...]:
        """A route for ``blocks``, waiting for peers to appear until the deadline.

        Raises:
            NoRouteError: none did, or (at once) nobody has ever answered a lookup.
        """
        while True:
            try:
                return await self.swarm.route(blocks, demand)
            except NoRouteError as exc:
                if self.swarm.is_unanswered:
                    raise
                action = self.recovery.on_no_route(exc, now_s=self.swarm.clock())
                if isinstance(action, GiveUp):
                    raise action.error from action.error.__cause__  # not from itself: that would hide the last failure
                logger.warning("no route, waiting wait=%.2fs: %s", action.wait_s, exc)
                await asyncio.sleep(action.wait_s)
                await self.swarm.refresh()

    async def connect(self, hop: Hop, lane: str, demand: Demand) -> ClientConnection:
        """The connection to the hop's peer; moves off a peer that is leaving, if anybody else covers its blocks.

        Raises:
            PeerError: it cannot be reached, or is leaving; the retry loop reroutes.
        """
        connection = await self.swarm.connect(hop.peer_id, lane)
        if connection.is_draining and self.swarm.has_route(hop.span, demand, avoid={hop.peer_id}):
            text = f"peer '{short_id(hop.peer_id)}' is leaving"
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
            adapter: goes along if the peer does not have it yet.

        Raises:
            PeerError: no usable answer.
            LocalProtocolError: the request is larger than we, or the peer, allow.
        """
        if adapter is None:
            return await self._request(hop, kind, message, tensors, connection)
        sent = self.swarm.adapters_sent(connection)
        call = msgspec.structs.replace(message.call, adapter=adapter.digest)
        message = msgspec.structs.replace(message, call=call)
        try:
            brought = {} if adapter.digest in sent else adapter.tensors
            replies = await self._request(hop, kind, message, {**tensors, **brought}, connection)
        except PeerRefused as exc:
            if exc.reason is not RefusalReason.ADAPTER_MISSING:
                raise
            sent.discard(adapter.digest)
            message = msgspec.structs.replace(message, request_id=connection.new_request_id())
            replies = await self._request(hop, kind, message, {**tensors, **adapter.tensors}, connection)
        sent.add(adapter.digest)
        return replies

    async def _request(
        self, hop: Hop, kind: str, message: Request, tensors: Named, connection: ClientConnection
    ) -> Named:
        swarm = self.swarm
        num_tokens = message.call.num_tokens
        work = float(message.call.rows * num_tokens * len(hop.span))
        metas, body = encode_tensors(tensors)
        num_bytes, limit = sum(map(len, body)), swarm.config.max_request_bytes
        if num_bytes > limit:  # the answer, of like size, would be refused here and look like the peer's fault
            text = f"request of {num_bytes} bytes exceeds max_request_bytes={limit}; send fewer tokens"
            raise LocalProtocolError(text)
        timeout_s = min(self._timeout_s(hop, kind, work), max(0.1, self.recovery.deadline_s - swarm.clock()))
        message = msgspec.structs.replace(message, tensors=metas, timeout_s=timeout_s)
        began_s = swarm.clock()
        try:
            output, replies = await connection.request(message, body, timeout_s=timeout_s)
        except PeerTimeout:
            swarm.estimator.miss(hop.peer_id)
            raise
        finally:
            swarm.count_bytes(connection)
        took_s = swarm.clock() - began_s
        swarm.estimator.observe(hop.peer_id, kind, work=work, took_s=took_s)
        self._note(hop, num_tokens, took_s, output)
        return replies

    def check_outputs(
        self, hop: Hop, outputs: Named, like: Named, call: CallMeta, num_tokens: int | None = None
    ) -> Named:
        """What the hop's last block returned, once names, shapes, dtypes and values can be true.

        Values that are not finite are believed when two peers agree on them: then they are the model's.

        Args:
            like: what went in.
            num_tokens: how many tokens' outputs were asked for; None for all.

        Raises:
            PeerError: they cannot.
        """
        stack = self.swarm.stack
        count = call.num_tokens if num_tokens is None else num_tokens
        hidden = like["hidden_states"]
        expected = list(hidden.shape)
        if stack.hidden.time is not None:
            expected[stack.hidden.time] = count
        output = outputs.get("hidden_states")
        if output is None or list(output.shape) != expected or output.dtype != hidden.dtype:
            got = "nothing" if output is None else f"{output.dtype} {list(output.shape)}"
            raise self._nonsense(hop, f"expected {hidden.dtype} {expected}, got {got}")
        for index, spec in stack.states.items():
            state = outputs.get(f"state.{index}")
            if state is not None and count and not spec.fits(state, call.rows, count, self.swarm.hidden_size):
                raise self._nonsense(hop, f"state {index} is {state.dtype} {list(state.shape)}, expected {spec.dims}")
        self._check_finite(hop, outputs, like)
        return outputs

    def check_gradients(self, hop: Hop, grads: Named, inputs: Named, of_outputs: Named) -> Named:
        """Gradients by the names of ``inputs``, once they fit them.

        Args:
            of_outputs: the gradients that went in; those of a scaled loss may overflow.

        Raises:
            PeerError: they do not.
        """
        for name, tensor in inputs.items():
            if not tensor.is_floating_point():
                continue
            grad = grads.get(name)
            if grad is None or grad.shape != tensor.shape or grad.dtype != tensor.dtype:
                got = "nothing" if grad is None else f"{grad.dtype} {list(grad.shape)}"
                expected = f"{tensor.dtype} {list(tensor.shape)}"
                raise self._nonsense(hop, f"expected a gradient of '{name}', {expected}, got {got}")
        self._check_finite(hop, grads, inputs | of_outputs)
        return grads

    def _check_finite(self, hop: Hop, outputs: Named, like: Named) -> None:
        if all(map(_is_finite, outputs.values())):
            return
        self.suspects.add(hop.peer_id)
        if len(self.suspects) < 2 and all(map(_is_finite, like.values())):
            raise self._nonsense(hop, "values are not finite")

    def _nonsense(self, hop: Hop, text: str) -> PeerError:
        return PeerError(
            f"peer '{short_id(hop.peer_id)}' gave a wrong answer for blocks {hop.span}: {text}", peer_id=hop.peer_id
        )

    def _timeout_s(self, hop: Hop, kind: str, work: float) -> float:
        record = self.swarm.record(hop.peer_id)
        rate = record.decode_tokens_per_s if kind == "decode" else record.prefill_tokens_per_s
        return self.swarm.estimator.timeout_s(hop.peer_id, kind, work=work, announced_rate=rate)

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

    def _succeed(self, hop: Hop) -> None:
        self.recovery.on_hop_done(hop.peer_id)
        if self._failed_s is not None:
            self.swarm.stats.stall_s += self.swarm.clock() - self._failed_s
            self._failed_s = None

    async def _recover(self, work: Work, hop: Hop, error: PeerError) -> None:
        swarm = self.swarm
        now_s = swarm.clock()
        action = self.recovery.on_hop_failed(hop.peer_id, swarm.instance_of(hop.peer_id), error, now_s=now_s)
        if isinstance(action, GiveUp):
            raise action.error
        logger.warning("hop failed peer=%s span=%s: %s", short_id(hop.peer_id), hop.span, error)
        self._failed_s = self._failed_s or now_s
        swarm.stats.failovers += 1
        if isinstance(action, Replay):
            work.forget_hop(hop)
            return
        assert isinstance(action, Reroute)
        hops = await self.route(hop.span, work.demand)
        swarm.stats.reroutes += 1
        logger.info("route %s", " => ".join(f"{new.span} {short_id(new.peer_id)}" for new in hops))
        await work.replace_hop(hop, hops, self)


def demand_of(tensors: Named, call: CallArguments, *, kv_tokens: int, is_decode: bool = False) -> Demand:
    """What a pass of ``tensors`` asks of every hop."""
    tokens = max(1, call.rows * call.num_tokens)
    return Demand(
        num_tokens=call.num_tokens,
        kv_tokens=kv_tokens,
        bytes_per_token=-(-num_bytes(tensors) // tokens),
        is_decode=is_decode,
        rows=call.rows,
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
