"""Adopting the KV cache that transformers made at the client.

`generate` builds its own `DynamicCache`. At the first remote call its layers for the remote blocks are replaced, in
place, by `RemoteLayer`: they know the length, hold no keys, and pass every operation (crop, reorder, repeat, select,
reset) on to the session. Copying such a cache forks the session; dropping it closes the session.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.cache_kinds import DummyLayer
from remote_modules.model.length_layers import LengthHybridLayer, LengthLayer, LengthLinearLayer, has_state, layer_kind

__all__ = ["CacheLink", "RemoteHybridLayer", "RemoteLayer", "RemoteLinearLayer", "adopt_cache", "link_of"]


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


class _Linked:
    """What the layers of a client's cache have in common: they pass operations on to the session.

    Args:
        link: the session.
        is_first: whether this layer is the one that does (a cache tells each of its layers).
        sliding_window, num_states: as in the layer that it replaces.
    """

    def __init__(
        self, link: CacheLink, *, is_first: bool, sliding_window: int | None = None, num_states: int = 0
    ) -> None:
        super().__init__(link, sliding_window, num_states)  # type: ignore[call-arg]
        self.link = link
        if is_first:  # not on the cache, which a deepcopy does not build anew
            weakref.finalize(self, link.close_soon)
        self.record_past = False
        self._is_first = is_first
        self._kind = (sliding_window, num_states)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        window, num_states = self._kind
        link = copy.deepcopy(self.link, memo)
        copied = type(self)(link, is_first=self._is_first, sliding_window=window, num_states=num_states)
        copied.record_past = self.record_past
        return copied

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is what it is to transformers."""
        if tokens_to_remove > 0:
            # It raises, or (before transformers 5.18) it is the length to keep.
            DynamicLayer().crop(tokens_to_remove)
            tokens_to_remove = min(0, tokens_to_remove - self.link.position)
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


class RemoteLayer(_Linked, LengthLayer):
    """The layer of a remote block with attention."""

    @property
    def indexer_position_ids(self) -> None:
        """Kept by the peers."""
        return None

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor | None) -> None:
        """Nothing is held here."""


class RemoteLinearLayer(_Linked, LengthLinearLayer):
    """The layer of a remote block with linear attention."""


class RemoteHybridLayer(_Linked, LengthHybridLayer):
    """The layer of a remote block with both."""


_REMOTE: dict[type, type[Any]] = {
    LengthLayer: RemoteLayer,
    LengthLinearLayer: RemoteLinearLayer,
    LengthHybridLayer: RemoteHybridLayer,
}


def link_of(cache: Cache, layers: Sequence[int]) -> CacheLink | None:
    """The session behind these ``layers`` of ``cache``, if it was adopted."""
    for index in layers:
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, _Linked):
            return layer.link
    return None


def adopt_cache(
    cache: Cache, layers: Sequence[int], num_layers: int, link: CacheLink, *, is_taken: bool = False
) -> None:
    """Replace ``layers`` of ``cache`` by ones that stand for ``link``.

    Args:
        num_layers: of the whole cache; a bare `DynamicCache()` is extended to it.
        is_taken: whether ``link`` has what the layers hold (`model.past`).

    Raises:
        UnsupportedCallError: the cache already holds something for these layers, or is of a kind not carried.
    """
    found: list[Any] = cache.layers + [DynamicLayer() for _ in range(num_layers - len(cache.layers))]
    kinds = {index: layer_kind(found[index]) for index in layers if not isinstance(found[index], DummyLayer)}
    for index in kinds:
        is_filled = getattr(found[index], "keys", None) is not None and found[index].get_seq_length() > 0
        if (is_filled and not is_taken) or has_state(found[index]):
            raise UnsupportedCallError("the KV cache was filled by a local model; start with an empty one")
    cache.layers = found
    cache.layer_class_to_replicate = None
    if hasattr(cache, "linear_cache"):  # MiniMax: a list beside the layers, empty entries for those that have none
        cache.linear_cache = [[] for _ in range(num_layers)]
    is_first = True
    for index, (kind, window, num_states) in kinds.items():
        remote = _REMOTE[kind](link, is_first=is_first, sliding_window=window, num_states=num_states)
        remote.record_past = getattr(found[index], "record_past", False)
        cache.layers[index] = remote
        is_first = False
