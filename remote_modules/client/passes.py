"""Passes without a session: forward and backward through a chain of hops.

A large batch is cut into microbatches by rows (`client.microbatches`), which follow each other through the hops
(`client.pipeline`). Each has its own chain, segments and retries; results are joined, and gradients of adapters summed,
in order of number, so that numbers depend on the cut alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch

from remote_modules.client.call import CallArguments, Named, demand_of
from remote_modules.client.chain import Chain, Work
from remote_modules.client.microbatches import Microbatch, NotCutError, cut_grads, join, sum_in_order, whole
from remote_modules.client.pipeline import Pipeline
from remote_modules.client.swarm import Swarm
from remote_modules.client.traces import Batch, Segment, Trace, Wanted, release
from remote_modules.client.wire_choice import coding_for
from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.net.client_connection import ClientConnection
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import BackwardRequest, ForwardRequest

__all__ = ["backward", "forward"]

logger = logging.getLogger(__name__)


class _Forward(Work):
    """A forward; keeps each hop's inputs for the backward.

    Args:
        wanted: what a backward may be asked for; None for all.

    Attributes:
        keeps: whether peers may keep their graphs, as the backward will come to them: not before the first hop that
            has something wanted.
    """

    is_pass = True

    def __init__(
        self, hops: Sequence[Hop], inputs: Named, call: CallArguments, demand: Demand, wanted: Wanted | None = None
    ) -> None:
        self.hops = list(hops)
        self.demand = demand
        self.segments: list[Segment] = []
        self.outputs = inputs
        self.recorded: Named = {}
        self.keeps = call.with_grad
        self.autocast = call.autocast
        self._call = call
        self._wanted = None if wanted is None or wanted.names & inputs.keys() else wanted

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        connection = await chain.connect(hop, "bulk", self.demand)
        inputs = self.outputs
        if self._wanted is not None and self._wanted.has_own(self._call, chain.swarm.stack, hop.span):
            self._wanted = None
        adapter, meta = self._call.adapter_of(hop.span), self._call.meta()
        request_id = connection.new_request_id()
        keep_s = chain.swarm.config.retain_activations_s if self.keeps and self._wanted is None else 0.0
        message = ForwardRequest(request_id, hop.span.start, hop.span.end, (), 0.0, meta, keep_s)
        tensors = {**inputs, **self._call.owner_tensors(), **_own_inputs(self._call, chain, hop)}
        replies = await chain.requests.send(hop, "forward", message, tensors, connection, adapter)
        recorded = {name: replies.pop(name) for name in list(replies) if name.startswith("record.")}
        recorded = chain.answers.check_recorded(hop, recorded, meta)
        self.outputs = chain.answers.check_outputs(hop, replies, inputs, meta)
        self.recorded.update(recorded)
        answer = chain.requests.output
        kept = (connection, answer.request_id) if answer is not None and answer.is_kept else None
        self.segments.append(Segment(hop, inputs, kept))
        self.hops.pop(0)

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        self.hops[:1] = hops

    def rival(self, hop: Hop) -> _Forward:
        rival = _Forward([hop], self.outputs, self._call, self.demand)
        rival.keeps = False
        return rival

    def adopt(self, hop: Hop, rival: Work) -> None:
        assert isinstance(rival, _Forward)
        self.outputs = rival.outputs
        self.recorded.update(rival.recorded)
        self.segments += rival.segments
        self.hops.pop(0)


class _Backward(Work):
    """The backward of a forward's segments, last one first.

    Args:
        grads: of the forward's outputs and of what it recorded, by name.

    Attributes:
        adapter_grads: by the number of the tensor in the call's `AdapterSet`.
    """

    is_pass = True

    def __init__(self, segments: Sequence[Segment], grads: Named, call: CallArguments, demand: Demand):
        self._segments = list(segments[::-1])
        self.hops = [segment.hop for segment in self._segments]
        self.demand = demand
        self.grads = {name: grad for name, grad in grads.items() if not name.startswith("record.")}
        self.side_grads: Named = {}
        self.adapter_grads: dict[int, torch.Tensor] = {}
        self.autocast = call.autocast
        self._recorded = {name: grad for name, grad in grads.items() if name.startswith("record.")}
        self._call = call

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        connection = await chain.connect(hop, "bulk", self.demand)
        inputs = self._segments[0].inputs
        adapter, meta = self._call.adapter_of(hop.span), self._call.meta()
        message = BackwardRequest(connection.new_request_id(), hop.span.start, hop.span.end, (), 0.0, meta)
        sides = _own_inputs(self._call, chain, hop)
        recorded = {name: grad for name, grad in self._recorded.items() if int(name.rpartition(".")[2]) in hop.span}
        grads = {f"grad.{name}": grad for name, grad in (self.grads | recorded).items()}
        tensors = {**inputs, **sides, **self._call.owner_tensors(), **grads}
        kept = self._segments[0].take_kept(connection)
        replies = None if kept is None else await self._use_kept(hop, chain, message, kept, grads, connection)
        if replies is None:
            replies = await chain.requests.send(hop, "backward", message, tensors, connection, adapter)
            chain.swarm.stats.recomputed_backwards += 1
        found = {name.removeprefix("grad."): grad for name, grad in replies.items()}
        trained = {} if adapter is None else adapter.tensors
        found = chain.answers.check_gradients(hop, found, inputs | sides | trained, grads)
        if adapter is not None:
            for name, number in zip(trained, adapter.positions, strict=True):
                self.adapter_grads[number] = found.pop(name)
        for name in sides:
            if name in found:
                self._add_side_grad(name, found.pop(name))
        self.grads = found
        self.hops.pop(0)
        self._segments.pop(0)

    async def _use_kept(
        self, hop: Hop, chain: Chain, message: BackwardRequest, kept: int, grads: Named, connection: ClientConnection
    ) -> Named | None:
        """The answer from the graph that the peer keeps; None if it keeps it no more, which is no failure."""
        message = msgspec.structs.replace(message, request_id=connection.new_request_id(), kept=kept)
        try:
            replies = await chain.requests.send(hop, "kept_backward", message, grads, connection)
        except PeerRefused as exc:
            if exc.reason is not RefusalReason.SESSION_LOST:
                raise
            return None
        chain.swarm.stats.kept_backwards += 1
        return replies

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        """Several hops in one's place need inputs of their own: run the forward of all but the last."""
        again = _Forward(hops[:-1], self._segments[0].inputs, self._call, self.demand)
        again.keeps = False
        await chain.drive(again)
        self._segments[0].release()
        segments = [*again.segments, Segment(hops[-1], again.outputs)]
        self._segments[:1] = segments[::-1]
        self.hops[:1] = [segment.hop for segment in segments[::-1]]

    def rival(self, hop: Hop) -> _Backward:
        return _Backward(self._segments[:1], self.grads | self._recorded, self._call, self.demand)

    def adopt(self, hop: Hop, rival: Work) -> None:
        assert isinstance(rival, _Backward)
        self.grads = rival.grads
        self.adapter_grads.update(rival.adapter_grads)
        for name, grad in rival.side_grads.items():
            self._add_side_grad(name, grad)
        self.hops.pop(0)
        self._segments.pop(0).release()

    def _add_side_grad(self, name: str, grad: torch.Tensor) -> None:
        self.side_grads[name] = self.side_grads[name] + grad if name in self.side_grads else grad


