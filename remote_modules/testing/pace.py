"""For tests and benchmarks only: spans that take a set time, as those of another device would.

Two cores cannot be eight accelerators. A paced peer computes its tiny blocks truly and then sleeps on its device thread
until the set time is over, so that queues, measured speeds and answers are those of a device of that speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.server.engine import Engine
from remote_modules.server.graphs import Graph
from remote_modules.spans import Span

__all__ = ["Pace", "paced"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a request takes: ``blocks x (block_s + tokens x token_s)``, or what it truly takes if that is more.

    Attributes:
        block_s: of each block, whatever the request; seconds.
        token_s: of each token (rows x tokens) in each block; seconds.
        backward_factor: what a backward takes as a multiple of its forward, which it recomputes first unless the
            forward's graph was kept. With frozen weights both are about as many operations.
    """

    block_s: float
    token_s: float = 0.0
    backward_factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.block_s >= 0 and self.token_s >= 0 and self.backward_factor >= 0):
            numbers = f"{self.block_s!r}, {self.token_s!r} and {self.backward_factor!r}"
            raise ValueError(f"a pace must not be negative, got {numbers}")

    def seconds(self, num_blocks: int, num_tokens: int) -> float:
        return num_blocks * (self.block_s + num_tokens * self.token_s)


@contextmanager
def paced(pace: Pace) -> Iterator[None]:
    """Every span of this process takes at least as long as ``pace`` says."""
    run, backward, backward_kept = SpanModel.run, Engine.backward, Engine.backward_kept

    def paced_run(self: SpanModel, inputs: Any, blocks: Span, arguments: OwnerArguments, cache: Any = None) -> Any:
        ends_s = time.perf_counter() + pace.seconds(len(blocks), arguments.rows * arguments.num_tokens)
        outputs = run(self, inputs, blocks, arguments, cache)
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        return outputs

    def paced_backward(self: Engine, blocks: Span, tensors: Any, arguments: OwnerArguments) -> Any:
        forward_s = pace.seconds(len(blocks), arguments.rows * arguments.num_tokens)
        ends_s = time.perf_counter() + (1.0 + pace.backward_factor) * forward_s
        grads = backward(self, blocks, tensors, arguments)  # runs the forward, paced
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        return grads

    def paced_kept(self: Engine, graph: Graph, grads: Any) -> Any:
        ends_s = time.perf_counter() + pace.backward_factor * pace.seconds(len(graph.blocks), graph.num_tokens)
        found = backward_kept(self, graph, grads)
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        return found

    SpanModel.run = paced_run  # type: ignore[method-assign]
    Engine.backward_kept = paced_kept  # type: ignore[method-assign]
    Engine.backward = paced_backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpanModel.run = run  # type: ignore[method-assign]
        Engine.backward = backward  # type: ignore[method-assign]
        Engine.backward_kept = backward_kept  # type: ignore[method-assign]
