from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from remote_modules.model.kv import SpanCache
from remote_modules.model.replay import OwnerArguments
from remote_modules.server.engine import PROBE_SECONDS, Engine, apply_op, attention_of_any_length
from remote_modules.server.sessions import KVCost
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp

from .tiny import HIDDEN_SIZE, NUM_BLOCKS, TOKEN_BYTES, LocalModel, given, hidden, owner_call

SPANS = [Span(0, 4), Span(0, 1), Span(1, 3), Span(2, 4)]
WHOLE = Span(0, NUM_BLOCKS)
every_span = pytest.mark.parametrize("span", SPANS, ids=str)


def step(
    engine: Engine,
    cache: SpanCache,
    inputs: torch.Tensor,
    *,
    span: Span,
    ops: tuple[CacheOp, ...] = (),
    arguments: OwnerArguments | None = None,
    **tensors: Any,
) -> torch.Tensor:
    request = given(inputs, indices=tensors)
    return engine.step(cache, span, ops, request, arguments or owner_call(inputs))["hidden_states"]


def forward(engine: Engine, span: Span, inputs: torch.Tensor, **changes: Any) -> torch.Tensor:
    return engine.forward(span, given(inputs), owner_call(inputs, **changes))["hidden_states"]


def backward(engine: Engine, span: Span, inputs: torch.Tensor, grad: torch.Tensor, **changes: Any) -> torch.Tensor:
    request = given(inputs, grads={"hidden_states": grad})
    return engine.backward(span, request, owner_call(inputs, **changes))["grad.hidden_states"]


def prefilled(engine: Engine, inputs: torch.Tensor, span: Span = WHOLE) -> SpanCache:
    """A cache that has seen ``inputs``."""
    cache = engine.new_cache()
    step(engine, cache, inputs, span=span)
    return cache


# -------------------------------------------------------------------------------- equal to the local model


@every_span
def test_prefill_and_decode_equal_the_local_model(whole_engine: Engine, local: LocalModel, span: Span) -> None:
    cache, local_cache = whole_engine.new_cache(), local.new_cache()
    for number, num_tokens in enumerate((5, 1, 1, 70, 1)):
        passed = local.run(hidden(2, num_tokens, seed=number), local_cache)
        output = step(whole_engine, cache, passed.inputs[span.start], span=span)
        assert torch.equal(output, passed.outputs[span.end - 1])
    assert cache.length == 78


@every_span
def test_forward_equals_the_local_model(whole_engine: Engine, local: LocalModel, span: Span) -> None:
    passed = local.run(hidden(2, 6))
    output = forward(whole_engine, span, passed.inputs[span.start], use_cache=False)
    assert torch.equal(output, passed.outputs[span.end - 1])
    assert not output.requires_grad


