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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import torch

from remote_modules.client.stats import HopTiming
from remote_modules.client.swarm import Swarm
from remote_modules.errors import LocalProtocolError, NoRouteError, PeerError, PeerRefused, PeerTimeout, RefusalReason
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId, short_id
from remote_modules.plan.recovery import GiveUp, Recovery, Replay, Reroute
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire import messages
from remote_modules.wire.messages import Output, Request
from remote_modules.wire.tensors import encode_tensors

__all__ = ["Chain", "PassArguments", "Segment", "Work", "backward", "demand_of", "forward"]

logger = logging.getLogger(__name__)

StatelessRequest: TypeAlias = messages.ForwardRequest | messages.BackwardRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PassArguments:
    """What travels beside the hidden states of a stateless pass; see `wire.messages.ForwardRequest`."""

    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    use_cache: bool = True
    autocast: str = ""

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"position_ids": self.position_ids, "attention_mask": self.attention_mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def request(self, kind: type[StatelessRequest], request_id: int, hop: Hop) -> StatelessRequest:
        """A request without its tensors and timeout, which `Chain.request` fills in."""
        return kind(request_id, hop.span.start, hop.span.end, (), 0.0, use_cache=self.use_cache, autocast=self.autocast)


@dataclass(slots=True)
class Segment:
    """One hop of a stateless pass and what went into it, ``[B, T, D]``."""

    hop: Hop
    inputs: torch.Tensor


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
        self, hop: Hop, kind: str, message: Request, tensors: Mapping[str, torch.Tensor], connection: ClientConnection
    ) -> dict[str, torch.Tensor]:
        """Send one request of ``hop`` and read its tensors; learns from the time it took.

        Raises:
            PeerError: no usable answer.
            LocalProtocolError: the request is larger than we, or the peer, allow.
        """
        swarm = self.swarm
        rows, num_tokens, _ = tensors["hidden_states"].shape
        work = float(rows * num_tokens * len(hop.span))
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

    def check_output(self, hop: Hop, output: torch.Tensor | None, like: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The output, once its shape, dtype and values can be true.

        Values that are not finite are believed when two peers agree on them: then they are the model's.

        Raises:
            PeerError: they cannot.
        """
        expected = (like.shape[0], num_tokens, like.shape[2])
        if output is None or tuple(output.shape) != expected or output.dtype != like.dtype:
            got = "nothing" if output is None else f"{output.dtype} {list(output.shape)}"
            raise self._nonsense(hop, f"expected {like.dtype} {list(expected)}, got {got}")
        if not math.isfinite(output.sum().item()) and not bool(torch.isfinite(output).all()):
            self.suspects.add(hop.peer_id)
            if len(self.suspects) < 2 and bool(torch.isfinite(like).all()):
                raise self._nonsense(hop, "values are not finite")
        return output

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


class _Forward(Work):
    """A stateless forward; keeps each hop's inputs for the backward."""

    def __init__(self, hops: Sequence[Hop], inputs: torch.Tensor, arguments: PassArguments, demand: Demand) -> None:
        self.hops = list(hops)
        self.demand = demand
        self.segments: list[Segment] = []
        self.outputs = inputs
        self._arguments = arguments

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        connection = await chain.connect(hop, "bulk", self.demand)
        inputs = self.outputs
        message = self._arguments.request(messages.ForwardRequest, connection.new_request_id(), hop)
        tensors = {"hidden_states": inputs, **self._arguments.tensors()}
        replies = await chain.request(hop, "forward", message, tensors, connection)
        self.outputs = chain.check_output(hop, replies.get("hidden_states"), inputs, inputs.shape[1])
        self.segments.append(Segment(hop, inputs))
        self.hops.pop(0)

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        self.hops[:1] = hops


class _Backward(Work):
    """The backward of a forward's segments, last one first."""

    def __init__(self, segments: Sequence[Segment], grad: torch.Tensor, arguments: PassArguments, demand: Demand):
        self._segments = list(segments[::-1])
        self.hops = [segment.hop for segment in self._segments]
        self.demand = demand
        self.grad = grad
        self._arguments = arguments

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        connection = await chain.connect(hop, "bulk", self.demand)
        inputs = self._segments[0].inputs
        message = self._arguments.request(messages.BackwardRequest, connection.new_request_id(), hop)
        tensors = {"hidden_states": inputs, "grad_output": self.grad, **self._arguments.tensors()}
        replies = await chain.request(hop, "backward", message, tensors, connection)
        self.grad = chain.check_output(hop, replies.get("grad_input"), inputs, inputs.shape[1])
        self.hops.pop(0)
        self._segments.pop(0)

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        """Several hops in one's place need inputs of their own: run the forward of all but the last."""
        again = _Forward(hops[:-1], self._segments[0].inputs, self._arguments, self.demand)
        await chain.drive(again)
        segments = [*again.segments, Segment(hops[-1], again.outputs)]
        self._segments[:1] = segments[::-1]
        self.hops[:1] = [segment.hop for segment in segments[::-1]]


async def forward(
    swarm: Swarm, blocks: Span, hidden_states: torch.Tensor, arguments: PassArguments
) -> tuple[torch.Tensor, list[Segment]]:
    """Run ``hidden_states`` ``[B, T, D]`` (CPU) through ``blocks``; the output, and what `backward` needs.

    Raises:
        PeerError, NoRouteError: see `Chain.drive`.
    """
    chain = Chain.begin(swarm)
    demand = demand_of(hidden_states, kv_tokens=0)
    work = _Forward(await chain.route(blocks, demand), hidden_states, arguments, demand)
    await chain.drive(work)
    swarm.stats.finish(tuple(segment.hop for segment in work.segments), chain.timings)
    return work.outputs, work.segments


async def backward(
    swarm: Swarm, segments: Sequence[Segment], grad_output: torch.Tensor, arguments: PassArguments
) -> torch.Tensor:
    """The gradient ``[B, T, D]`` of the forward's input; peers recompute from the segments.

    Raises:
        PeerError, NoRouteError: see `Chain.drive`.
    """
    chain = Chain.begin(swarm)
    work = _Backward(segments, grad_output, arguments, demand_of(grad_output, kv_tokens=0))
    route = tuple(segment.hop for segment in segments)
    await chain.drive(work)
    swarm.stats.finish(route, chain.timings)
    return work.grad


def demand_of(hidden_states: torch.Tensor, *, kv_tokens: int, is_decode: bool = False) -> Demand:
    rows, num_tokens, hidden_size = hidden_states.shape
    return Demand(
        num_tokens=num_tokens,
        kv_tokens=kv_tokens,
        bytes_per_token=hidden_size * hidden_states.itemsize,
        is_decode=is_decode,
        rows=rows,
    )
