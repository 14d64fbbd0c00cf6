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
from remote_modules.spans import Span

__all__ = ["Pace", "paced"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a request takes: ``blocks x (block_s + tokens x token_s)``, or what it truly takes if that is more.

    Attributes:
        block_s: of each block, whatever the request; seconds.
        token_s: of each token (rows x tokens) in each block; seconds.
    """

    block_s: float
    token_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.block_s >= 0 and self.token_s >= 0):
            raise ValueError(f"a pace must not be negative, got {self.block_s!r} and {self.token_s!r}")

    def seconds(self, num_blocks: int, num_tokens: int) -> float:
        return num_blocks * (self.block_s + num_tokens * self.token_s)


@contextmanager
def paced(pace: Pace) -> Iterator[None]:
    """Every span of this process takes at least as long as ``pace`` says. What a backward adds is not paced."""
    run = SpanModel.run

    def paced_run(self: SpanModel, inputs: Any, blocks: Span, arguments: OwnerArguments, cache: Any = None) -> Any:
        ends_s = time.perf_counter() + pace.seconds(len(blocks), arguments.rows * arguments.num_tokens)
        outputs = run(self, inputs, blocks, arguments, cache)
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        return outputs

    SpanModel.run = paced_run  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpanModel.run = run  # type: ignore[method-assign]
