"""KV cache layers of a peer: growing buffers for its own blocks, bare lengths for all others.

transformers' `DynamicLayer` concatenates the whole past for each token: at 4,096 past tokens 20 ms per layer, against
12 us for writing one token into a buffer that doubles (measured, docs/architecture.md section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.arena import Arena, Region, Rooms
from remote_modules.model.cache_kinds import DummyLayer, IndexedLayer
from remote_modules.model.length_layers import LengthLayer, layer_kind, mask_sizes
from remote_modules.model.rotary import Memory
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span

__all__ = ["GrowingLayer", "SpanCache", "grown_capacity", "is_croppable"]

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
        index: of the layer.
        rooms: where the session's buffers lie, if in an arena; memory of their own is taken once that is full.
    """

    is_croppable = True

    def __init__(self, sliding_window: int | None = None, index: int = 0, rooms: Rooms | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if sliding_window is not None:
            self.is_sliding = True
            self.sliding_window = sliding_window
        self._index = index
        self._rooms = rooms
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._region: Region | None = None
        self._length = 0

    @property
    def keys(self) -> torch.Tensor | None:
        """Those of all tokens; None before the first."""
        return None if self._buffers is None else self._buffers[0][:, :, : self._length]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        """Only transformers' own constructor says that there are none."""

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._buffers is None else self._buffers[1][:, :, : self._length]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None: ...

    @property
    def region(self) -> Region | None:
        """Where the buffers lie in an arena."""
        return self._region

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, num_new = self._length, key_states.shape[-2]
        key_buffer, value_buffer = self._room_for(key_states, value_states, start + num_new)
        key_buffer.narrow(2, start, num_new).copy_(key_states)
        value_buffer.narrow(2, start, num_new).copy_(value_states)
        self._length = end = start + num_new
        first = max(0, end - (self.sliding_window - 1 + num_new)) if self.is_sliding else 0
        keys, values = key_buffer.narrow(2, first, end - first), value_buffer.narrow(2, first, end - first)
        if keys.shape[1] == 1:  # compressed (MLA): goes through a projection, which rounds differently for strided rows
            keys, values = keys.contiguous(), values.contiguous()
        return keys, values

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> None:
        """Put tokens behind those that it shows; `show` lets them be seen."""
        for buffer, states in zip(self._room_for(keys, values, capacity), (keys, values), strict=True):
            buffer[:, :, start : start + states.shape[2]].copy_(states)

    def show(self, length: int) -> None:
        """Let the first ``length`` tokens be seen, which were written."""
        self._length = length

    def make_room(self, needed: int) -> None:
        """For ``needed`` tokens in all, behind those that it holds, which must be some."""
        if self._buffers is not None and self._buffers[0].shape[2] >= needed:
            return
        assert self.keys is not None
        assert self.values is not None
        self._room_for(self.keys, self.values, needed)

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return mask_sizes(self._length, query_length, getattr(self, "sliding_window", None))

    def get_max_length(self) -> int:
        return getattr(self, "sliding_window", -1)

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def crop(self, tokens_to_remove: int) -> None:
        self._length = max(0, self._length - abs(tokens_to_remove))

    def reset(self) -> None:
        self._buffers, self._region, self._length = None, None, 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._buffers is not None:
            keys, values = self._buffers
            indices = indices.to(keys.device)
            chosen = self._new_buffers(keys, values, len(indices), keys.shape[2])
            for new, old in zip(chosen, (keys, values), strict=True):
                torch.index_select(old[:, :, : self._length], 0, indices, out=new[:, :, : self._length])
            self._buffers = chosen

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._buffers is not None:
            self.batch_select_indices(torch.arange(len(self._buffers[0])).repeat_interleave(repeats))

    def _room_for(self, keys: torch.Tensor, values: torch.Tensor, needed: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is not None and self._buffers[0].shape[2] >= needed:
            return self._buffers
        capacity = grown_capacity(0 if self._buffers is None else self._buffers[0].shape[2], needed)
        grown = self._new_buffers(keys, values, len(keys), capacity)
        if self._buffers is not None:
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, : self._length].copy_(old[:, :, : self._length])
        self._buffers = grown
        self.device, self.is_initialized = keys.device, True
        return grown

    def _new_buffers(
        self, keys: torch.Tensor, values: torch.Tensor, rows: int, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for ``rows`` like those of ``keys`` and ``values``."""
        if self._rooms is not None and self._index in self._rooms.arena.layers:
            region = self._rooms.next_region(self._region, rows * capacity)
            if region is not None:
                self._region = region  # the old one may be free from here on: nothing else is queued before the copy
                return self._rooms.arena.buffers(self._index, region, rows)
        self._region = None
        return _empty(keys, rows, capacity), _empty(values, rows, capacity)


def _empty(states: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    return states.new_empty((rows, states.shape[1], capacity, states.shape[3]))


def is_croppable(cache: Cache) -> bool:
    """Whether a peer can take tokens back from such a cache."""
    return all(_keeps_all(layer) for layer in cache.layers) and not hasattr(cache, "linear_cache")


def _keeps_all(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, IndexedLayer, DummyLayer)


@dataclass(slots=True)
class _Length:
    """Tokens in the session, shared by the layers that hold nothing."""

    position: int = 0


class SpanCache:
    """The KV cache of one session on one peer.

    Args:
        config: of the whole model.
        stack: which layers belong to which block.
        span: blocks that are really cached.
        arena: where buffers are to lie.

    Attributes:
        rotary: what rotary tables remember of this session; None before its first step.
    """

    def __init__(self, config: PreTrainedConfig, stack: StackSpec, span: Span, arena: Arena | None = None) -> None:
        self.rotary: Memory | None = None
        self._arena = arena
        self._config = config
        self._stack = stack
        self._blocks = span
        self._length = _Length()
        self._held: list[Any] = []
        self._fill()

    @property
    def length(self) -> int:
        """Tokens cached."""
        return self._length.position

    @property
    def argument(self) -> Cache:
        """What the owner of the blocks takes."""
        return self._argument

    @property
    def layers(self) -> list[Any]:
        """All layers; those of other blocks are lengths."""
        return list(self._cache.layers)

    @property
    def held(self) -> list[Any]:
        """Layers that are really cached."""
        return self._held

    @property
    def linear(self) -> list[Any]:
        """What some architectures keep beside the layers, one entry for each block."""
        return self._linear

    @property
    def blocks(self) -> Span:
        """Those that are really cached."""
        return self._blocks

    def held_layers(self, blocks: Span) -> tuple[int, ...]:
        """Which layers belong to ``blocks``."""
        return self._stack.layers_of(blocks)

    def use(self, blocks: Span) -> None:
        """Hold ``blocks`` alone: masks are sized by the first layer of a kind, which must not be one that is never run.

        Raises:
            ValueError: other blocks were used before, or are not held.
        """
        if self._blocks == blocks:
            return
        if self._length.position or not self._blocks.covers(blocks):
            raise ValueError(f"the KV cache holds blocks {self._blocks}, got {blocks}")
        self._blocks = blocks
        self._fill()

    def begin_with(self, layers: Mapping[int, Any], length: int) -> None:
        """Put ``layers`` that hold ``length`` tokens in the place of empty ones."""
        for index, layer in layers.items():
            self._cache.layers[index] = layer
        self._held = [self._cache.layers[index] for index in self._stack.layers_of(self._blocks)]
        self._length.position = length

    def advance(self, num_tokens: int) -> None:
        """Note that ``num_tokens`` went through all held blocks."""
        self._length.position += num_tokens

    def rewind(self) -> None:
        """Forget what layers took in a step that did not come to its end; all must be `GrowingLayer`."""
        for layer in self._held:
            layer.crop(layer.get_seq_length() - self._length.position)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens.

        Raises:
            UnsupportedCallError: the cache keeps a state that cannot go back, and ``length`` is not 0.
        """
        if length >= self._length.position:
            return
        if length == 0:
            self.rotary = None
            self._length.position = 0
            self._fill()  # the next step may bring another batch size
            return
        if not self._stack.is_croppable:
            raise UnsupportedCallError(f"the cache of '{self._config.model_type}' models cannot be cropped")
        for layer in self._held:
            layer.crop(length - self._length.position)
        self._change_positions(lambda positions: positions[..., :length])
        self._length.position = length

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``."""
        for layer in self._held:
            if not isinstance(layer, DynamicLayer) or layer.is_initialized:
                layer.reorder_cache(indices)
        self._change_positions(lambda positions: positions.index_select(1, indices.to(positions.device)))
        for index, state in self._linear_states():
            self._linear[index] = state[indices.to(state.device)]

    def num_bytes(self, blocks: Span | None = None) -> int:
        """Memory of the buffers as they are; those of ``blocks``, or of all."""
        held = self._stack.layers_of(blocks or self._blocks)
        states = sum(state.numel() * state.itemsize for index, state in self._linear_states() if index in held)
        return states + sum(_layer_bytes(self._cache.layers[index]) for index in held)

    def _fill(self) -> None:
        """Make the layers, empty."""
        kind = self._stack.cache_class or DynamicCache
        cache: Any = DynamicCache(config=self._config) if kind in (DynamicCache, EncoderDecoderCache) else kind()
        held = self._stack.layers_of(self._blocks)
        num_layers = max(self._stack.num_layers or self._stack.num_blocks, len(cache.layers))
        layers: list[Any] = cache.layers + [DynamicLayer() for _ in range(num_layers - len(cache.layers))]
        cache.layer_class_to_replicate = None
        rooms = None if self._arena is None else Rooms(self._arena)
        cache.layers = [self._layer(layer, index, index in held, rooms) for index, layer in enumerate(layers)]
        self._cache = cache
        self._held = [cache.layers[index] for index in held]
        self._linear: list[Any] = getattr(cache, "linear_cache", [])
        if hasattr(cache, "linear_cache"):  # MiniMax: one list beside the layers, None while unused
            cache.linear_cache.extend(None for _ in range(self._stack.num_blocks))
        self._argument: Cache = EncoderDecoderCache(cache, DynamicCache()) if kind is EncoderDecoderCache else cache

    def _layer(self, layer: Any, index: int, is_held: bool, rooms: Rooms | None) -> Any:
        if isinstance(layer, DummyLayer):
            return layer
        kind, window, num_states = layer_kind(layer)
        if not is_held:
            return kind(self._length, window, num_states)
        is_growing = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        return GrowingLayer(window, index, rooms) if is_growing else layer

    def _change_positions(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Of indexed layers, where the owner keeps them on a layer of another block."""
        for layer in self.layers:
            if isinstance(layer, LengthLayer) and layer.indexer_position_ids is not None:
                layer.indexer_position_ids = change(layer.indexer_position_ids)

    def _linear_states(self) -> Iterator[tuple[int, torch.Tensor]]:
        for index, state in enumerate(self._linear):
            if isinstance(state, torch.Tensor):
                yield index, state


def _layer_bytes(layer: Any) -> int:
    buffers = getattr(layer, "_buffers", None)
    return sum(tensor.numel() * tensor.itemsize for tensor in buffers or _tensors_of(vars(layer)))


def _tensors_of(values: dict[Any, Any]) -> Iterator[torch.Tensor]:
    for value in values.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_of(value)
