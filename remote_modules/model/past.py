"""Keys and values that a cache holds before its first call, as prefix tuning makes them.

They are no tokens that anybody could run again, so they travel: as tensors ``past.<layer>.key`` and
``past.<layer>.value`` ``[B, H, P, K]``, with gradients on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import GrowingLayer, SpanCache

__all__ = ["fill", "length_of", "names_of", "select_layers", "take"]

Named = dict[str, torch.Tensor]


def names_of(layer: int) -> tuple[str, str]:
    """Of the keys and the values of one layer of the cache, as they travel."""
    return f"past.{layer}.key", f"past.{layer}.value"


def length_of(past: Mapping[str, torch.Tensor]) -> int:
    """Tokens; 0 if there are none."""
    return next((tensor.shape[2] for tensor in past.values()), 0)


def select_layers(past: Mapping[str, torch.Tensor], layers: Sequence[int]) -> Named:
    """What belongs to ``layers``."""
    return {name: past[name] for layer in layers for name in names_of(layer) if name in past}


def take(cache: Cache, layers: Sequence[int]) -> Named:
    """What ``layers`` of a client's cache hold, with its gradient; empty if they hold nothing.

    Raises:
        UnsupportedCallError: it is more than equally long keys and values of all layers.
    """
    found: dict[int, Any] = {index: cache.layers[index] for index in layers if index < len(cache.layers)}
    lengths = {i: layer.get_seq_length() for i, layer in found.items() if type(layer) in _PLAIN and _is_filled(layer)}
    if not lengths:
        return {}
    if len(lengths) < len(found) or any(found[i].keys.shape[2] != n for i, n in lengths.items()):
        raise UnsupportedCallError(
            "the KV cache was filled for some remote blocks only, or beyond a sliding window; start with an empty one"
        )
    if len(set(lengths.values())) > 1:
        raise UnsupportedCallError(f"the KV cache holds {sorted(set(lengths.values()))} tokens for different blocks")
    past: Named = {}
    for index, layer in found.items():
        past.update(zip(names_of(index), (layer.keys, layer.values), strict=True))
    return past


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


def _is_filled(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None and layer.get_seq_length() > 0


def fill(
    cache: SpanCache,
    past: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    keeps_graph: bool = False,
) -> None:
    """Begin a peer's empty cache with ``past``.

    Args:
        keeps_graph: gradients flow to ``past``; such a cache is for one call, not for a long session.

    Raises:
        UnsupportedCallError: a layer of the cache keeps more than keys and values.
    """
    filled: dict[int, Any] = {}
    for name in past:
        index = int(name.split(".")[1])
        if index in filled:
            continue
        empty: Any = cache.layers[index]
        if not isinstance(empty, GrowingLayer):
            raise UnsupportedCallError(f"layer {index} of the cache is more than keys and values; begin with an empty")
        kind = _JoinedLayer if keeps_graph else _GivenLayer
        filled[index] = kind(getattr(empty, "sliding_window", None))
        filled[index].begin(*(past[name].to(device, dtype) for name in names_of(index)))
    cache.begin_with(filled, length_of(past))


def _check_like(keys: torch.Tensor | None, new: torch.Tensor) -> None:
    assert keys is not None
    if (*keys.shape[:2], keys.shape[3]) != (*new.shape[:2], new.shape[3]):
        given, made = list(keys.shape), list(new.shape)
        raise UnsupportedCallError(f"the KV cache begins with keys or values of {given}, but the blocks make {made}")


class _GivenLayer(GrowingLayer):
    """Of a session."""

    def begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().update(keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check_like(self.keys, key_states)
        _check_like(self.values, value_states)
        return super().update(key_states, value_states)


class _JoinedLayer(GrowingLayer):
    """Of one call with gradients: nothing is written in place."""

    def begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._buffers, self._length = (keys, values), keys.shape[2]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check_like(self.keys, key_states)
        _check_like(self.values, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        self.begin(keys, values)
        if self.is_sliding:
            num_seen = self.sliding_window - 1 + key_states.shape[2]
            keys, values = keys[:, :, -num_seen:], values[:, :, -num_seen:]
        return keys, values
