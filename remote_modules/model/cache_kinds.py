"""transformers' kinds of cache layers whose names are not the same in all supported releases."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils

__all__ = ["DummyLayer", "IndexedLayer", "LinearLayer"]


class _Absent:
    """Stands for a kind of layer that this release does not have: nothing is an instance of it."""


LinearLayer: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", _Absent)
IndexedLayer: Any = getattr(cache_utils, "DynamicIndexedLayer", _Absent)
DummyLayer: Any = getattr(cache_utils, "DummyLayer", _Absent)