def _own_inputs(call: CallArguments, chain: Chain, hop: Hop) -> Named:
    """What the hop's blocks alone take."""
    stack = chain.swarm.stack
    return call.sides_of(stack, hop.span) | call.past_of(stack, hop.span)


async def forward(
    swarm: Swarm, blocks: Span, inputs: Named, call: CallArguments, wanted: Wanted | None = None
) -> tuple[Named, Named, Trace]:
    """Run ``inputs`` (CPU) through ``blocks``; outputs, what was recorded, and what `backward` needs.

    Args:
        wanted: the most that a backward will be asked for; None for all.

    Raises:
        PeerError, NoRouteError: see `Chain.drive`.
    """
    batch = Batch(blocks, inputs, call, wanted)
    return await _forward_in(swarm, batch, batch.cut(swarm))


async def _forward_in(swarm: Swarm, batch: Batch, parts: Sequence[Microbatch]) -> tuple[Named, Named, Trace]:
    """In these microbatches, or smaller ones."""
    while True:
        try:
            return await _forward(swarm, batch, parts)
        except NotCutError as exc:
            logger.info("the batch is run in one piece: %s", exc)
            batch = replace(batch, may_cut=False)
            parts = whole(batch.inputs, batch.call)
        except PeerRefused as exc:
            parts = batch.cut_finer(swarm, parts, exc)


