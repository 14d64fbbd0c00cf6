"""Spans against the whole local model: the difference is 0.0, not small."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from tiny_models import NUM_BLOCKS, WORKING, load_whole, save_tiny
from torch import nn
from transformers import PreTrainedModel

from model.support import Trace, opened, run_span, span_model, stack_of
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import Adapter
from remote_modules.model.kv import SpanCache
from remote_modules.model.loading import load_client_part
from remote_modules.model.replay import SpanModel
from remote_modules.model.shadow import is_shadow
from remote_modules.model.stack import cache_argument
from remote_modules.spans import Span

Parts: TypeAlias = tuple[SpanModel, SpanModel]
Caches: TypeAlias = tuple[SpanCache | None, SpanCache | None]

ROWS, TOKENS = 2, 12
CHUNKS = {"prefill": [TOKENS], "chunked": [4, 1, 3, 4], "decode": [3] + [1] * (TOKENS - 3)}
# Not all releases take several tokens at once where a state is kept.
WAYS = [(family, way) for family in WORKING for way in CHUNKS if (family, way) != ("mamba", "chunked")]
ATTENTIVE = [family for family in WORKING if family != "mamba"]  # without states of linear attention


@dataclass(frozen=True)
class Whole:
    """A local model, what its blocks saw last, and the same cut in two at each place."""

    family: str
    folder: Path
    model: PreTrainedModel
    trace: Trace

    @cached_property
    def cuts(self) -> list[Parts]:
        return [
            (span_model(self.folder, f"0:{cut}"), span_model(self.folder, f"{cut}:{NUM_BLOCKS}"))
            for cut in range(1, NUM_BLOCKS)
        ]

    @cached_property
    def takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(stack_of(self.model).owner(self.model).forward).parameters

    def __call__(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(input_ids=ids, **kwargs)

    def step(self, ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> Any:
        """Run new tokens on top of ``cache``, and return it."""
        name = cache_argument(self.model)
        assert name is not None
        known = {} if cache is None else {name: cache}
        return getattr(self(ids, use_cache=True, **known, **kwargs), name)

    def check(self, parts: Parts, caches: Caches = (None, None), **changes: Any) -> None:
        """Run both spans on what entered block 0 of the latest call, and compare at the cut and at the end."""
        carried, arguments = self.trace.carried(0), self.trace.arguments(**changes)
        with torch.inference_mode():
            for part, cache in zip(parts, caches, strict=True):
                carried = part.run({**carried, **self.trace.sides(part.span)}, part.span, arguments, cache)
                expected = self.trace.carried(part.span.end)
                assert carried.keys() == expected.keys()
                assert all(torch.equal(carried[name], expected[name]) for name in expected), part.span


def make_whole(folder: Path, family: str, **changes: Any) -> Whole:
    save_tiny(folder, family, **changes)
    model = load_whole(folder)
    return Whole(family, folder, model, Trace(model))


@pytest.fixture(scope="module", params=WORKING)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole(tmp_path_factory.mktemp("llama"), "llama")


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def left_padding() -> tuple[torch.Tensor, torch.Tensor]:
    """A mask with three pads in row 0, and the positions that `generate` makes of it."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[0, :3] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


# Every family, every cut


@pytest.mark.parametrize(("whole", "chunks"), WAYS, ids=map("-".join, WAYS), indirect=["whole"])
def test_two_spans_with_cache_equal_the_whole(whole: Whole, chunks: str) -> None:
    ids = token_ids()
    caches = [(first.new_cache(), second.new_cache()) for first, second in whole.cuts]
    past = None
    start = 0
    for length in CHUNKS[chunks]:
        past = whole.step(ids[:, start : start + length], past)
        for parts, pair in zip(whole.cuts, caches, strict=True):
            whole.check(parts, pair)
        start += length
    assert all(cache.length == TOKENS for pair in caches for cache in pair)


@pytest.mark.parametrize("use_cache", [False, True])
def test_two_spans_with_left_padding_equal_the_whole(whole: Whole, use_cache: bool) -> None:
    mask, positions = left_padding()
    known: dict[str, Any] = {"position_ids": positions} if whole.takes_positions else {}
    whole(token_ids(), attention_mask=mask, use_cache=use_cache, **known)
    for parts in whole.cuts:
        whole.check(parts)


