"""What runs on the device thread: steps, forwards and backwards of one span, by replay.

Stateless but for the caches that it is given. Inputs were checked by the handler; what fails here is this peer's own
fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from remote_modules.model.kv import SpanCache
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp

__all__ = ["Engine", "Speeds"]

PROBE_TOKENS = 64
PROBE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second through one block, one row."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Engine:
    """Runs one `SpanModel`."""

    def __init__(self, model: SpanModel) -> None:
        self.model = model

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    def new_cache(self) -> SpanCache:
        return self.model.new_cache()

    def step(
        self,
        cache: SpanCache,
        blocks: Span,
        ops: tuple[CacheOp, ...],
        tensors: Mapping[str, torch.Tensor],
        arguments: OwnerArguments,
    ) -> torch.Tensor:
        """Apply ``ops``, then run ``hidden_states`` ``[B, T, D]``; output of the same shape and dtype, on the CPU."""
        hidden_states = tensors["hidden_states"]
        with torch.inference_mode():
            for op in ops:
                apply_op(cache, op, tensors)
            output = self.model.run(hidden_states, blocks, arguments, cache)
            return output.to("cpu", hidden_states.dtype)

    def forward(self, blocks: Span, hidden_states: torch.Tensor, arguments: OwnerArguments) -> torch.Tensor:
        """Run ``hidden_states`` ``[B, T, D]``; output of the same shape and dtype, on the CPU."""
        with torch.no_grad():
            return self.model.run(hidden_states, blocks, arguments).to("cpu", hidden_states.dtype)

    def backward(
        self, blocks: Span, hidden_states: torch.Tensor, grad_output: torch.Tensor, arguments: OwnerArguments
    ) -> torch.Tensor:
        """Recompute the forward and return the gradient of ``hidden_states``, of its shape and dtype, on the CPU."""
        with torch.enable_grad():
            entry = hidden_states.to(self.model.device, self.model.dtype).detach().requires_grad_()
            output = self.model.run(entry, blocks, arguments)
            (grad_input,) = torch.autograd.grad(output, entry, grad_output.to(output.device, output.dtype))
        return grad_input.to("cpu", hidden_states.dtype)

    def kv_token_bytes(self) -> dict[int, int]:
        """Per block, bytes that one token of one row takes in the cache; measured on a probe."""
        cache = self.new_cache()
        with torch.inference_mode():
            self.model.run(self._noise(PROBE_TOKENS), self.model.span, OwnerArguments(), cache)
        per_block = -(-cache.num_bytes() // (PROBE_TOKENS * len(self.model.span)))
        return dict.fromkeys(self.model.span, per_block)

    def measure(self, clock: Callable[[], float] = time.perf_counter) -> Speeds:
        """Time prefill and decode for a moment each."""
        cache = self.new_cache()
        num_blocks = len(self.model.span)
        with torch.inference_mode():
            self.model.run(self._noise(PROBE_TOKENS), self.model.span, OwnerArguments(), cache)
            prefill = _rate(lambda: self._timed(PROBE_TOKENS, None), clock)
            decode = _rate(lambda: self._timed(1, cache), clock)
        return Speeds(prefill * PROBE_TOKENS * num_blocks, decode * num_blocks)

    def _timed(self, num_tokens: int, cache: SpanCache | None) -> None:
        output = self.model.run(self._noise(num_tokens), self.model.span, OwnerArguments(), cache)
        output.sum().item()  # waits for the device

    def _noise(self, num_tokens: int) -> torch.Tensor:
        shape = (1, num_tokens, self.model.hidden_size)
        return torch.full(shape, 0.01, dtype=self.model.dtype, device=self.model.device)


def apply_op(cache: SpanCache, op: CacheOp, tensors: Mapping[str, torch.Tensor]) -> None:
    """Change ``cache`` as one `CacheOp` says."""
    if op.kind == "crop":
        cache.crop(op.length)
    elif op.kind == "reset":
        cache.crop(0)
    else:
        cache.select(tensors[op.tensor])


def _rate(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """Calls per second, over about `PROBE_SECONDS`."""
    work()
    began_s = clock()
    num_calls = 0
    while clock() - began_s < PROBE_SECONDS or num_calls < 3:
        work()
        num_calls += 1
    return num_calls / (clock() - began_s)
