"""Passes without a session on a peer: forwards, and backwards that recompute them or use what was kept of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import torch

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.replay import OwnerArguments
from remote_modules.server.activations import Activations
from remote_modules.server.checks import RequestTensors, refuse
from remote_modules.server.engine import Engine
from remote_modules.server.graphs import Graph
from remote_modules.server.jobs import Priority, Timed
from remote_modules.server.uploads import Uploads
from remote_modules.spans import Span
from remote_modules.wire.messages import AnyRequest, BackwardRequest, ForwardRequest

__all__ = ["Training"]

Named = dict[str, torch.Tensor]


class _Run(Protocol):
    def __call__(
        self,
        request: AnyRequest,
        connection_id: int,
        priority: Priority,
        work: Callable[[], Named],
        on_admitted: Callable[[], object] | None = None,
    ) -> Awaitable[Timed[Named]]: ...


class Training:
    """Args: run: has the device do something for a request; raises `PeerRefused`."""

    def __init__(
        self, engine: Engine, activations: Activations, uploads: Uploads, *, run: _Run, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._uploads = uploads
        self._activations = activations
        self._run_on_device = run
        self._clock = clock

    async def forward(
        self,
        request: ForwardRequest,
        blocks: Span,
        tensors: RequestTensors,
        arguments: OwnerArguments,
        connection_id: int,
    ) -> tuple[Timed[Named], bool]:
        """The outputs, and whether the graph is kept."""
        num_tokens = arguments.rows * arguments.num_tokens
        keeps = request.keep_s > 0 and arguments.with_grad and self._activations.has_room(blocks, num_tokens)
        graphs: list[Graph] = []
        keep = graphs.append if keeps else None
        work = lambda there: self._engine.forward(blocks, there, arguments, keep)  # noqa: E731
        timed = await self._run(request, connection_id, tensors, work)
        is_kept = bool(graphs) and self._activations.keep(
            connection_id, request.request_id, graphs[-1], lease_s=request.keep_s, now_s=self._clock()
        )
        return timed, is_kept

    async def backward(
        self,
        request: BackwardRequest,
        blocks: Span,
        tensors: RequestTensors,
        arguments: OwnerArguments,
        connection_id: int,
    ) -> Timed[Named]:
        """The gradients, of a forward that is done again."""
        work = lambda there: self._engine.backward(blocks, there, arguments)  # noqa: E731
        timed = await self._run(request, connection_id, tensors, work)
        self._activations.num_recomputed += 1
        return timed

    async def kept_backward(
        self, request: BackwardRequest, blocks: Span, grads: Named, connection_id: int
    ) -> Timed[Named]:
        """The gradients, of a forward that was kept.

        Raises:
            PeerRefused: ``session_lost``, it is kept no more, or has no room for its backward.
        """
        assert request.kept is not None
        activations = self._activations
        graph = activations.take(connection_id, request.kept)
        if graph is None:
            activations.num_lost += 1
            refuse("the graph of this forward is not kept any more", RefusalReason.SESSION_LOST)
        upload = self._uploads.of(grads)
        try:
            if graph.blocks != blocks:
                refuse(f"the forward that is kept ran blocks {graph.blocks}, got {blocks}")
            work = lambda: self._engine.backward_kept(graph, *upload.take())  # noqa: E731
            timed = await self._run_on_device(request, connection_id, Priority.TRAINING, work, upload.begin)
        except PeerRefused as exc:
            if exc.reason is not RefusalReason.OUT_OF_MEMORY:
                raise
            activations.num_lost += 1
            activations.clear()
            refuse("the device has no memory for the backward of what was kept", RefusalReason.SESSION_LOST)
        finally:
            upload.end()
            activations.release(graph)
        activations.num_used += 1
        return timed

    async def _run(
        self,
        request: AnyRequest,
        connection_id: int,
        tensors: RequestTensors,
        work: Callable[[RequestTensors], Named],
    ) -> Timed[Named]:
        """Inputs go ahead to an accelerator; kept graphs go before a request is refused for want of memory."""
        upload = self._uploads.of(tensors.inputs, tensors.grads)

        def work_there() -> Named:
            inputs, grads = upload.take()
            return work(replace(tensors, inputs=inputs, grads=grads))

        try:
            return await self._run_on_device(request, connection_id, Priority.TRAINING, work_there, upload.begin)
        except PeerRefused as exc:
            if exc.reason is not RefusalReason.OUT_OF_MEMORY or not self._activations.clear():
                raise
        finally:
            upload.end()
        return await self._run_on_device(request, connection_id, Priority.TRAINING, lambda: work(tensors))
