from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model import shrink
from remote_modules.model.length_layers import (
    LengthHybridLayer,
    LengthLayer,
    LengthLinearLayer,
    layer_kind,
    mask_sizes,
)


@dataclass
class Session:
    position: int = 0


def keys(tokens: int) -> torch.Tensor:
    return torch.ones(1, 2, tokens, 3)


@pytest.mark.parametrize("query_length", [1, 4, 9])
@pytest.mark.parametrize("sliding_window", [None, 2, 5, 16])
def test_mask_sizes_are_those_of_transformers(sliding_window: int | None, query_length: int) -> None:
    theirs: Any = DynamicLayer()
    if sliding_window is not None:
        theirs = DynamicSlidingWindowLayer(sliding_window=sliding_window)
    session = Session()
    ours = LengthLayer(session, sliding_window)
    for tokens in (0, 1, 1, 2, 3, 9, 1):
        if tokens:
            theirs.update(keys(tokens), keys(tokens))
        session.position += tokens
        assert mask_sizes(session.position, query_length, sliding_window) == theirs.get_mask_sizes(query_length)
        assert ours.get_mask_sizes(query_length) == theirs.get_mask_sizes(query_length)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_max_length() == (sliding_window or -1)
    assert ours.is_sliding == theirs.is_sliding


def test_state_is_there_once_the_session_has_a_past() -> None:
    session = Session()
    layer = LengthLinearLayer(session, num_states=2)
    assert not any(layer.has_previous_state.values())
    assert not layer.has_previous_state[1]
    session.position = 3
    assert list(layer.has_previous_state.values()) == [True, True]
    assert layer.has_previous_state[0]


def test_hybrid_layer_has_a_length_and_a_state() -> None:
    layer = LengthHybridLayer(Session(4), 3, 1)
    assert (layer.get_seq_length(), layer.get_mask_sizes(1), layer.is_sliding) == (4, (3, 2), True)
    assert layer.has_previous_state[0]


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        (LengthLayer(Session()), lambda layer: layer.update(keys(1), keys(1))),
        (LengthLayer(Session()), lambda layer: layer.lazy_initialization(keys(1), keys(1))),
        (LengthLinearLayer(Session()), lambda layer: layer.update_conv_state(keys(1))),
        (LengthLinearLayer(Session()), lambda layer: layer.update_recurrent_state(keys(1))),
        (LengthHybridLayer(Session()), lambda layer: layer.update(keys(1), keys(1))),
    ],
)
def test_nothing_can_be_put_into_it(layer: Any, call: Any) -> None:
    with pytest.raises(UnsupportedCallError, match=r"^the (KV cache|state) of a remote block cannot be filled here$"):
        call(layer)


# What stands for what


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {LengthLayer}),
        ("mistral", {LengthLayer}),
        ("mamba", {LengthLinearLayer}),
        ("qwen3_next", {LengthLinearLayer, LengthLayer}),
        ("falcon_h1", {LengthHybridLayer}),
    ],
)
def test_layers_of_a_family_have_lengths_of_their_kind(family: str, expected: set[type]) -> None:
    layers = DynamicCache(config=shrink.tiny_config(family)).layers
    assert {layer_kind(layer)[0] for layer in layers} == expected


def test_window_is_that_of_the_layer() -> None:
    windows = [layer_kind(layer)[1] for layer in DynamicCache(config=tiny_config("gemma2")).layers]
    assert windows == [5, None, 5, None]


def test_static_layers_are_taken_for_their_length() -> None:
    (layer, *_) = StaticCache(config=tiny_config(), max_cache_len=8).layers
    assert layer_kind(layer) == (LengthLayer, None, 0)


def test_quantized_layers_are_refused() -> None:
    layer: Any = DynamicLayer()
    layer.residual_length = 128  # transformers' own need packages that are not installed
    with pytest.raises(UnsupportedCallError, match=r"^KV cache layers of kind DynamicLayer are not carried; "):
        layer_kind(layer)
