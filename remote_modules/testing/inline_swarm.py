"""A swarm and its client in one thread: stock models with remote blocks, without sockets, waiting or threads.

The code under test is the real one from `RemoteSequential` to the peers' engines; `testing.simulation` replaces
sockets, device threads and clocks. Building one takes milliseconds, so whole tables of architectures can be checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoModelForCausalLM, PreTrainedModel

from remote_modules.client.connect import SwarmHandle
from remote_modules.client.sequential import RemoteSequential
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import model_class, serving_class
from remote_modules.model.loading import load_client_part, load_span, read_config
from remote_modules.model.probe import probe_stack
from remote_modules.model.replay import SpanModel
from remote_modules.model.stack import meta_skeleton
from remote_modules.net.loop import LoopThread
from remote_modules.server.engine import Engine
from remote_modules.spans import Span
from remote_modules.testing.simulation import Holding, SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import VirtualLoop

__all__ = ["InlineSwarm"]

T = TypeVar("T")


class _InlineLoop(LoopThread):
    """Runs coroutines on the caller's thread, under virtual time."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(self.run(coroutine))
        return future

    def call_soon(self, callback: Callable[[], object]) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon(callback)

    def stop(self) -> None:
        if self.loop.is_closed():
            return
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


class InlineSwarm:
    """Peers that hold ``spans`` of a checkpoint; a context manager.

    Args:
        folder: a checkpoint.
        spans: one peer for each.
        seed: decides everything random.
        loaded: spans of this checkpoint that another swarm has loaded, and that this one adds to; swarms that share
            them must not run at the same time.
    """

    def __init__(
        self,
        folder: str | Path,
        spans: Sequence[str | Span],
        *,
        seed: int = 0,
        config: ClientConfig | None = None,
        loaded: dict[Span, Holding] | None = None,
    ) -> None:
        self._loaded = {} if loaded is None else loaded
        self.io = _InlineLoop()
        self._checkpoint = open_checkpoint(str(folder))
        cls, self._model_config = serving_class(read_config(self._checkpoint))
        self.stack = probe_stack(cls, self._model_config)
        self._cls = cls
        holdings = [self._holding(span if isinstance(span, Span) else Span.parse(span)) for span in spans]
        self.swarm = self.io.run(_started(seed, holdings, config))
        self._layers: list[RemoteSequential] = []

    @property
    def peers(self) -> list[SimulatedPeer]:
        return self.swarm.peers

    def layers(self) -> RemoteSequential:
        """All blocks, remote; a client of its own."""
        swarm = self.io.run(_client_of(self.swarm))
        handle = SwarmHandle(
            swarm=swarm,
            io=self.io,
            stats=swarm.stats,
            model_config=self._model_config,
            checkpoint=self._checkpoint,
            stack=self.stack,
            skeleton=meta_skeleton(self._cls, self._model_config),
        )
        layers = RemoteSequential(handle, Span(0, self.stack.num_blocks))
        self._layers.append(layers)
        return layers

    def load(self, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
        """The stock class without blocks of its own."""
        cls, config = model_class(read_config(self._checkpoint), auto_class)
        model, stack = load_client_part(self._checkpoint, config, cls)
        setattr(stack.owner(model), stack.list_name, self.layers())
        model.eval()
        return model

    def kv_bytes(self) -> int:
        """Reserved by all peers, once what is under way has arrived."""
        self.io.run(asyncio.sleep(1.0))
        return sum(peer.kv_bytes for peer in self.peers)

    def close(self) -> None:
        for layers in self._layers:
            layers.close()
        self.io.run(_stopped(self.swarm))
        self.io.stop()

    def __enter__(self) -> InlineSwarm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _holding(self, span: Span) -> Holding:
        if span not in self._loaded:
            model, _ = load_span(self._checkpoint, self._model_config, self._cls, span)
            engine = Engine(SpanModel(model, self.stack, span))
            self._loaded[span] = Holding(engine, engine.kv_costs())
        return self._loaded[span]


async def _started(seed: int, holdings: Sequence[Holding], config: ClientConfig | None) -> SimulatedSwarm:
    swarm = SimulatedSwarm(seed, holdings, config=config)
    await swarm.start()
    return swarm


async def _stopped(swarm: SimulatedSwarm) -> None:
    swarm.stop()


async def _client_of(swarm: SimulatedSwarm) -> Swarm:
    return swarm.client()
