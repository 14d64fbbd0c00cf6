from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, tiny_config
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import (
    MIN_CAPACITY_TOKENS,
    GrowingLayer,
    LengthLayer,
    SpanCache,
    check_layer,
    grown_capacity,
    mask_sizes,
)
from remote_modules.spans import Span

HEADS, SIZE = 2, 3


def states(
    rng: Random, rows: int, tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    keys = torch.randn((rows, HEADS, tokens, SIZE), generator=generator).to(dtype)
    return keys, keys.flip(-1) * 2


def stock_layer(sliding_window: int | None) -> DynamicLayer:
    return DynamicLayer() if sliding_window is None else DynamicSlidingWindowLayer(sliding_window=sliding_window)


class Twin:
    """All that a layer holds, as plain tensors ``[B, H, P, K]``.

    What an update shows is asked of transformers' own layer, filled afresh: its crop and reset mean other things in
    other releases, its update does not.
    """

    def __init__(self, sliding_window: int | None) -> None:
        self.sliding_window = sliding_window
        self.held: list[torch.Tensor] = []  # keys, values; empty before the first update

    @property
    def length(self) -> int:
        return self.held[0].shape[2] if self.held else 0

    def stock(self) -> Any:
        layer: Any = stock_layer(self.sliding_window)
        if self.held:
            layer.update(*self.held)
        return layer

    def update(self, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shown: tuple[torch.Tensor, torch.Tensor] = self.stock().update(*new)
        old = self.held or [states[:, :, :0] for states in new]
        self.held = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
        return shown

    def crop(self, length: int) -> None:
        self.held = [states[:, :, :length] for states in self.held]

    def select(self, rows: torch.Tensor) -> None:
        self.held = [states[rows] for states in self.held]


def change_both(rng: Random, ours: Any, twin: Twin, rows: int, dtype: torch.dtype) -> int:
    """One random operation on both, and the number of rows after it."""
    kind = rng.choice(["update", "update", "update", "crop", "select", "reorder", "repeat", "reset"])
    if kind == "update" or twin.length == 0:
        keys, values = states(rng, rows, rng.choice([1, 1, 2, 7, 40, 90]), dtype)
        for seen, expected in zip(ours.update(keys, values), twin.update(keys, values), strict=True):
            assert torch.equal(seen, expected)
        return rows
    if kind == "crop":
        num_removed = rng.randrange(twin.length)
        ours.crop(-num_removed)
        twin.crop(twin.length - num_removed)
        return rows
    if kind == "reset":
        ours.reset()
        twin.held = []
        return rng.randint(1, 3)
    if kind == "repeat":
        repeats = rng.randint(1, 3) if rows <= 8 else 1
        ours.batch_repeat_interleave(repeats)
        twin.select(torch.arange(rows).repeat_interleave(repeats))
        return rows * repeats
    rows_after = rows if kind == "reorder" else rng.randint(1, rows)
    indices = torch.tensor([rng.randrange(rows) for _ in range(rows_after)])
    change = ours.reorder_cache if kind == "reorder" else ours.batch_select_indices
    change(indices)
    twin.select(indices)
    return rows_after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 2, 5, 64])
@pytest.mark.parametrize("seed", range(12))
def test_random_operations_show_what_transformers_would_bit_for_bit(
    seed: int, sliding_window: int | None, dtype: torch.dtype
) -> None:
    rng = Random(seed)
    ours: Any = GrowingLayer(sliding_window)
    twin = Twin(sliding_window)
    rows = rng.randint(1, 3)
    for _ in range(40):
        rows = change_both(rng, ours, twin, rows, dtype)
        assert ours.get_seq_length() == twin.length
        assert ours.get_mask_sizes(3) == twin.stock().get_mask_sizes(3)
        if twin.held:
            assert torch.equal(ours.keys, twin.held[0])
            assert torch.equal(ours.values, twin.held[1])


@pytest.mark.parametrize(("sliding_window", "expected"), [(None, -1), (5, 5)])
def test_longest_length_is_that_of_the_window(sliding_window: int | None, expected: int) -> None:
    assert GrowingLayer(sliding_window).get_max_length() == expected


