from __future__ import annotations

import pytest
from transformers import cache_utils

from remote_modules.model import cache_kinds

NAMES = {
    "LinearLayer": "LinearAttentionCacheLayerMixin",
    "IndexedLayer": "DynamicIndexedLayer",
    "DummyLayer": "DummyLayer",
}


def test_all_kinds_are_known_here() -> None:
    assert NAMES.keys() == set(cache_kinds.__all__)


@pytest.mark.parametrize("ours", NAMES)
def test_kind_is_that_of_the_release_or_of_nothing(ours: str) -> None:
    kind = getattr(cache_kinds, ours)
    theirs = getattr(cache_utils, NAMES[ours], None)
    if theirs is not None:
        assert kind is theirs
    else:
        assert not issubclass(cache_utils.DynamicLayer, kind)
        assert not issubclass(cache_utils.StaticLayer, kind)


def test_attention_alone_is_none_of_them() -> None:
    layer = cache_utils.DynamicLayer()
    assert not isinstance(layer, (cache_kinds.LinearLayer, cache_kinds.IndexedLayer, cache_kinds.DummyLayer))