async def _forward(swarm: Swarm, batch: Batch, parts: Sequence[Microbatch]) -> tuple[Named, Named, Trace]:
    part = parts[0]
    demand = demand_of((batch.coding or swarm.coding).num_bytes(part.inputs), part.call, kv_tokens=0)
    pipeline = await Pipeline.plan(swarm, batch.blocks, demand, len(parts))
    coding = batch.coding or coding_for(
        swarm, pipeline.routes[0], demand, part.inputs, part.call.num_tokens, is_pipelined=len(parts) > 1
    )
    batch, pipeline = replace(batch, coding=coding), replace(pipeline, coding=coding)
    begun: list[_Forward] = []

    async def do(number: int) -> _Forward:
        part, chain = parts[number], pipeline.begin()
        work = _Forward(await pipeline.route(number, chain), part.inputs, part.call, demand, batch.wanted)
        begun.append(work)
        await chain.drive(work)
        return work

    try:
        works = await pipeline.run(do)
        outputs = join(swarm.stack, [work.outputs for work in works], parts)
        recorded = join(swarm.stack, [work.recorded for work in works], parts)
    except BaseException:  # cancelled as well: nobody will come for what peers keep
        release([work.segments for work in begun])
        raise
    trace = Trace(parts, [work.segments for work in works], batch)
    pipeline.finish(trace.route(0))
    return outputs, recorded, trace


async def backward(
    swarm: Swarm, trace: Trace, grads: Named, wanted: Wanted | None = None
) -> tuple[Named, dict[int, torch.Tensor]]:
    """Gradients of the forward's floating-point inputs, side inputs and ``past`` too, and of adapters by number.

    Peers recompute from the segments, but where they kept what they need. The numbers are those of the forward's cut,
    whatever fails meanwhile; where no peer has room for its microbatches, smaller ones begin anew with their forward.

    Args:
        wanted: what has a use; None for all. Hops below the first that has any are left out, and so is what they give.

    Raises:
        PeerError, NoRouteError: see `Chain.drive`.
    """
    while True:
        try:
            return await _backward(swarm, trace, grads, wanted)
        except PeerRefused as exc:
            parts = trace.batch.cut_finer(swarm, trace.microbatches, exc)
        _, _, trace = await _forward_in(swarm, trace.batch, parts)


async def _backward(
    swarm: Swarm, trace: Trace, grads: Named, wanted: Wanted | None
) -> tuple[Named, dict[int, torch.Tensor]]:
    parts, stack = trace.microbatches, swarm.stack
    num_rows = parts[-1].rows.stop
    needed = [trace.needed(number, swarm, wanted) for number in range(len(parts))]
    pairs = zip(trace.segments, needed, strict=True)
    release([segments[: len(segments) - len(own)] for segments, own in pairs])
    first = cut_grads(stack, grads, num_rows, parts[0].rows) if len(parts) > 1 else grads
    coding = trace.batch.coding or swarm.coding
    demand = demand_of(coding.num_bytes(first), parts[0].call, kv_tokens=0)
    pipeline = Pipeline.along(swarm, [trace.route(number) for number in range(len(parts))], demand, coding)

    async def do(number: int) -> _Backward:
        part = parts[number]
        own = cut_grads(stack, grads, num_rows, part.rows) if len(parts) > 1 else grads
        work = _Backward(needed[number], own, part.call, demand)
        await pipeline.begin().drive(work)
        if len(needed[number]) < len(trace.segments[number]):
            work.grads = {}  # of a boundary inside, which nobody asked for
        return work

    works = await pipeline.run(do)
    pipeline.finish(trace.route(0))
    found = join(stack, [work.grads | work.side_grads for work in works], parts)
    return found, sum_in_order([work.adapter_grads for work in works])
