"""Cache layers that hold nothing: they answer what a layer of their kind would (how long, how large a mask).

A peer's cache has them for the blocks of others, and a client's cache consists of nothing else (`model.adoption`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.cache_kinds import LinearLayer

__all__ = ["LengthHybridLayer", "LengthLayer", "LengthLinearLayer", "Past", "has_state", "layer_kind", "mask_sizes"]


class Past(Protocol):
    """How much of a text has gone before."""

    @property
    def position(self) -> int:
        """Tokens."""


class LengthLayer(CacheLayerMixin):
    """Stands for an attention layer that is elsewhere.

    Args:
        past: of the session.
        sliding_window: as in the layer that it stands for.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False
    # [n, B, P]: some owners keep the positions of all indexed layers on the first one, whoever holds that
    indexer_position_ids: torch.Tensor | None = None

    def __init__(self, past: Past, sliding_window: int | None = None, num_states: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.past = past
        self.is_initialized = True
        self.record_past = False
        if sliding_window is not None:
            self.is_sliding = True
            self.sliding_window = sliding_window

    def get_seq_length(self) -> int:
        return self.past.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return mask_sizes(self.past.position, query_length, getattr(self, "sliding_window", None))

    def get_max_length(self) -> int:
        return getattr(self, "sliding_window", -1)

    get_max_cache_shape = get_max_length  # its name before transformers 5.13, where it is abstract

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedCallError("the KV cache of a remote block cannot be filled here")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedCallError("the KV cache of a remote block cannot be filled here")


class LengthLinearLayer(LinearLayer):  # type: ignore[misc]
    """Stands for a layer of linear attention that is elsewhere: all that is asked of it is whether it has a past."""

    is_compileable = False
    is_croppable = True

    def __init__(self, past: Past, sliding_window: int | None = None, num_states: int = 1) -> None:
        takes_number = len(inspect.signature(LinearLayer.__init__).parameters) > 1  # not in all releases
        LinearLayer.__init__(self, *([num_states] if takes_number else []))
        self.past = past
        self.has_previous_state = _HasPast(past, num_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedCallError("the state of a remote block cannot be filled here")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise UnsupportedCallError("the state of a remote block cannot be filled here")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise UnsupportedCallError("the state of a remote block cannot be filled here")


class LengthHybridLayer(LengthLinearLayer, LengthLayer):
    """Stands for a layer that has both."""

    def __init__(self, past: Past, sliding_window: int | None = None, num_states: int = 1) -> None:
        LengthLayer.__init__(self, past, sliding_window)
        LengthLinearLayer.__init__(self, past, num_states=num_states)


class _HasPast(dict[int, bool]):
    """For each state of a layer of linear attention, whether it has a past: all have, once there is one."""

    def __init__(self, past: Past, num_states: int) -> None:
        super().__init__(dict.fromkeys(range(num_states), False))
        self._past = past

    def __bool__(self) -> bool:  # in older releases a layer has one answer for all of its states
        return self._past.position > 0

    def __getitem__(self, state: int) -> bool:
        return self._past.position > 0

    def values(self) -> Any:
        return [self._past.position > 0] * len(self)


def has_state(layer: Any) -> bool:
    """Whether a layer of linear attention was filled; False for other layers."""
    known = getattr(layer, "has_previous_state", False)
    return any(known.values()) if isinstance(known, Mapping) else bool(known)


def layer_kind(layer: Any) -> tuple[type[LengthLayer] | type[LengthLinearLayer], int | None, int]:
    """The kind of length layer that stands for ``layer``, with its sliding window and its number of linear states.

    Raises:
        UnsupportedCallError: it holds more than its kind does, such as quantized keys.
    """
    window = getattr(layer, "sliding_window", None)
    num_states = getattr(layer, "number_of_states", 0)
    is_attention = isinstance(layer, CacheLayerMixin)
    if isinstance(layer, LinearLayer):
        return (LengthHybridLayer if is_attention else LengthLinearLayer), window, num_states
    if not isinstance(layer, DynamicLayer | StaticLayer) or hasattr(layer, "residual_length"):
        raise UnsupportedCallError(
            f"KV cache layers of kind {type(layer).__name__} are not carried; leave the cache to the model"
        )
    return LengthLayer, window, 0


def mask_sizes(past: int, query_length: int, sliding_window: int | None) -> tuple[int, int]:
    """(KV length, KV offset) that transformers' own dynamic layers would report."""
    if sliding_window is None:
        return past + query_length, 0
    kept = min(past, sliding_window - 1)
    return kept + query_length, past - kept
