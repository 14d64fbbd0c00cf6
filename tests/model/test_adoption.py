from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, tiny_config
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adoption import RemoteLayer, RemoteLinearLayer, adopt_cache, link_of
from remote_modules.model.stack import cache_argument
from remote_modules.spans import Span

ALL = range(NUM_BLOCKS)


@dataclass(eq=False)
class Log:
    """A session that writes down what it is told."""

    position: int = 0
    told: list[tuple[str, object]] = field(default_factory=list)
    forks: list[Log] = field(default_factory=list)
    num_closed: int = 0

    def crop(self, length: int) -> None:
        self.told.append(("crop", length))
        self.position = length

    def select(self, indices: torch.Tensor) -> None:
        self.told.append(("select", indices.tolist()))

    def repeat(self, repeats: int) -> None:
        self.told.append(("repeat", repeats))

    def reset(self) -> None:
        self.told.append(("reset", None))
        self.position = 0

    def close_soon(self) -> None:
        self.num_closed += 1

    def __deepcopy__(self, memo: dict[int, object]) -> Log:
        fork = Log(self.position)
        self.forks.append(fork)
        memo[id(self)] = fork
        return fork


def adopted(family: str = "llama", blocks: range = ALL, position: int = 0) -> tuple[Any, Log]:
    cache, log = DynamicCache(config=tiny_config(family)), Log(position)
    adopt_cache(cache, blocks, NUM_BLOCKS, log)
    return cache, log


def fill(layer: Any, tokens: int) -> None:
    layer.update(torch.ones(1, 2, tokens, 3), torch.ones(1, 2, tokens, 3))


# Adopting


def test_adopted_cache_stands_for_its_session() -> None:
    cache, log = adopted(position=7)
    assert [type(layer) for layer in cache.layers] == [RemoteLayer] * NUM_BLOCKS
    assert link_of(cache, ALL) is log
    assert cache.get_seq_length() == 7
    assert cache.get_mask_sizes(2, 0) == (9, 0)
    assert [layer.get_max_length() for layer in cache.layers] == [-1] * NUM_BLOCKS
    assert not cache.is_compileable


def test_bare_cache_is_extended_to_all_blocks() -> None:
    cache, log = DynamicCache(), Log(3)
    adopt_cache(cache, range(1, 3), NUM_BLOCKS, log)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, RemoteLayer, RemoteLayer, DynamicLayer]
    assert link_of(cache, range(1, 3)) is log


def test_local_blocks_keep_their_layers() -> None:
    cache, _ = adopted(blocks=range(1, 3), position=5)
    fill(cache.layers[0], 5)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 5


def test_cache_that_was_not_adopted_has_no_session() -> None:
    assert link_of(DynamicCache(), ALL) is None
    assert link_of(DynamicCache(config=tiny_config()), ALL) is None


def test_sliding_blocks_report_the_mask_sizes_of_their_window() -> None:
    cache, _ = adopted("gemma2", position=9)
    theirs = DynamicCache(config=tiny_config("gemma2"))
    for layer in theirs.layers:
        fill(layer, 9)
    assert cache.is_sliding == theirs.is_sliding == [True, False, True, False]
    assert [layer.get_max_length() for layer in cache.layers] == [5, -1, 5, -1]
    for index in range(NUM_BLOCKS):
        for query_length in (1, 4):
            assert cache.get_mask_sizes(query_length, index) == theirs.get_mask_sizes(query_length, index)
        assert cache.get_seq_length(index) == theirs.get_seq_length(index)


def test_static_cache_is_adopted_for_its_length() -> None:
    cache: Any = StaticCache(config=tiny_config(), max_cache_len=8)
    adopt_cache(cache, ALL, NUM_BLOCKS, Log(3))
    assert [type(layer) for layer in cache.layers] == [RemoteLayer] * NUM_BLOCKS
    assert cache.get_seq_length() == 3
    assert cache.get_mask_sizes(2, 0) == (5, 0)


def test_cache_of_linear_attention_is_adopted() -> None:
    cache, log = adopted("mamba", position=2)
    assert [type(layer) for layer in cache.layers] == [RemoteLinearLayer] * NUM_BLOCKS
    assert cache.has_previous_state(0)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    assert log.told == [("crop", 1), ("repeat", 2)]


def test_cache_with_a_state_of_a_local_model_is_refused() -> None:
    cache: Any = DynamicCache(config=tiny_config("mamba"))
    model = AutoModelForCausalLM.from_config(tiny_config("mamba"))
    model(torch.ones(1, 3, dtype=torch.int64), use_cache=True, **{str(cache_argument(model)): cache})
    with pytest.raises(UnsupportedCallError, match=r"^the KV cache was filled by a local model; "):
        adopt_cache(cache, ALL, NUM_BLOCKS, Log())


def test_cache_whose_past_the_session_has_is_adopted() -> None:
    cache: Any = DynamicCache(config=tiny_config())
    for layer in cache.layers:
        fill(layer, 4)
    adopt_cache(cache, ALL, NUM_BLOCKS, Log(4), is_taken=True)
    assert [type(layer) for layer in cache.layers] == [RemoteLayer] * NUM_BLOCKS
    assert cache.get_seq_length() == 4


# Refusing


def test_filled_cache_of_a_local_model_is_refused() -> None:
    cache = DynamicCache(config=tiny_config())
    fill(cache.layers[2], 4)
    with pytest.raises(
        UnsupportedCallError, match=r"^the KV cache was filled by a local model; start with an empty one$"
    ):
        adopt_cache(cache, ALL, NUM_BLOCKS, Log())