@pytest.mark.parametrize("whole", ATTENTIVE, indirect=True)
def test_two_spans_decode_with_left_padding_equal_the_whole(whole: Whole) -> None:
    ids = token_ids()
    mask, positions = left_padding()
    caches = [(first.new_cache(), second.new_cache()) for first, second in whole.cuts]
    past = None
    for start, end in [(0, 6), (6, 7), (7, 10), (10, 11)]:
        known = {"position_ids": positions[:, start:end]} if whole.takes_positions else {}
        sides: dict[str, Any] = {"attention_mask": mask[:, :end], **known}
        past = whole.step(ids[:, start:end], past, **sides)
        for parts, pair in zip(whole.cuts, caches, strict=True):
            whole.check(parts, pair)


@pytest.mark.parametrize("whole", ATTENTIVE, indirect=True)
def test_rollback_then_other_tokens_equal_the_whole_without_them(whole: Whole) -> None:
    ids, others = token_ids(), token_ids(1)
    caches = [(first.new_cache(), second.new_cache()) for first, second in whole.cuts]
    past = whole.step(ids[:, :4])
    for parts, pair in zip(whole.cuts, caches, strict=True):
        whole.check(parts, pair)
    whole.step(ids[:, 4:], copy.deepcopy(past))  # longer than any window
    for parts, pair in zip(whole.cuts, caches, strict=True):
        whole.check(parts, pair)
        for cache in pair:
            cache.crop(4)
    whole.step(others[:, 4:7], past)
    for parts, pair in zip(whole.cuts, caches, strict=True):
        whole.check(parts, pair)


def test_rows_selected_continue_as_their_own_sequences(whole: Whole) -> None:
    ids, rows = token_ids(), torch.tensor([1, 1, 0])
    caches = [(first.new_cache(), second.new_cache()) for first, second in whole.cuts]
    past = whole.step(ids[:, :8])
    for parts, pair in zip(whole.cuts, caches, strict=True):
        whole.check(parts, pair)
        for cache in pair:
            cache.select(rows)
    past.reorder_cache(rows)
    whole.step(ids[rows, 8:9], past)
    for parts, pair in zip(whole.cuts, caches, strict=True):
        whole.check(parts, pair)


def test_gradient_of_the_input_equals_the_whole(whole: Whole) -> None:
    stack = stack_of(whole.model)
    captured: list[torch.Tensor] = []

    def keep_gradient(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        hidden_states.retain_grad()
        captured.append(hidden_states)

    handle = stack.blocks(whole.model)[0].register_forward_pre_hook(keep_gradient, with_kwargs=True)
    try:
        whole.model(input_ids=token_ids(), use_cache=False)
    finally:
        handle.remove()
    weight = torch.randn(whole.trace[NUM_BLOCKS].shape, generator=torch.Generator().manual_seed(0))
    (whole.trace[NUM_BLOCKS] * weight).sum().backward()
    expected = captured[0].grad
    assert expected is not None
    assert expected.abs().sum() > 0
    arguments = whole.trace.arguments()
    for first, second in whole.cuts:
        entry = captured[0].detach().requires_grad_()
        sides = {name: side.detach() for name, side in whole.trace.sides(Span(0, NUM_BLOCKS)).items()}
        middle = first.run({"hidden_states": entry, **sides}, first.span, arguments)["hidden_states"]
        cut = middle.detach().requires_grad_()  # what a peer gets
        end = second.run({"hidden_states": cut, **sides}, second.span, arguments)["hidden_states"]
        (gradient_at_cut,) = torch.autograd.grad(end, cut, weight)
        (gradient,) = torch.autograd.grad(middle, entry, gradient_at_cut)
        assert torch.equal(gradient, expected), first.span


# Sub-spans, dtypes and modes, on one family


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("blocks", ["0:1", "1:3", "2:4", "3:4", "0:4"])
def test_part_of_a_held_span_equals_the_whole(family: str, blocks: str, tmp_path: Path) -> None:
    whole = make_whole(tmp_path, family)
    held, span = span_model(tmp_path, "0:4"), Span.parse(blocks)
    cache, past, ids = held.new_cache(), None, token_ids()
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 11)]:
        past = whole.step(ids[:, start:end], past)
        with torch.inference_mode():
            output = run_span(held, whole.trace[span.start], span, cache)
        assert torch.equal(output, whole.trace[span.end])
    cache.crop(2)
    past = whole.step(ids[:, :2])
    whole.step(ids[:, 2:3], past)
    with torch.inference_mode():
        output = run_span(held, whole.trace[span.start], span, cache)
    assert torch.equal(output, whole.trace[span.end])


