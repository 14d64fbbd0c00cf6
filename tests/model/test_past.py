"""Keys and values that a cache begins with: taken off a client's cache, put into a peer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, tiny_config
from transformers import DynamicCache, StaticCache

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.classes import serving_class
from remote_modules.model.kv import SpanCache
from remote_modules.model.past import fill, length_of, names_of, select_layers, take
from remote_modules.model.probe import probe_stack
from remote_modules.spans import Span

ALL = range(NUM_BLOCKS)
CPU = torch.device("cpu")


def states(length: int, *, seed: int = 0, heads: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, heads, length, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(*lengths: int, **changes: Any) -> DynamicCache:
    cache = DynamicCache(config=tiny_config(**changes))
    for index, length in enumerate(lengths):
        if length:
            cache.update(states(length, seed=index), states(length, seed=index + 100), index)
    return cache


def peer_cache(family: str = "llama", blocks: Span = Span(1, 3)) -> SpanCache:  # noqa: B008 - a frozen dataclass
    cls, config = serving_class(tiny_config(family))
    return SpanCache(config, probe_stack(cls, config), blocks)


def update(cache: SpanCache, layer: int, length: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = states(length, seed=7, **kwargs), states(length, seed=8, **kwargs)
    found: tuple[torch.Tensor, torch.Tensor] = cache.layers[layer].update(keys, values)
    return found


def test_names() -> None:
    assert names_of(12) == ("past.12.key", "past.12.value")


def test_what_a_cache_holds_is_taken_as_it_is() -> None:
    cache = filled(5, 5, 5, 5)
    past = take(cache, [1, 2])
    assert list(past) == ["past.1.key", "past.1.value", "past.2.key", "past.2.value"]
    layer: Any = cache.layers[2]
    assert past["past.2.value"] is layer.values
    assert length_of(past) == 5
    assert list(select_layers(past, [2, 3])) == ["past.2.key", "past.2.value"]


@pytest.mark.parametrize("cache", [DynamicCache(), filled(0, 0, 0, 0), filled(5, 0, 0, 5)])
def test_empty_layers_give_nothing(cache: DynamicCache) -> None:
    assert take(cache, [1, 2]) == {}
    assert length_of({}) == 0


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_partly_filled_cache_is_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedCallError, match=r"^the KV cache was filled for some remote blocks only"):
        take(filled(5, *lengths, 5), [1, 2])


def test_layers_of_different_length_are_refused() -> None:
    with pytest.raises(UnsupportedCallError, match=r"^the KV cache holds \[4, 5\] tokens for different blocks$"):
        take(filled(5, 4, 5, 5), [1, 2])


def test_layer_that_lost_tokens_to_its_window_is_refused() -> None:
    cache = DynamicCache(config=tiny_config("mistral"))  # a window of five
    cache.update(states(4), states(4), 0)
    assert length_of(take(cache, [0])) == 4
    cache.update(states(3), states(3), 0)
    with pytest.raises(UnsupportedCallError, match="or beyond a sliding window; start with an empty one"):
        take(cache, [0])


def test_static_cache_is_left_to_adoption() -> None:
    assert take(StaticCache(config=tiny_config(), max_cache_len=8), ALL) == {}


@pytest.mark.parametrize("keeps_graph", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_peer_goes_on_as_a_local_cache_does(family: str, keeps_graph: bool) -> None:
    local: Any = DynamicCache(config=tiny_config(family))
    for index in ALL:
        local.update(states(4, seed=index), states(4, seed=index + 100), index)
    cache = peer_cache(family)
    fill(cache, take(local, [1, 2]), CPU, torch.float32, keeps_graph=keeps_graph)
    assert cache.length == 4
    assert [layer.get_seq_length() for layer in cache.layers] == [4] * NUM_BLOCKS
    for length in (3, 1, 1):
        assert cache.layers[1].get_mask_sizes(length) == local.layers[1].get_mask_sizes(length)
        ours = update(cache, 1, length)
        theirs = local.update(states(length, seed=7), states(length, seed=8), 1)
        assert all(map(torch.equal, ours, theirs))


def test_session_can_be_cropped_and_reordered() -> None:
    cache = peer_cache()
    past = take(filled(5, 5, 5, 5), [1, 2])
    fill(cache, past, CPU, torch.float32)
    cache.select(torch.tensor([1, 1]))
    cache.crop(3)
    keys, _ = update(cache, 1, 1)
    assert torch.equal(keys[:, :, :3], past["past.1.key"][[1, 1], :, :3])
    cache.crop(0)
    assert (cache.length, cache.layers[1].get_seq_length()) == (0, 0)


def test_gradients_reach_what_was_given() -> None:
    cache = peer_cache()
    past = {name: tensor.requires_grad_() for name, tensor in take(filled(5, 5, 5, 5), [1, 2]).items()}
    fill(cache, past, CPU, torch.float32, keeps_graph=True)
    keys, _ = update(cache, 1, 2)
    keys.sum().backward()
    assert torch.equal(past["past.1.key"].grad, torch.ones(2, 2, 5, 8))  # type: ignore[arg-type]
    assert past["past.1.value"].grad is None


def test_values_take_the_dtype_of_the_blocks() -> None:
    cache = peer_cache()
    fill(cache, take(filled(5, 5, 5, 5), [1, 2]), CPU, torch.bfloat16)
    assert update(cache, 2, 1, dtype=torch.bfloat16)[0].dtype is torch.bfloat16


@pytest.mark.parametrize("keeps_graph", [False, True])
def test_keys_that_the_blocks_do_not_make_are_refused(keeps_graph: bool) -> None:
    cache = peer_cache()
    fill(cache, take(filled(5, 5, 5, 5), [1, 2]), CPU, torch.float32, keeps_graph=keeps_graph)
    expected = r"^the KV cache begins with keys or values of \[2, 2, 5, 8\], but the blocks make \[2, 1, 3, 8\]$"
    with pytest.raises(UnsupportedCallError, match=expected):
        update(cache, 1, 3, heads=1)


def test_layers_of_linear_attention_are_refused() -> None:
    cache = peer_cache()
    layers: Any = cache.layers
    cache.begin_with({1: layers[0]}, 0)  # stands for a layer that is elsewhere: no keys and values
    with pytest.raises(UnsupportedCallError, match="layer 1 of the cache is more than keys and values"):
        fill(cache, take(filled(5, 5, 5, 5), [1, 2]), CPU, torch.float32)
