"""Adopting the KV cache that transformers made at the client.

`generate` builds its own `DynamicCache`. At the first remote call its layers for the remote blocks are replaced, in
place, by `RemoteLayer`: they know the length, hold no keys, and pass every operation (crop, reorder, repeat, select,
reset) on to the session. Copying such a cache forks the session; dropping it closes the session.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import check_layer, mask_sizes
from remote_modules.spans import Span

__all__ = ["CacheLink", "RemoteLayer", "adopt_cache", "link_of"]


class CacheLink(Protocol):
    """What a session offers to the cache that stands for it. Operations are queued for the next step; none does I/O."""

    @property
    def position(self) -> int:
        """Tokens in the session."""

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices``, int64 ``[B']``."""

    def repeat(self, repeats: int) -> None:
        """Each batch row comes ``repeats`` times in a row."""

    def reset(self) -> None:
        """Forget all tokens."""

    def close_soon(self) -> None:
        """Free the session without waiting; may be called from any thread, and more than once."""


class RemoteLayer(CacheLayerMixin):
    """The layer of one remote block: a length.

    Args:
        link: the session.
        is_first: whether this layer is the one that passes operations on (a cache tells each of its layers).
        sliding_window: as in the layer that it replaces.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, link: CacheLink, *, is_first: bool, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.link = link
        if is_first:  # not on the cache, which a deepcopy does not build anew
            weakref.finalize(self, link.close_soon)
        self.is_initialized = True
        self.record_past = False
        self._is_first = is_first
        if sliding_window is not None:
            self.is_sliding = True
            self.sliding_window = sliding_window

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteLayer:
        window = getattr(self, "sliding_window", None)
        copied = RemoteLayer(copy.deepcopy(self.link, memo), is_first=self._is_first, sliding_window=window)
        copied.record_past = self.record_past
        return copied

    def get_seq_length(self) -> int:
        return self.link.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return mask_sizes(self.link.position, query_length, getattr(self, "sliding_window", None))

    def get_max_length(self) -> int:
        return getattr(self, "sliding_window", -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, as transformers 5 counts."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove as 0 or less, got {tokens_to_remove}")
        if self._is_first and tokens_to_remove:
            self.link.crop(max(0, self.link.position + tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._is_first:
            self.link.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._is_first:
            self.link.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._is_first:
            self.link.repeat(repeats)

    def reset(self) -> None:
        if self._is_first:
            self.link.reset()

    def activate_past_recording(self) -> None:
        """Rollback is always possible: the client's history replaces what a peer dropped."""
        self.record_past = True

    def offload(self) -> None:
        """Nothing is held here."""

    def prefetch(self) -> None:
        """Nothing is held here."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise UnsupportedCallError("a remote block's KV cache cannot be filled at the client")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedCallError("a remote block's KV cache cannot be filled at the client")


def link_of(cache: Cache, blocks: Span) -> CacheLink | None:
    """The session behind ``cache`` for these blocks, if it was adopted."""
    if blocks.start < len(cache.layers):
        layer = cache.layers[blocks.start]
        if isinstance(layer, RemoteLayer):
            return layer.link
    return None


def adopt_cache(cache: Cache, blocks: Span, num_layers: int, link: CacheLink) -> None:
    """Replace the layers of ``blocks`` in ``cache`` by ones that stand for ``link``.

    Args:
        num_layers: of the whole model; a bare `DynamicCache()` is extended to it.

    Raises:
        UnsupportedCallError: the cache already holds keys for these blocks, or has layers of a kind not carried.
    """
    layers: list[Any] = cache.layers + [DynamicLayer() for _ in range(num_layers - len(cache.layers))]
    for layer in layers[blocks.start : blocks.end]:
        check_layer(layer)
        if layer.get_seq_length() > 0:
            raise UnsupportedCallError("the KV cache was filled by a local model; start with an empty one")
    cache.layers = layers
    cache.layer_class_to_replicate = None
    for index in blocks:
        layer = layers[index]
        window = getattr(layer, "sliding_window", None)
        cache.layers[index] = RemoteLayer(link, is_first=index == blocks.start, sliding_window=window)
