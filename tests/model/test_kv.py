from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, tiny_config
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.classes import model_class
from remote_modules.model.kv import MIN_CAPACITY_TOKENS, GrowingLayer, SpanCache, grown_capacity, is_croppable
from remote_modules.model.probe import probe_stack
from remote_modules.model.stack import cache_argument
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


# The cache of a span


def span_cache(family: str, span: str) -> SpanCache:
    cls, config = model_class(tiny_config(family))
    return SpanCache(config, probe_stack(cls, config), Span.parse(span))


def kinds(cache: SpanCache) -> list[tuple[str, bool]]:
    layers: list[Any] = cache.layers
    return [(type(layer).__name__, layer.is_sliding) for layer in layers]


def fill(cache: SpanCache, rng: Random, rows: int, tokens: int) -> None:
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.update(*states(rng, rows, tokens))
    cache.advance(tokens)


def held(cache: SpanCache) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]


def test_span_cache_holds_its_blocks_alone() -> None:
    assert kinds(span_cache("gemma2", "1:3")) == [
        ("LengthLayer", True),
        ("GrowingLayer", False),
        ("GrowingLayer", True),
        ("LengthLayer", False),
    ]


def test_num_bytes_counts_the_buffers_as_allocated() -> None:
    cache = span_cache("llama", "1:3")
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
    cache = span_cache(family, "1:3")
    fill(cache, Random(0), 3, 20)
    before = [layer.keys.clone() for layer in held(cache)]
    cache.crop(9)
    cache.select(torch.tensor([2, 0]))
    assert cache.length == 9
    for layer, keys in zip(held(cache), before, strict=True):
        assert layer.get_seq_length() == 9
        assert torch.equal(layer.keys, keys[[2, 0], :, :9])


def test_crop_to_no_less_than_the_length_changes_nothing() -> None:
    cache = span_cache("llama", "0:4")
    fill(cache, Random(0), 1, 5)
    cache.crop(5)
    cache.crop(50)
    assert cache.length == 5
    assert {layer.get_seq_length() for layer in held(cache)} == {5}


def test_crop_to_nothing_takes_another_batch_size() -> None:
    cache = span_cache("gemma2", "0:4")
    fill(cache, Random(0), 3, 20)
    cache.crop(0)
    fill(cache, Random(0), 2, 4)
    assert {tuple(layer.keys.shape[:3:2]) for layer in held(cache)} == {(2, 4)}


def test_use_of_some_held_blocks_leaves_the_others_as_lengths() -> None:
    cache = span_cache("gemma2", "0:4")
    cache.use(Span(2, 4))
    assert kinds(cache)[:2] == [("LengthLayer", True), ("LengthLayer", False)]
    fill(cache, Random(0), 1, 7)
    assert [cache.layers[index].get_seq_length() for index in range(NUM_BLOCKS)] == [7] * NUM_BLOCKS
    cache.use(Span(2, 4))
    cache.crop(3)
    assert cache.length == 3


@pytest.mark.parametrize(("first", "second"), [("2:4", "0:4"), ("2:4", "1:2"), ("0:4", "2:4")])
def test_use_of_other_blocks_later_is_refused(first: str, second: str) -> None:
    cache = span_cache("llama", "0:4")
    cache.use(Span.parse(first))
    fill(cache, Random(0), 1, 7)
    with pytest.raises(ValueError, match=rf"^the KV cache holds blocks .*, got {second}$"):
        cache.use(Span.parse(second))


def test_use_of_blocks_that_are_not_held_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the KV cache holds blocks 1:3, got 2:4$"):
        span_cache("llama", "1:3").use(Span(2, 4))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mamba", [("LengthLinearLayer", None), ("LinearAttentionLayer", None)] * 2),
        ("bloom", [("LengthLayer", False), ("GrowingLayer", False)] * 2),
    ],
)
def test_kind_of_a_layer_that_is_elsewhere_is_that_of_its_block(family: str, expected: list[tuple[str, Any]]) -> None:
    layers = [span_cache(family, f"{block}:{block + 1}").layers for block in (1, 3)]
    found = [layers[0][0], layers[0][1], layers[1][2], layers[1][3]]
    assert [(type(layer).__name__, getattr(layer, "is_sliding", None)) for layer in found] == expected


def test_cache_of_a_decoder_with_cross_attention_is_a_pair() -> None:
    cls, config = model_class(tiny_config("bert"))
    stack = replace(probe_stack(cls, config), cache_class=EncoderDecoderCache)
    cache = SpanCache(config, stack, Span(1, 3))
    argument = cache.argument
    assert isinstance(argument, EncoderDecoderCache)
    assert list(argument.self_attention_cache.layers) == cache.layers


def test_blocks_that_share_keys_of_earlier_ones_have_no_layers() -> None:
    cls, config = model_class(tiny_config("gemma3n_text", num_kv_shared_layers=2))
    stack = probe_stack(cls, config)
    assert stack.layers_of(Span(2, 4)) == ()
    cache = SpanCache(config, stack, Span(0, 4))
    assert [type(layer).__name__ for layer in cache.layers[:2]] == ["GrowingLayer"] * 2
    fill(cache, Random(0), 1, 3)
    assert cache.num_bytes() == cache.num_bytes(Span(0, 2))
    assert cache.num_bytes(Span(2, 4)) == 0


# States that cannot go back


def prefilled(family: str) -> tuple[Any, SpanCache]:
    """A local model with its blocks' cache in the place of its own, after five tokens of two rows."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    cache = span_cache(family, f"0:{NUM_BLOCKS}")
    step(model, cache, torch.tensor([[7, 8, 9, 10, 11], [5, 6, 7, 8, 9]]))
    return model, cache


def step(model: Any, cache: SpanCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=True, **{str(cache_argument(model)): cache.argument}).logits
    cache.advance(ids.shape[1])
    return logits


def test_state_can_be_dropped_whole_but_not_in_part() -> None:
    model, cache = prefilled("mamba")
    assert cache.num_bytes() > 0
    with pytest.raises(UnsupportedCallError, match=r"^the cache of 'mamba' models cannot be cropped$"):
        cache.crop(3)
    assert cache.length == 5
    cache.crop(5)
    cache.crop(0)
    assert (cache.length, cache.num_bytes()) == (0, 0)
    again = step(model, cache, torch.tensor([[7, 8, 9]]))
    assert torch.equal(again, step(model, span_cache("mamba", "0:4"), torch.tensor([[7, 8, 9]])))


def test_rows_of_states_are_selected_as_those_of_keys_are() -> None:
    _, cache = prefilled("mamba")
    before = [[tensor.clone() for tensor in tensors_of(vars(layer))] for layer in cache.layers]
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    for layer, tensors in zip(cache.layers, before, strict=True):
        assert tensors
        for now, was in zip(tensors_of(vars(layer)), tensors, strict=True):
            assert torch.equal(now, was[rows])


def tensors_of(values: dict[Any, Any]) -> list[torch.Tensor]:
    found = [value for value in values.values() if isinstance(value, torch.Tensor)]
    return found + [tensor for value in values.values() if isinstance(value, dict) for tensor in tensors_of(value)]


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gemma2", True), ("mamba", False)])
def test_cache_of_attention_alone_is_croppable(family: str, expected: bool) -> None:
    assert is_croppable(DynamicCache(config=tiny_config(family))) is expected