@every_span
def test_backward_equals_the_local_model(whole_engine: Engine, local: LocalModel, span: Span) -> None:
    passed = local.run(hidden(2, 6), leaf_block=span.start)
    leaf, output, grad_output = passed.inputs[span.start], passed.outputs[span.end - 1], hidden(2, 6, seed=9)
    (expected,) = torch.autograd.grad(output, leaf, grad_output)
    assert torch.equal(backward(whole_engine, span, leaf.detach(), grad_output, use_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_padding_and_positions_equal_the_local_model(
    whole_engine: Engine, local: LocalModel, dtype: torch.dtype
) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).to(dtype)
    position_ids = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    sides: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
    passed = local.run(hidden(2, 5), **sides)
    output = forward(whole_engine, Span(0, 4), passed.inputs[0], use_cache=False, **sides)
    assert torch.equal(output, passed.outputs[3])
    arguments = owner_call(passed.inputs[0], **sides)
    cached = step(whole_engine, whole_engine.new_cache(), passed.inputs[0], span=Span(0, 4), arguments=arguments)
    assert torch.equal(cached, passed.outputs[3])


def test_peer_of_part_of_the_model_equals_the_local_model(engine: Engine, local: LocalModel) -> None:
    passed = local.run(hidden(1, 4), local.new_cache())
    output = step(engine, engine.new_cache(), passed.inputs[1], span=Span(1, 3))
    assert torch.equal(output, passed.outputs[2])
    assert (engine.hidden_size, engine.model.span) == (HIDDEN_SIZE, Span(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_output_has_the_dtype_of_the_input(engine: Engine, dtype: torch.dtype) -> None:
    inputs = hidden(1, 2).to(dtype)
    exact = forward(engine, Span(1, 3), inputs.float())
    assert torch.equal(forward(engine, Span(1, 3), inputs), exact.to(dtype))
    assert step(engine, engine.new_cache(), inputs, span=Span(1, 3)).dtype is dtype
    assert backward(engine, Span(1, 3), inputs, inputs).dtype is dtype


def test_autocast_of_the_caller_is_applied(engine: Engine, local: LocalModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        passed = local.run(hidden(1, 3))
    output = forward(engine, Span(1, 3), passed.inputs[1], use_cache=False, autocast=torch.bfloat16)
    assert torch.equal(output, passed.outputs[2].to(output.dtype))
    assert not torch.equal(output, forward(engine, Span(1, 3), passed.inputs[1], use_cache=False))


def test_not_finite_states_pass_through(engine: Engine) -> None:
    inputs = hidden(2, 3)
    inputs[0, 1, 0] = float("nan")
    output = forward(engine, Span(1, 3), inputs)
    assert output[0, 1].isnan().all()
    assert torch.equal(output[1:], forward(engine, Span(1, 3), hidden(2, 3))[1:])


# -------------------------------------------------------------------------------- cache operations


def local_cache_of(local: LocalModel, seen: torch.Tensor) -> DynamicCache:
    cache = local.new_cache()
    local.run(seen, cache)
    return cache


@pytest.mark.parametrize("length", [1, 3, 6])
def test_crop_leaves_the_first_tokens(whole_engine: Engine, local: LocalModel, length: int) -> None:
    cache, local_cache = prefilled(whole_engine, hidden(2, 6)), local_cache_of(local, hidden(2, 6))
    local_cache.crop(length - 6)
    for num_tokens, ops in ((1, (CacheOp("crop", length=length),)), (2, ())):
        new = hidden(2, num_tokens, seed=num_tokens)
        output = step(whole_engine, cache, new, span=Span(0, 4), ops=ops)
        assert torch.equal(output, local.run(new, local_cache).outputs[3])
    assert cache.length == length + 3


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [1], [0, 0, 0, 1, 1, 1]], ids=str)
def test_select_changes_the_rows(whole_engine: Engine, local: LocalModel, rows: list[int]) -> None:
    cache, local_cache = prefilled(whole_engine, hidden(2, 6)), local_cache_of(local, hidden(2, 6))
    local_cache.batch_select_indices(torch.tensor(rows))
    new = hidden(len(rows), 1, seed=1)
    ops = (CacheOp("select", tensor="rows"),)
    output = step(whole_engine, cache, new, span=Span(0, 4), ops=ops, rows=torch.tensor(rows))
    assert torch.equal(output, local.run(new, local_cache).outputs[3])


@pytest.mark.parametrize("op", [CacheOp("reset"), CacheOp("crop")], ids=["reset", "crop-to-0"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_forgetting_all_takes_another_batch_size(
    whole_engine: Engine, local: LocalModel, op: CacheOp, rows: int
) -> None:
    cache = prefilled(whole_engine, hidden(2, 6))
    new = hidden(rows, 3, seed=1)
    output = step(whole_engine, cache, new, span=Span(0, 4), ops=(op,))
    assert torch.equal(output, local.run(new, local.new_cache()).outputs[3])
    assert cache.length == 3


def test_operations_are_applied_in_order(whole_engine: Engine, local: LocalModel) -> None:
    cache, local_cache = prefilled(whole_engine, hidden(2, 6)), local_cache_of(local, hidden(2, 6))
    indices: dict[str, Any] = {"repeat": torch.tensor([1, 1, 0, 0]), "some": torch.tensor([3, 0, 1])}
    local_cache.batch_select_indices(torch.tensor([0, 1, 1]))
    local_cache.crop(-2)
    new = hidden(3, 2, seed=1)
    ops = (CacheOp("select", tensor="repeat"), CacheOp("crop", length=4), CacheOp("select", tensor="some"))
    output = step(whole_engine, cache, new, span=Span(0, 4), ops=ops, **indices)
    assert torch.equal(output, local.run(new, local_cache).outputs[3])


def test_operations_on_an_empty_cache_change_nothing(engine: Engine) -> None:
    cache = engine.new_cache()
    for op in (CacheOp("reset"), CacheOp("crop"), CacheOp("select", tensor="rows")):
        apply_op(cache, op, {"rows": torch.tensor([7])})
    assert (cache.length, cache.num_bytes()) == (0, 0)


# -------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", ["engine", "whole_engine"])
def test_bytes_of_a_token_are_measured(request: pytest.FixtureRequest, name: str) -> None:
    measured: Engine = request.getfixturevalue(name)
    assert measured.kv_costs() == dict.fromkeys(measured.model.span, KVCost(0, TOKEN_BYTES))


def test_cache_takes_the_bytes_that_the_budget_counts(engine: Engine) -> None:
    cache = engine.new_cache()
    step(engine, cache, hidden(3, 65), span=Span(1, 3))
    assert cache.num_bytes() == 3 * 128 * 2 * TOKEN_BYTES


def test_speeds_count_tokens_through_one_block(engine: Engine) -> None:
    ticks = itertools.count(step=PROBE_SECONDS / 4)
    speeds = engine.measure(clock=lambda: next(ticks))
    calls_per_s = 3 / PROBE_SECONDS
    assert speeds.prefill_tokens_per_s == pytest.approx(calls_per_s * 64 * 2, rel=0.5)
    assert speeds.decode_tokens_per_s == pytest.approx(calls_per_s * 2, rel=0.5)


@pytest.mark.parametrize(("device", "is_kept_out"), [("cuda", True), ("cpu", False)])
def test_attention_that_plans_for_each_length_is_kept_out_of_steps(device: str, *, is_kept_out: bool) -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with attention_of_any_length(torch.device(device)):
        assert torch.backends.cuda.cudnn_sdp_enabled() is not is_kept_out
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