def test_cache_filled_only_for_local_blocks_is_adopted() -> None:
    cache = DynamicCache(config=tiny_config())
    fill(cache.layers[0], 4)
    adopt_cache(cache, range(1, 4), NUM_BLOCKS, Log(4))


def test_quantized_cache_is_refused() -> None:
    cache: Any = DynamicCache(config=tiny_config())
    cache.layers[1].residual_length = 128  # transformers' own need packages that are not installed
    with pytest.raises(UnsupportedCallError, match=r"^KV cache layers of kind DynamicLayer are not carried; "):
        adopt_cache(cache, ALL, NUM_BLOCKS, Log())
    assert link_of(cache, ALL) is None


def test_cache_of_other_remote_blocks_is_refused() -> None:
    cache, _ = adopted(blocks=range(0, 2))
    with pytest.raises(UnsupportedCallError, match=r"^KV cache layers of kind RemoteLayer are not carried; "):
        adopt_cache(cache, range(1, 3), NUM_BLOCKS, Log())


@pytest.mark.parametrize(("filled_index", "blocks"), [(3, "0:4"), (1, "1:3")])
def test_refused_cache_is_left_as_it_was(filled_index: int, blocks: str) -> None:
    cache = DynamicCache(config=tiny_config())
    fill(cache.layers[filled_index], 4)
    layers = list(cache.layers)
    log = Log()
    with pytest.raises(UnsupportedCallError):
        adopt_cache(cache, list(Span.parse(blocks)), NUM_BLOCKS, log)
    assert cache.layers == layers
    del cache, layers
    gc.collect()
    assert log.num_closed == 0


def test_keys_cannot_be_put_into_a_remote_layer() -> None:
    cache, _ = adopted()
    with pytest.raises(UnsupportedCallError, match=r"^the KV cache of a remote block cannot be filled here$"):
        cache.update(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), 0)


# Operations


def test_each_operation_is_told_once_in_order() -> None:
    cache, log = adopted(position=20)
    cache.crop(-5)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([4, 2]))
    cache.reset()
    assert log.told == [
        ("crop", 15),
        ("select", [1, 0]),
        ("repeat", 3),
        ("select", [4, 2]),
        ("reset", None),
    ]
    assert cache.get_seq_length() == 0


def test_each_operation_is_told_once_by_a_cache_that_begins_with_local_blocks() -> None:
    cache, log = adopted(blocks=range(2, 4), position=6)
    for layer in cache.layers[:2]:
        fill(layer, 6)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    assert log.told == [("crop", 4), ("repeat", 2)]
    assert cache.get_seq_length(0) == 4


@pytest.mark.parametrize(("removed", "told"), [(0, []), (-1, [("crop", 8)]), (-9, [("crop", 0)]), (-50, [("crop", 0)])])
def test_crop_counts_tokens_to_remove(removed: int, told: list[tuple[str, int]]) -> None:
    cache, log = adopted("gemma2", position=9)
    cache.crop(removed)
    assert log.told == told


def test_crop_by_a_positive_number_does_what_it_does_to_a_local_cache() -> None:
    theirs: Any = DynamicCache()
    for index in range(NUM_BLOCKS):
        theirs.update(torch.ones(1, 2, 9, 3), torch.ones(1, 2, 9, 3), index)
    told: list[tuple[str, object]] = []
    refusal: str | None = None
    try:
        theirs.crop(3)  # until transformers 5.17 the length to keep
        told = [("crop", 3)]
    except ValueError as exc:
        refusal = str(exc)
    assert theirs.get_seq_length() == (9 if refusal else 3)
    cache, log = adopted(position=9)
    if refusal:
        with pytest.raises(ValueError, match=r"\b3\b"):
            cache.crop(3)
    else:
        cache.crop(3)
        cache.crop(20)
    assert log.told == told


def test_rollback_is_possible_without_recording_and_recording_changes_nothing() -> None:
    cache, log = adopted("gemma2", position=9)
    assert all(layer.is_croppable for layer in cache.layers)
    for layer in cache.layers:
        layer.activate_past_recording()
        assert layer.record_past
        layer.offload()
        layer.prefetch()
    assert log.told == []
    assert cache.get_mask_sizes(1, 0) == (5, 5)


# Copies and the end


def test_deepcopy_forks_the_session_once() -> None:
    cache, log = adopted("gemma2", position=9)
    cache.layers[0].activate_past_recording()
    copied = copy.deepcopy(cache)
    (fork,) = log.forks
    assert link_of(copied, ALL) is fork
    copied.crop(-4)
    assert (fork.told, log.told) == ([("crop", 5)], [])
    assert (copied.get_seq_length(), cache.get_seq_length()) == (5, 9)
    assert copied.is_sliding == cache.is_sliding
    assert [layer.record_past for layer in copied.layers] == [True, False, False, False]
    cache.batch_repeat_interleave(2)
    assert (fork.told, log.told) == ([("crop", 5)], [("repeat", 2)])


def test_dropped_cache_closes_its_session_once() -> None:
    cache, log = adopted()
    seen = weakref.ref(cache)
    del cache
    gc.collect()
    assert seen() is None
    assert log.num_closed == 1


def test_kept_cache_keeps_its_session_open() -> None:
    cache, log = adopted()
    gc.collect()
    assert log.num_closed == 0
    assert cache.layers


def test_copy_and_original_close_their_own_sessions() -> None:
    cache, log = adopted()
    copied = copy.deepcopy(cache)
    (fork,) = log.forks
    del copied
    gc.collect()
    assert (fork.num_closed, log.num_closed) == (1, 0)
    second = copy.deepcopy(cache)
    del cache
    gc.collect()
    assert (log.num_closed, log.forks[1].num_closed) == (1, 0)
    assert link_of(second, ALL) is log.forks[1]