def test_sessions_on_other_parts_of_one_span_do_not_disturb_each_other(llama: Whole) -> None:
    held = span_model(llama.folder, "0:4")
    first, second = held.new_cache(), held.new_cache()
    past, ids = None, token_ids()
    for start, end in [(0, 4), (4, 5), (5, 9)]:
        past = llama.step(ids[:, start:end], past)
        with torch.inference_mode():
            for cache, span in [(first, Span(0, 2)), (second, Span(2, 4))]:
                output = run_span(held, llama.trace[span.start], span, cache)
                assert torch.equal(output, llama.trace[span.end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_caller_is_that_of_the_span(llama: Whole, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        llama(token_ids(), use_cache=False)
    for parts in [(span_model(llama.folder, "0:2"), span_model(llama.folder, "2:4"))]:
        llama.check(parts, autocast=dtype)
    with pytest.raises(AssertionError):
        llama.check(parts)


def test_bfloat16_model_takes_and_gives_its_own_dtype(tmp_path: Path) -> None:
    whole = make_whole(tmp_path, "llama", dtype="bfloat16")
    whole(token_ids(), use_cache=False)
    part = span_model(tmp_path, "0:4")
    output = run_span(part, whole.trace[0].to(torch.float32), use_cache=False)
    assert (part.dtype, output.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(output, whole.trace[NUM_BLOCKS])


def test_positions_that_restart_are_packed_sequences(llama: Whole) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]).expand(ROWS, -1)
    llama(token_ids(), position_ids=positions, use_cache=False)
    part = span_model(llama.folder, "0:4")
    output = run_span(part, llama.trace[0], position_ids=positions, use_cache=False)
    assert torch.equal(output, llama.trace[NUM_BLOCKS])


def test_one_row_of_positions_serves_all(llama: Whole) -> None:
    positions = torch.arange(5, 5 + TOKENS)[None]
    llama(token_ids(), position_ids=positions, use_cache=False)
    part = span_model(llama.folder, "0:4")
    output = run_span(part, llama.trace[0], position_ids=positions, use_cache=False)
    assert torch.equal(output, llama.trace[NUM_BLOCKS])


def test_dropout_of_a_row_is_the_same_alone_as_in_its_batch(llama: Whole) -> None:
    llama(token_ids())
    part, carried = llama.cuts[0][0], llama.trace.carried(0)
    hidden = carried["hidden_states"]
    rows, _, size = hidden.shape
    draw = torch.Generator().manual_seed(2)
    tensors = [torch.randn(2, size, generator=draw), torch.randn(size, 2, generator=draw)]
    adapter = Adapter((Lora(0, "self_attn.q_proj", 1.0, dropout=0.5),), tuple(tensors))
    arguments = llama.trace.arguments(adapter=adapter, seed=5)
    with torch.inference_mode():
        together = part.run(carried, part.span, arguments)["hidden_states"]
        alone = [
            part.run({"hidden_states": hidden[row : row + 1]}, part.span, replace(arguments, rows=1, first_row=row))
            for row in range(rows)
        ]
        other = part.run({"hidden_states": hidden[1:]}, part.span, replace(arguments, rows=rows - 1))
    torch.testing.assert_close(torch.cat([one["hidden_states"] for one in alone]), together, rtol=1e-4, atol=1e-4)
    assert (other["hidden_states"] - together[1:]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "ctrl", "gemma2", "bloom", "mamba"])
def test_input_is_left_as_it_was(family: str, tmp_path: Path) -> None:
    part = span_model(save_tiny(tmp_path, family), "0:2")
    hidden_states = torch.randn(1, 3, 32)
    before = hidden_states.clone()
    run_span(part, hidden_states)
    assert torch.equal(hidden_states, before)


# Failures


class Broken(nn.Module):
    def forward(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("broken block")


def test_failure_in_a_block_leaves_the_span_usable(llama: Whole) -> None:
    llama(token_ids(), use_cache=False)
    part = span_model(llama.folder, "0:4")
    slot: Any = part._owner.get_submodule("layers.2")
    block, slot.block = slot.block, Broken()
    with pytest.raises(RuntimeError, match=r"^broken block$"):
        run_span(part, llama.trace[0], use_cache=False)
    assert part._current.entry is None
    output = run_span(part, llama.trace[0], Span(0, 2), use_cache=False)
    assert torch.equal(output, llama.trace[2])
    slot.block = block
    output = run_span(part, llama.trace[0], use_cache=False)
    assert torch.equal(output, llama.trace[NUM_BLOCKS])


def test_failure_in_the_owner_leaves_the_span_usable(llama: Whole) -> None:
    llama(token_ids(), use_cache=False)
    part = span_model(llama.folder, "1:3")
    wrong: dict[str, Any] = {
        "attention_mask": torch.ones(5, TOKENS),
        "position_ids": torch.zeros(1, 99, dtype=torch.int64),
    }
    with pytest.raises((RuntimeError, UnsupportedCallError)):
        run_span(part, llama.trace[1], **wrong)
    assert part._current.entry is None
    output = run_span(part, llama.trace[1], use_cache=False)
    assert torch.equal(output, llama.trace[3])


def test_cache_of_other_blocks_is_refused_before_anything_runs(llama: Whole) -> None:
    part = span_model(llama.folder, "0:4")
    cache = part.new_cache()
    run_span(part, torch.zeros(1, 3, 32), Span(0, 2), cache)
    with pytest.raises(ValueError, match=r"^the KV cache holds blocks 0:2, got 1:3$"):
        run_span(part, torch.zeros(1, 3, 32), Span(1, 3), cache)
    assert cache.length == 3


def test_cache_that_is_not_carried_is_refused_with_its_reason(llama: Whole) -> None:
    part = span_model(llama.folder, "1:3")
    part.stack = replace(part.stack, no_cache="it has none")
    with pytest.raises(
        UnsupportedCallError,
        match=r"^KV caches of 'llama' models are not carried \(it has none\); use use_cache=False$",
    ):
        part.new_cache()


def test_span_between_cuts_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma3n_text", num_kv_shared_layers=2)
    with pytest.raises(UnsupportedCallError, match=r"^blocks 2:4 cannot be served apart: .* at 0, 4$"):
        span_model(tmp_path, "2:4")


def test_block_that_returns_something_else_is_refused(llama: Whole) -> None:
    part = span_model(llama.folder, "0:2")
    slot: Any = part._owner.get_submodule("layers.1")
    slot.block = Pair()
    with pytest.raises(UnsupportedCallError, match=r"^a block returned a tuple, expected one tensor$"):
        run_span(part, torch.zeros(1, 3, 32))


class Pair(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, hidden_states


# Recording


def test_hidden_states_of_each_block_are_returned_when_asked_for(whole: Whole) -> None:
    whole(token_ids(), use_cache=False)
    first, _ = whole.cuts[2]
    inputs = {**whole.trace.carried(0), **whole.trace.sides(first.span)}
    with torch.inference_mode():
        outputs = first.run(inputs, first.span, whole.trace.arguments(record=("hidden_states",)))
        again = first.run(inputs, first.span, whole.trace.arguments())
    recorded = {name: tensor for name, tensor in outputs.items() if name.startswith("record.")}
    assert list(recorded) == [f"record.hidden_states.{block}" for block in range(3)]
    for block in range(3):
        assert torch.equal(recorded[f"record.hidden_states.{block}"], whole.trace[block + 1])
    assert not any(name.startswith("record.") for name in again)


# Together


def test_client_part_and_spans_give_the_logits_of_the_whole(whole: Whole) -> None:
    checkpoint, config, cls = opened(whole.folder)
    client, stack = load_client_part(checkpoint, config, cls)
    full = stack_of(client)
    expected = whole(token_ids(), use_cache=False).logits
    first, second = whole.cuts[1]
    arguments, sides = whole.trace.arguments(), whole.trace.sides(Span(0, NUM_BLOCKS))

    def remote(*args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        middle = first.run({"hidden_states": hidden_states, **sides}, first.span, arguments)
        return full.pack(second.run({**middle, **sides}, second.span, arguments))

    def passed_on(*args: Any, **kwargs: Any) -> Any:
        return full.pack({"hidden_states": args[0] if args else kwargs["hidden_states"]})

    blocks: Any = stack.blocks(client)
    assert [is_shadow(block) for block in blocks] == [True] * NUM_BLOCKS
    blocks[0].forward = remote
    for block in blocks[1:]:
        block.forward = passed_on
    client.eval()
    with torch.no_grad():
        logits = client(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(logits, expected)
