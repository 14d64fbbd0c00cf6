"""A cache that was copied goes on as the original does, to the last bit, for every kind of cache."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import model_class
from remote_modules.model.kv import GrowingLayer, SpanCache
from remote_modules.model.kv_state import CacheForm, CacheImport
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.probe import probe_stack
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.server.engine import Engine
from remote_modules.spans import Span

GROWING = (
    "llama",
    "gemma2",
    "gemma3_text",
    "deepseek_v3",
    "gpt2",
    "mixtral",
    "bloom",
    "gpt_oss",
    "llama4_text",
    "bert",
)
HYBRID = ("mamba2", "zamba2", "qwen3_next", "gemma3n_text", "minimax", "glm_moe_dsa", "lfm2", "bamba")
LENGTH, ROWS = 13, 3


@functools.cache
def engine_of(model_type: str) -> Engine:
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(tiny_config(model_type)).save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        cls, config = model_class(read_config(checkpoint))
        stack = probe_stack(cls, config)
        span = Span(0, stack.num_blocks)
        model, _ = load_span(checkpoint, config, cls, span)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # off the file, which is deleted
    return Engine(SpanModel(model, stack, span))


def run(engine: Engine, cache: SpanCache, blocks: Span, num_tokens: int, seed: int, rows: int = ROWS) -> Any:
    """Random inputs; hidden states that leave the blocks."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in engine._probe_inputs(num_tokens, engine._sizes[0], blocks, rows).items()
    }
    with torch.inference_mode():
        arguments = OwnerArguments(rows=rows, num_tokens=num_tokens)
        return engine.model.run(inputs, blocks, arguments, cache)["hidden_states"]


def copied(form: CacheForm, source: SpanCache, target: SpanCache, blocks: Span, *, first: int = 0) -> SpanCache:
    """By block, and in two parts of the tokens where all of the cache grows."""
    last = source.length
    with torch.inference_mode():
        taken = CacheImport(form, target, ROWS, last)
        taken.add(form.read(source, None, 0, last), None, 0, last)
        for block in blocks:
            part = Span(block, block + 1)
            grows = all(isinstance(source.layers[i], GrowingLayer) for i in source.held_layers(part))
            middle = (first + last) // 2 if grows and not source.linear else first
            for start, end in ((first, middle), (middle, last)):
                if start < end:
                    taken.add(form.read(source, part, start, end), part, start, end)
        taken.finish()
    return target


# Caches of the oldest release keep counters of their own, or cannot be carried at all: sessions are built by replay.
REPLAYED_WITH_5_5 = ("mamba2", "zamba2", "qwen3_next", "glm_moe_dsa", "bamba")


@pytest.mark.parametrize("model_type", [*GROWING, *HYBRID])
def test_copy_goes_on_as_the_original(model_type: str) -> None:
    engine = engine_of(model_type)
    if transformers.__version__.startswith("5.5.") and model_type in REPLAYED_WITH_5_5:
        with pytest.raises(UnsupportedCallError, match=r"cannot be copied|are not carried"):
            engine.cache_form(engine.model.span)
        return
    count = engine.model.stack.num_blocks
    cuts = sorted((engine.model.stack.cuts or frozenset(range(count + 1))) - {0, count})
    for blocks in [Span(0, count), *(Span(cut, count) for cut in cuts[:1])]:
        form = engine.cache_form(blocks)
        source, target = engine.new_cache(), engine.new_cache()
        target.use(blocks)
        run(engine, source, blocks, LENGTH, 1)
        run(engine, source, blocks, 1, 2)
        with torch.inference_mode():
            source.select(torch.tensor([2, 0, 0]))
        copied(form, source, target, blocks)
        assert target.length == source.length == LENGTH + 1
        assert target.num_bytes() > 0
        for number, num_tokens in enumerate((1, 1, 5)):
            outputs = [run(engine, cache, blocks, num_tokens, 10 + number) for cache in (source, target)]
            assert torch.equal(*outputs), f"{blocks}: {(outputs[0] - outputs[1]).abs().max()}"
            order = torch.tensor([1, 2, 0])
            with torch.inference_mode():
                source.select(order)
                target.select(order)


@pytest.mark.parametrize("model_type", GROWING)
def test_tail_is_added_to_an_older_copy(model_type: str) -> None:
    engine = engine_of(model_type)
    blocks = engine.model.span
    form = engine.cache_form(blocks)
    source, target = engine.new_cache(), engine.new_cache()
    target.use(blocks)
    run(engine, source, blocks, LENGTH, 1)
    copied(form, source, target, blocks)
    run(engine, source, blocks, 70, 2)  # more than the buffers of the copy hold
    copied(form, source, target, blocks, first=LENGTH)
    assert target.length == LENGTH + 70
    with torch.inference_mode():
        for cache in (source, target):
            cache.crop(LENGTH + 30)
    assert torch.equal(*(run(engine, cache, blocks, 2, 5) for cache in (source, target)))