@pytest.mark.parametrize("num_removed", [1, 3, 20])
def test_crop_beyond_the_window_equals_never_having_gone_there(num_removed: int) -> None:
    rng = Random(0)
    keys, values = states(rng, 1, 30)
    cropped, straight = GrowingLayer(5), DynamicSlidingWindowLayer(sliding_window=5)
    cropped.update(keys, values)
    cropped.crop(-num_removed)
    straight.update(keys[:, :, : 30 - num_removed], values[:, :, : 30 - num_removed])
    new = states(rng, 1, 2)
    for seen, expected in zip(cropped.update(*new), straight.update(*new), strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_buffers_are_allocated_a_logarithmic_number_of_times(step: int) -> None:
    layer, rng = GrowingLayer(), Random(0)
    places: list[int] = []
    for _ in range(1000):
        keys, _ = layer.update(*states(rng, 1, step))
        if not places or keys.data_ptr() != places[-1]:
            places.append(keys.data_ptr())
    assert len(places) <= 1 + math.ceil(math.log2(1000 * step / MIN_CAPACITY_TOKENS))


def test_shown_keys_are_views_of_the_buffer() -> None:
    layer, rng = GrowingLayer(), Random(0)
    first, _ = layer.update(*states(rng, 1, 3))
    second, _ = layer.update(*states(rng, 1, 1))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize(
    ("capacity", "needed", "expected"),
    [(0, 1, 64), (0, 64, 64), (0, 65, 128), (64, 65, 128), (128, 10, 128), (64, 1000, 1024)],
)
def test_capacity_doubles_until_the_tokens_fit(capacity: int, needed: int, expected: int) -> None:
    assert grown_capacity(capacity, needed) == expected


# Lengths without keys


@pytest.mark.parametrize("query_length", [1, 4, 9])
@pytest.mark.parametrize("sliding_window", [None, 2, 5, 16])
def test_mask_sizes_are_those_of_transformers(sliding_window: int | None, query_length: int) -> None:
    theirs: Any = stock_layer(sliding_window)
    rng = Random(0)
    past = 0
    for tokens in (0, 1, 1, 2, 3, 9, 1):
        if tokens:
            theirs.update(*states(rng, 1, tokens))
        past += tokens
        assert mask_sizes(past, query_length, sliding_window) == theirs.get_mask_sizes(query_length)


def test_unheld_layers_tell_the_length_of_the_session_and_take_no_keys() -> None:
    cache = SpanCache(tiny_config("gemma2"), Span(2, 4))
    cache.advance(7)
    sliding, full = cache.cache.layers[:2]
    assert isinstance(sliding, LengthLayer)
    assert isinstance(full, LengthLayer)
    assert (sliding.get_seq_length(), full.get_seq_length(), cache.length) == (7, 7, 7)
    assert sliding.get_mask_sizes(1) == (5, 3)
    assert full.get_mask_sizes(1) == (8, 0)
    assert (sliding.is_sliding, full.is_sliding) == (True, False)
    with pytest.raises(AssertionError):
        full.update(*states(Random(0), 1, 1))


# The cache of a span


def kinds(cache: SpanCache) -> list[tuple[str, bool]]:
    layers: list[Any] = cache.cache.layers
    return [(type(layer).__name__, layer.is_sliding) for layer in layers]


def fill(cache: SpanCache, rng: Random, rows: int, tokens: int) -> None:
    for layer in cache.cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.update(*states(rng, rows, tokens))
    cache.advance(tokens)


def held(cache: SpanCache) -> list[Any]:
    return [layer for layer in cache.cache.layers if isinstance(layer, GrowingLayer)]


def test_span_cache_holds_its_blocks_alone() -> None:
    assert kinds(SpanCache(tiny_config("gemma2"), Span(1, 3))) == [
        ("LengthLayer", True),
        ("GrowingLayer", False),
        ("GrowingLayer", True),
        ("LengthLayer", False),
    ]


def test_num_bytes_counts_the_buffers_as_allocated() -> None:
    cache = SpanCache(tiny_config(), Span(1, 3))
    assert cache.num_bytes() == 0
    fill(cache, Random(0), 2, 65)
    assert cache.num_bytes() == 2 * 2 * (2 * HEADS * 128 * SIZE) * 4
    cache.crop(1)
    assert cache.num_bytes() == 2 * 2 * (2 * HEADS * 128 * SIZE) * 4
    cache.select(torch.tensor([1]))
    assert cache.num_bytes() == 2 * 2 * (1 * HEADS * 128 * SIZE) * 4
    cache.crop(0)
    assert cache.num_bytes() == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_crop_and_select_change_every_held_layer(family: str) -> None:
    cache = SpanCache(tiny_config(family), Span(1, 3))
    fill(cache, Random(0), 3, 20)
    before = [layer.keys.clone() for layer in held(cache)]
    cache.crop(9)
    cache.select(torch.tensor([2, 0]))
    assert cache.length == 9
    for layer, keys in zip(held(cache), before, strict=True):
        assert layer.get_seq_length() == 9
        assert torch.equal(layer.keys, keys[[2, 0], :, :9])


def test_crop_to_no_less_than_the_length_changes_nothing() -> None:
    cache = SpanCache(tiny_config(), Span(0, 4))
    fill(cache, Random(0), 1, 5)
    cache.crop(5)
    cache.crop(50)
    assert cache.length == 5
    assert {layer.get_seq_length() for layer in held(cache)} == {5}


def test_crop_to_nothing_takes_another_batch_size() -> None:
    cache = SpanCache(tiny_config("gemma2"), Span(0, 4))
    fill(cache, Random(0), 3, 20)
    cache.crop(0)
    fill(cache, Random(0), 2, 4)
    assert {tuple(layer.keys.shape[:3:2]) for layer in held(cache)} == {(2, 4)}


def test_use_of_some_held_blocks_leaves_the_others_as_lengths() -> None:
    cache = SpanCache(tiny_config("gemma2"), Span(0, 4))
    cache.use(Span(2, 4))
    assert kinds(cache)[:2] == [("LengthLayer", True), ("LengthLayer", False)]
    fill(cache, Random(0), 1, 7)
    assert [cache.cache.get_seq_length(index) for index in range(NUM_BLOCKS)] == [7] * NUM_BLOCKS
    cache.use(Span(2, 4))
    cache.crop(3)
    assert cache.length == 3


@pytest.mark.parametrize(("first", "second"), [("2:4", "0:4"), ("2:4", "1:2"), ("0:4", "2:4")])
def test_use_of_other_blocks_later_is_refused(first: str, second: str) -> None:
    cache = SpanCache(tiny_config(), Span(0, 4))
    cache.use(Span.parse(first))
    fill(cache, Random(0), 1, 7)
    with pytest.raises(ValueError, match=rf"^the KV cache holds blocks .*, got {second}$"):
        cache.use(Span.parse(second))


def test_use_of_blocks_that_are_not_held_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the KV cache holds blocks \[1, 2\], got 2:4$"):
        SpanCache(tiny_config(), Span(1, 3)).use(Span(2, 4))


# Kinds of layers that are not carried


def test_default_dynamic_layers_are_carried() -> None:
    for layer in [*DynamicCache(config=tiny_config("gemma2")).layers, DynamicLayer()]:
        check_layer(layer)


@pytest.mark.parametrize("span", ["0:1", "0:4", "3:4"])
def test_state_space_layers_are_refused_held_or_not(span: str) -> None:
    with pytest.raises(UnsupportedCallError, match=r"^KV cache layers of kind LinearAttentionLayer are not carried; "):
        SpanCache(tiny_config("mamba"), Span.parse(span))


class LossyLayer(DynamicLayer):
    """As transformers' quantized layers, which need packages that are not installed."""

    is_croppable = False


@pytest.mark.parametrize("kind", ["StaticLayer", "LossyLayer"])
def test_static_and_quantized_layers_are_refused(kind: str) -> None:
    lossy: Any = LossyLayer
    layer = lossy() if kind == "LossyLayer" else StaticCache(config=tiny_config(), max_cache_len=8).layers[0]
    with pytest.raises(UnsupportedCallError, match=rf"^KV cache layers of kind {kind} are not carried; "):
        check_layer(layer)
