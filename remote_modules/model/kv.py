"""KV cache layers of a peer: growing buffers for its own blocks, bare lengths for all others.

transformers' `DynamicLayer` concatenates the whole past for each token: at 4,096 past tokens 20 ms per layer, against
12 us for writing one token into a buffer that doubles (measured, docs/architecture.md section 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.spans import Span

__all__ = ["GrowingLayer", "LengthLayer", "SpanCache", "check_layer", "grown_capacity", "mask_sizes"]

MIN_CAPACITY_TOKENS = 64


def grown_capacity(capacity: int, needed: int) -> int:
    """Tokens to allocate so that ``needed`` fit: doubling from `MIN_CAPACITY_TOKENS`."""
    capacity = max(capacity, MIN_CAPACITY_TOKENS)
    while capacity < needed:
        capacity *= 2
    return capacity


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes into a buffer of ``[B, H, capacity, K]`` and shows views of it.

    Args:
        sliding_window: of a layer that attends to that many tokens; older ones are kept, unseen, so that any `crop`
            can bring them back.
    """

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if sliding_window is not None:
            self.is_sliding = True
            self.sliding_window = sliding_window
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self._length, self._length + key_states.shape[-2]
        buffers = self._room_for(key_states, value_states, end)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end].copy_(states)
        self._length = end
        self._show()
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if self.is_sliding:
            num_seen = self.sliding_window - 1 + key_states.shape[-2]
            keys, values = keys[:, :, -num_seen:], values[:, :, -num_seen:]
        if keys.shape[1] == 1:  # compressed (MLA): goes through a projection, which rounds differently for strided rows
            keys, values = keys.contiguous(), values.contiguous()
        return keys, values

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return mask_sizes(self._length, query_length, getattr(self, "sliding_window", None))

    def get_max_length(self) -> int:
        return getattr(self, "sliding_window", -1)

    def crop(self, tokens_to_remove: int) -> None:
        self._length = max(0, self._length - abs(tokens_to_remove))
        self._show()

    def reset(self) -> None:
        self._buffers, self._length = None, 0
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._buffers is not None:
            indices = indices.to(self._buffers[0].device)
            self._buffers = (
                self._buffers[0].index_select(0, indices),
                self._buffers[1].index_select(0, indices),
            )
            self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._buffers is not None:
            self.batch_select_indices(torch.arange(len(self._buffers[0])).repeat_interleave(repeats))

    def _room_for(self, keys: torch.Tensor, values: torch.Tensor, needed: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is not None and self._buffers[0].shape[2] >= needed:
            return self._buffers
        capacity = grown_capacity(0 if self._buffers is None else self._buffers[0].shape[2], needed)
        grown = (_empty_like(keys, capacity), _empty_like(values, capacity))
        if self._buffers is not None:
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, : self._length].copy_(old[:, :, : self._length])
        self._buffers = grown
        self.device, self.is_initialized = keys.device, True
        return grown

    def _show(self) -> None:
        if self._buffers is not None:
            self.keys = self._buffers[0][:, :, : self._length]
            self.values = self._buffers[1][:, :, : self._length]


def _empty_like(states: torch.Tensor, capacity: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:2], capacity, states.shape[3]))


@dataclass(slots=True)
class _Length:
    """Tokens in the session, shared by the layers that hold nothing."""

    tokens: int = 0


class LengthLayer(CacheLayerMixin):
    """A layer of another peer: knows how long it would be, so that masks come out right."""

    is_croppable = True
    is_sliding = False

    def __init__(self, length: _Length, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shared = length
        self.is_initialized = True
        if sliding_window is not None:
            self.is_sliding = True
            self.sliding_window = sliding_window

    def get_seq_length(self) -> int:
        return self._shared.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return mask_sizes(self._shared.tokens, query_length, getattr(self, "sliding_window", None))

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a layer of another peer is never filled")

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a layer of another peer is never filled")


def check_layer(layer: object) -> None:
    """Refuse cache layers that hold more than keys and values of all tokens: quantized, linear attention, static.

    Raises:
        UnsupportedCallError: such a layer.
    """
    if not isinstance(layer, DynamicLayer) or type(layer).is_croppable is not True:
        raise UnsupportedCallError(
            f"KV cache layers of kind {type(layer).__name__} are not carried; models with attention in every block "
            "and their default dynamic cache are"
        )


def mask_sizes(past: int, query_length: int, sliding_window: int | None) -> tuple[int, int]:
    """(KV length, KV offset) that transformers' own dynamic layers would report."""
    if sliding_window is None:
        return past + query_length, 0
    kept = min(past, sliding_window - 1)
    return kept + query_length, past - kept


class SpanCache:
    """The KV cache of one session on one peer.

    Args:
        config: of the whole model.
        span: blocks that are really cached.
    """

    def __init__(self, config: PreTrainedConfig, span: Span) -> None:
        self._length = _Length()
        self.cache: Cache = DynamicCache(config=config)
        num_blocks = config.get_text_config(decoder=True).num_hidden_layers
        layers: list[Any] = self.cache.layers or [DynamicLayer() for _ in range(num_blocks)]
        self.cache.layer_class_to_replicate = None
        self.cache.layers = [self._layer(layer, index in span) for index, layer in enumerate(layers)]
        self._held: dict[int, Any] = {index: self.cache.layers[index] for index in span}

    @property
    def length(self) -> int:
        """Tokens cached."""
        return self._length.tokens

    def use(self, blocks: Span) -> None:
        """Hold ``blocks`` alone: masks are sized by the first layer of a kind, which must not be one that is never run.

        Raises:
            ValueError: other blocks were used before, or are not held.
        """
        if self._held.keys() == set(blocks):
            return
        if self._length.tokens or not self._held.keys() >= set(blocks):
            raise ValueError(f"the KV cache holds blocks {list(self._held)}, got {blocks}")
        for index in self._held.keys() - set(blocks):
            self.cache.layers[index] = self._layer(self._held.pop(index), is_held=False)

    def advance(self, num_tokens: int) -> None:
        """Note that ``num_tokens`` went through all held blocks."""
        self._length.tokens += num_tokens

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self._length.tokens:
            for layer in self._held.values():
                if length:
                    layer.crop(length - self._length.tokens)
                else:
                    layer.reset()  # its buffers have the old batch size, and the next step may bring another
            self._length.tokens = length

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``."""
        for layer in self._held.values():
            layer.batch_select_indices(indices)

    def num_bytes(self) -> int:
        """Memory of the buffers as they are."""
        return sum(_layer_bytes(layer) for layer in self._held.values())

    def _layer(self, layer: Any, is_held: bool) -> CacheLayerMixin:
        check_layer(layer)
        window = getattr(layer, "sliding_window", None)
        if not is_held:
            return LengthLayer(self._length, window)
        kept: CacheLayerMixin = layer  # of a subclass that knows more than keys and values
        return GrowingLayer(window) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else kept


def _layer_bytes(layer: CacheLayerMixin) -> int:
    buffers = getattr(layer, "_buffers", None) or (layer.keys, layer.values)
    return sum(tensor.numel() * tensor.itemsize for tensor in buffers if tensor is not None)
