"""Running a span by *replaying* the owner's own forward.

The skeleton is complete: masks, rotary tables, per-layer dispatch and cache indexing are computed by the
architecture's own code. Blocks before the span pass a placeholder on, the true hidden states enter at the first block
to run, and an exception leaves with the output of the last. This is the reference path of a peer: exact, for every
architecture whose blocks return one tensor.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.kv import SpanCache
from remote_modules.model.stack import StackSpec, cache_argument
from remote_modules.spans import Span

__all__ = ["OwnerArguments", "SpanModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerArguments:
    """What the owner was called with at the client, besides hidden states and cache.

    Attributes:
        position_ids: int64 ``[B, T]`` or ``[1, T]``, or None for positions that follow the cache.
        attention_mask: ``[B, P + T]`` as the user gave it, or None.
        use_cache: for calls without a session, whether the owner made a throw-away cache.
        autocast: dtype of an enclosing `torch.autocast`, or None.
    """

    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    use_cache: bool = True
    autocast: torch.dtype | None = None


class _SpanDone(Exception):  # not an error: carries the result past the rest of the owner's forward
    def __init__(self, output: object) -> None:
        self.output = output


class _Pass:
    """Which blocks run now, and what enters the first; set for the time of one call."""

    __slots__ = ("end", "entry", "start")

    def __init__(self) -> None:
        self.start = self.end = 0
        self.entry: torch.Tensor | None = None


class _Blocks(nn.ModuleList):
    """Many owners loop over ``layers[:num_hidden_layers]``, for which torch would build a new list at each token."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)


class _Slot(nn.Module):
    """A held block in its place: runs, is passed over, or ends the pass."""

    def __init__(self, block: nn.Module, index: int, current: _Pass) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.current = current

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        current = self.current
        if self.index < current.start:
            return hidden_states
        if self.index == current.start:
            assert current.entry is not None
            hidden_states, current.entry = current.entry, None
        output = self.block(hidden_states, *args, **kwargs)
        if self.index == current.end - 1:
            raise _SpanDone(output)
        return output

    def __getattr__(self, name: str) -> Any:  # some owners read a block's attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class SpanModel:
    """The blocks of one span, ready to run on one device. Not thread-safe: one call at a time.

    Args:
        model: from `loading.load_span`; its blocks are wrapped in place.
        stack: where its blocks are.
        span: the blocks held.
    """

    def __init__(self, model: PreTrainedModel, stack: StackSpec, span: Span) -> None:
        self.config = model.config
        self.stack = stack
        self.span = span
        self.hidden_size: int = model.config.get_text_config(decoder=True).hidden_size
        self._owner = stack.owner(model)
        if "inputs_embeds" not in inspect.signature(self._owner.forward).parameters:
            raise UnsupportedCallError(f"{type(self._owner).__name__}.forward takes no inputs_embeds")
        self._cache_argument = cache_argument(self._owner)
        self._current = _Pass()
        blocks = stack.blocks(model)
        parameter = next(blocks[span.start].parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        for index in span:
            blocks[index] = _Slot(blocks[index], index, self._current)
        setattr(self._owner, stack.list_name, _Blocks(blocks))

    def new_cache(self) -> SpanCache:
        return SpanCache(self.config, self.span)

    def run(
        self, hidden_states: torch.Tensor, blocks: Span, arguments: OwnerArguments, cache: SpanCache | None = None
    ) -> torch.Tensor:
        """Run ``hidden_states`` ``[B, T, D]`` through ``blocks``; under the caller's grad mode.

        Tensors may lie anywhere and be of any float dtype; the result is on the model's device in its dtype. ``cache``
        grows by T.

        Raises:
            UnsupportedCallError: the architecture's blocks do not return one tensor, or its owner needs more than
                hidden states.
            ValueError: ``cache`` was used for other blocks.
        """
        if cache is not None:
            cache.use(blocks)
        current = self._current
        entry = hidden_states.to(self.device, self.dtype)
        current.start, current.end, current.entry = blocks.start, blocks.end, entry
        try:
            with self._autocast(arguments.autocast):
                self._owner(**self._owner_call(entry, arguments, cache))
        except _SpanDone as done:
            output = done.output
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as exc:
            if current.entry is None or isinstance(exc, torch.OutOfMemoryError):
                raise  # inside a block: not for what the owner lacks
            text = first_line(exc)
            name = type(self._owner).__name__
            raise UnsupportedCallError(f"{name}.forward does not reach block {blocks.start}: {text}") from exc
        else:
            raise UnsupportedCallError(f"{type(self._owner).__name__} did not call block {blocks.end - 1}")
        finally:
            current.entry = None
        if not isinstance(output, torch.Tensor):
            kind = type(output).__name__
            raise UnsupportedCallError(f"blocks of '{self.config.model_type}' return a {kind}, expected one tensor")
        if cache is not None:
            cache.advance(entry.shape[1])
        return output

    def _owner_call(self, entry: torch.Tensor, arguments: OwnerArguments, cache: SpanCache | None) -> dict[str, Any]:
        placeholder = torch.zeros_like(entry, requires_grad=False)  # some owners scale it in place
        call: dict[str, Any] = {"inputs_embeds": placeholder, "use_cache": cache is not None or arguments.use_cache}
        if cache is not None:
            call[self._cache_argument] = cache.cache
        if arguments.position_ids is not None:
            call["position_ids"] = arguments.position_ids.to(self.device)
        if arguments.attention_mask is not None:
            call["attention_mask"] = arguments.attention_mask.to(self.device)
        return call

    def _autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[object]:
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)
