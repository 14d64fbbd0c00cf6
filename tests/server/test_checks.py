from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.stack import SideInput, StackSpec
from remote_modules.model.tensors import TensorSpec
from remote_modules.server.checks import RequestTensors, _sorted, check_blocks, check_tensors, refuse
from remote_modules.spans import Span
from remote_modules.wire.messages import (
    BackwardRequest,
    CacheOp,
    CallMeta,
    ForwardRequest,
    Option,
    Request,
    StepRequest,
)

Tensors = dict[str, torch.Tensor]

MAX_BATCH_TOKENS = 16
VOCAB_SIZE = 50
HELD = Span(2, 6)
PLAIN = StackSpec("model.layers", 8)
# All kinds of tensors at once: token ids for all blocks, a tensor for each block, two states of the tuple.
RICH = StackSpec(
    "model.layers",
    8,
    container=tuple,
    arity=3,
    states={1: TensorSpec(("B", "T", "?"), is_float=False), 2: TensorSpec(("B", "T", "1H"))},
    state_keys={1: "prev_topk_indices", 2: "router_state"},
    sides=(
        SideInput("input_ids", False, TensorSpec(("B", "T"), is_float=False)),
        SideInput(1, True, TensorSpec(("B", "T", "?"))),
    ),
    cuts=frozenset({0, 2, 4, 6, 8}),
)


def refusal_of(check: Callable[[], object]) -> tuple[RefusalReason, str]:
    """The reason and the text, which must be one line without a full stop."""
    with pytest.raises(PeerRefused) as caught:
        check()
    text = str(caught.value)
    assert re.fullmatch(r"[^\n]*[^.\n]", text)
    return caught.value.reason, text


def bad_request(check: Callable[[], object]) -> str:
    reason, text = refusal_of(check)
    assert reason is RefusalReason.BAD_REQUEST
    return text


def step(*ops: CacheOp, start: int = 2, end: int = 6) -> StepRequest:
    return StepRequest(1, "s" * 16, 0, start, end, 0, ops, (), 1.0)


def checked(
    tensors: Tensors,
    *,
    kind: str = "step",
    stack: StackSpec = PLAIN,
    blocks: Span = HELD,
    position: int = 0,
    **call: Any,
) -> RequestTensors:
    """The tensors of a request whose call is for the hidden states that came."""
    states = tensors.get("hidden_states", HIDDEN)
    sizes = {"rows": states.shape[0], "num_tokens": states.shape[1]} if states.dim() > 1 else {}
    meta = CallMeta(**{**sizes, **call})
    start, end = blocks.start, blocks.end
    requests: dict[str, Request] = {
        "step": StepRequest(1, "s" * 16, 0, start, end, position, (), (), 1.0, meta),
        "forward": ForwardRequest(1, start, end, (), 1.0, meta),
        "backward": BackwardRequest(1, start, end, (), 1.0, meta),
    }
    return check_tensors(
        tensors,
        requests[kind],
        stack,
        blocks,
        hidden_size=4,
        max_batch_tokens=MAX_BATCH_TOKENS,
        vocab_size=VOCAB_SIZE,
    )


def hidden(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


HIDDEN = hidden(2, 3, 4)

# -------------------------------------------------------------------------------- blocks


def test_refusal_is_a_bad_request_unless_said_otherwise() -> None:
    assert refusal_of(lambda: refuse("no")) == (RefusalReason.BAD_REQUEST, "no")
    assert refusal_of(lambda: refuse("no", RefusalReason.DRAINING)) == (RefusalReason.DRAINING, "no")


@pytest.mark.parametrize(("start", "end"), [(2, 6), (2, 3), (5, 6)])
def test_held_blocks_are_taken(start: int, end: int) -> None:
    requests: list[Request] = [
        step(start=start, end=end),
        ForwardRequest(1, start, end, (), 1.0),
        BackwardRequest(1, start, end, (), 1.0),
    ]
    assert [check_blocks(request, HELD, PLAIN) for request in requests] == [Span(start, end)] * 3


@pytest.mark.parametrize(
    ("start", "end"), [(0, 9), (8, 9), (4096, 4096), (3, 3), (4, 3), (-1, 3), (0, 0)], ids=lambda block: str(block)
)
def test_blocks_outside_the_model_are_a_bad_request(start: int, end: int) -> None:
    text = bad_request(lambda: check_blocks(step(start=start, end=end), HELD, PLAIN))
    assert text == f"span {start}:{end} is outside the model's blocks 0:8"


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 3), (5, 7), (6, 8), (0, 8)])
def test_blocks_of_other_peers_are_not_served(start: int, end: int) -> None:
    assert refusal_of(lambda: check_blocks(step(start=start, end=end), HELD, PLAIN)) == (
        RefusalReason.NOT_SERVED,
        f"blocks {start}:{end} are not served here, this peer holds 2:6",
    )


# -------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_hidden_states_of_every_float_dtype_are_taken(dtype: torch.dtype) -> None:
    states = hidden(2, 3, 4, dtype=dtype)
    assert checked({"hidden_states": states}).inputs == {"hidden_states": states}


@pytest.mark.parametrize("shape", [(16, 1, 4), (1, 16, 4), (4, 4, 4)], ids=str)
def test_largest_batch_is_taken(shape: tuple[int, ...]) -> None:
    checked({"hidden_states": hidden(*shape)})


def test_not_finite_hidden_states_are_taken() -> None:
    checked({"hidden_states": torch.full((1, 1, 4), float("nan"))})


FITTING: dict[str, Tensors] = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2], [5, 6, 2**31 - 1]])},
    "shared-positions": {"position_ids": torch.tensor([[0, 1, 2]])},
    "int-mask": {"attention_mask": torch.ones(2, 3, dtype=torch.int64)},
    "bool-mask": {"attention_mask": torch.ones(2, 30, dtype=torch.bool)},
    "float-mask": {"attention_mask": torch.ones(2, 1)},
    "indices": {"indices.0": torch.tensor([1, 0])},
    "kinds-of-positions": {"position_ids": torch.zeros(8, 2, 3, dtype=torch.int64)},
    "shared-kinds-of-positions": {"position_ids": torch.zeros(3, 1, 3, dtype=torch.int64)},
    "large-mask": {"attention_mask": torch.ones(2, 1, 3, 3, dtype=torch.bfloat16)},
    "shared-large-mask": {"attention_mask": torch.ones(1, 8, 1, 3, dtype=torch.bool)},
    "headless-mask": {"attention_mask": torch.ones(2, 3, 3)},
    "masks": {"attention_mask.full": torch.ones(2, 3, dtype=torch.int64), "attention_mask.linear": torch.ones(0)},
    "owner": {"owner.token_type_ids": torch.zeros(2, 3, dtype=torch.int64), "owner.scale": torch.tensor(0.5)},
}


@pytest.mark.parametrize("others", FITTING.values(), ids=FITTING.keys())
def test_fitting_side_inputs_are_taken(others: Tensors) -> None:
    assert checked({"hidden_states": HIDDEN, **others}).inputs["hidden_states"] is HIDDEN


REFUSED: dict[str, tuple[Tensors, str]] = {
    "missing": ({"grad.x": HIDDEN}, "a step needs a tensor 'hidden_states', got ['grad.x']"),
    "two-dims": ({"hidden_states": hidden(3, 4)}, "hidden states must be [B, T, 4] for 3 x 4 tokens, got [3, 4]"),
    "four-dims": (
        {"hidden_states": hidden(1, 1, 3, 4)},
        "hidden states must be [B, T, 4] for 1 x 1 tokens, got [1, 1, 3, 4]",
    ),
    "scalar": ({"hidden_states": hidden()}, "hidden states must be [B, T, 4] for 0 x 0 tokens, got []"),
    "width": ({"hidden_states": hidden(2, 3, 5)}, "hidden states must be [B, T, 4] for 2 x 3 tokens, got [2, 3, 5]"),
    "no-rows": ({"hidden_states": hidden(0, 3, 4)}, "hidden states must be [B, T, 4] for 0 x 3 tokens, got [0, 3, 4]"),
    "no-tokens": (
        {"hidden_states": hidden(2, 0, 4)},
        "hidden states must be [B, T, 4] for 2 x 0 tokens, got [2, 0, 4]",
    ),
    "int-hidden": (
        {"hidden_states": hidden(2, 3, 4, dtype=torch.int64)},
        "hidden states must be floating point, got torch.int64",
    ),
    "long": (
        {"hidden_states": hidden(1, 17, 4)},
        "a request may hold 16 tokens, got 1 x 17; send smaller ones",
    ),
    "wide": (
        {"hidden_states": hidden(6, 3, 4)},
        "a request may hold 16 tokens, got 6 x 3; send smaller ones",
    ),
    "int32-positions": (
        {"hidden_states": HIDDEN, "position_ids": torch.zeros(2, 3, dtype=torch.int32)},
        "position_ids must be int64 [B, T], got torch.int32 [2, 3]",
    ),
    "flat-positions": (
        {"hidden_states": HIDDEN, "position_ids": torch.arange(3)},
        "position_ids must be int64 [B, T], got torch.int64 [3]",
    ),
    "too-many-positions": (
        {"hidden_states": HIDDEN, "position_ids": torch.zeros(2, 4, dtype=torch.int64)},
        "position_ids must be [2, 3], got [2, 4]",
    ),
    "rows-of-positions": (
        {"hidden_states": HIDDEN, "position_ids": torch.zeros(3, 3, dtype=torch.int64)},
        "position_ids must be [2, 3], got [3, 3]",
    ),
    "negative-position": (
        {"hidden_states": HIDDEN, "position_ids": torch.tensor([[0, -1, 2]])},
        "position_ids must be in 0:2**31",
    ),
    "huge-position": (
        {"hidden_states": HIDDEN, "position_ids": torch.tensor([[0, 1, 2**31]])},
        "position_ids must be in 0:2**31",
    ),
    "flat-mask": (
        {"hidden_states": HIDDEN, "attention_mask": torch.ones(3, dtype=torch.int64)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.int64 [3]",
    ),
    "rows-of-mask": (
        {"hidden_states": HIDDEN, "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.int64 [1, 3]",
    ),
    "half-mask": (
        {"hidden_states": HIDDEN, "attention_mask": torch.ones(2, 3, dtype=torch.float16)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.float16 [2, 3]",
    ),
}


@pytest.mark.parametrize(("tensors", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_do_not_fit_are_refused(tensors: Tensors, text: str) -> None:
    assert bad_request(lambda: checked(tensors)) == text


@pytest.mark.parametrize("count", [1, 3])
def test_adapters_of_more_or_fewer_rows_are_refused(count: int) -> None:
    checked({"hidden_states": HIDDEN}, adapter_rows=b"\0\1")
    text = bad_request(lambda: checked({"hidden_states": HIDDEN}, adapter_rows=bytes(count)))
    assert text == f"adapter_rows must be of 2 rows, got {count}"


@pytest.mark.parametrize("autocast", ["", "bfloat16", "float16"])
def test_autocast_dtype_is_taken(autocast: str) -> None:
    checked({"hidden_states": HIDDEN}, autocast=autocast)


@pytest.mark.parametrize("autocast", ["float8", "torch.float16", "__class__"])
def test_autocast_of_no_dtype_is_refused(autocast: str) -> None:
    text = bad_request(lambda: checked({"hidden_states": HIDDEN}, autocast=autocast))
    assert text == f"autocast must be bfloat16 or float16, got '{autocast}'"


GRADIENTS: dict[str, tuple[Tensors, str]] = {
    "missing": ({}, "a backward needs a tensor 'grad.hidden_states'"),
    "shape": (
        {"grad.hidden_states": hidden(2, 4, 4)},
        "grad.hidden_states must be [2, 3, 4], got [2, 4, 4]",
    ),
    "dtype": (
        {"grad.hidden_states": hidden(2, 3, 4, dtype=torch.int32)},
        "gradient 'hidden_states' must be floating point, got torch.int32",
    ),
    "dtype-of-another": (
        {"grad.hidden_states": HIDDEN, "grad.record.hidden_states.3": hidden(1, dtype=torch.int64)},
        "gradient 'record.hidden_states.3' must be floating point, got torch.int64",
    ),
}


@pytest.mark.parametrize(("tensors", "text"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradient_that_does_not_fit_is_refused(tensors: Tensors, text: str) -> None:
    assert bad_request(lambda: checked({"hidden_states": HIDDEN, **tensors}, kind="backward")) == text
    checked({"hidden_states": HIDDEN, **tensors}, kind="forward")


def test_gradient_of_another_float_dtype_is_taken() -> None:
    gradient = hidden(2, 3, 4, dtype=torch.bfloat16)
    found = checked({"hidden_states": HIDDEN, "grad.hidden_states": gradient}, kind="backward")
    assert found.grads == {"hidden_states": gradient}


# -------------------------------------------------------------------------------- options and calls


@pytest.mark.parametrize("value", [True, 3, 0.5, "eager"], ids=str)
def test_option_is_taken(value: bool | int | float | str) -> None:
    checked({"hidden_states": HIDDEN}, options=(Option("logits_scale", value),))


@pytest.mark.parametrize(
    "name", ["use_cache", "inputs_embeds", "past_key_values", "self", "output_attentions", "", "a b", "__x\n", "a.b"]
)
def test_option_that_is_ours_or_no_name_is_refused(name: str) -> None:
    options = (Option("fine", True), Option(name, True))
    text = bad_request(lambda: checked({"hidden_states": HIDDEN}, options=options))
    assert text == f"{name!r} may not be an option of a request"


@pytest.mark.parametrize("sizes", [(3, 2), (1, 3), (2, 4), (0, 0), (2**39, 2**39)], ids=str)
def test_call_of_other_sizes_than_its_tensors_is_refused(sizes: tuple[int, int]) -> None:
    rows, num_tokens = sizes
    text = bad_request(lambda: checked({"hidden_states": HIDDEN}, rows=rows, num_tokens=num_tokens))
    assert text == f"hidden states must be [B, T, 4] for {rows} x {num_tokens} tokens, got [2, 3, 4]"


def test_blocks_are_cut_at_legal_boundaries_only() -> None:
    assert check_blocks(step(start=2, end=4), HELD, RICH) == Span(2, 4)
    for start, end in ((3, 6), (2, 5)):
        text = bad_request(lambda start=start, end=end: check_blocks(step(start=start, end=end), HELD, RICH))  # type: ignore[misc]
        assert text.endswith("spans may begin and end at 0, 2, 4, 6, 8")


# -------------------------------------------------------------------------------- tensors by their names


def rich(blocks: Span = HELD, **changes: torch.Tensor | None) -> Tensors:
    """All that a request on a model with states and side inputs brings; None leaves one out."""
    tensors: dict[str, torch.Tensor | None] = {
        "hidden_states": HIDDEN,
        "state.1": torch.tensor([[[0, 2]] * 3] * 2),
        "state.2": hidden(2, 3, 4, dtype=torch.bfloat16),
        "side.input_ids": torch.tensor([[0, 1, VOCAB_SIZE - 1]] * 2),
        **{f"side.1.{block}": hidden(2, 3, 7) for block in blocks},
        **{name.replace("_DOT_", "."): tensor for name, tensor in changes.items()},
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_all_that_crosses_is_sorted_by_what_it_is_for() -> None:
    indices, grad, owner = torch.tensor([0]), HIDDEN, torch.tensor([1])
    entries, lora = torch.zeros(3, dtype=torch.uint8), hidden(2, 2)
    positions, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    tensors = rich() | {
        "position_ids": positions,
        "attention_mask.full": mask,
        "attention_mask.linear": torch.empty(0, dtype=torch.bool),
        "owner.token_type_ids": owner,
        "indices.0": indices,
        "grad.hidden_states": grad,
        "grad.state.2": grad,
        "adapter": entries,
        "adapter.0": lora,
    }
    found = checked(tensors, kind="backward", stack=RICH, adapter="digest")
    assert found == RequestTensors(
        inputs={name: tensors[name] for name in rich()},
        position_ids=positions,
        attention_mask={"full": mask, "linear": None},
        owner={"token_type_ids": owner},
        indices={"indices.0": indices},
        grads={"hidden_states": grad, "state.2": grad},
        adapter=entries,
        adapter_tensors={"adapter.0": lora},
    )


def test_states_may_be_absent_and_side_inputs_may_not() -> None:
    found = checked(rich(state_DOT_1=None, state_DOT_2=None), stack=RICH)
    assert not any(name.startswith("state.") for name in found.inputs)
    text = bad_request(lambda: checked(rich(side_DOT_input_ids=None), stack=RICH))
    assert text == "blocks 2:6 need the side inputs ['side.input_ids']"
    text = bad_request(lambda: checked(rich(Span(2, 5)), stack=RICH))
    assert text == "blocks 2:6 need the side inputs ['side.1.5']"


def test_first_block_takes_side_inputs_and_no_states() -> None:
    blocks = Span(0, 2)
    taken = rich(blocks, state_DOT_1=None, state_DOT_2=None)
    assert checked(taken, stack=RICH, blocks=blocks).inputs == taken
    text = bad_request(lambda: checked(rich(blocks), stack=RICH, blocks=blocks))
    assert text.startswith("tensor 'state.1' is not one that these blocks take: ")


UNFIT: dict[str, tuple[str, torch.Tensor, str]] = {
    "float-ids": ("side.input_ids", torch.zeros(2, 3), "'side.input_ids' must be [B, T], got torch.float32 [2, 3]"),
    "rows-of-ids": (
        "side.input_ids",
        torch.zeros(1, 3, dtype=torch.int64),
        "'side.input_ids' must be [B, T], got torch.int64 [1, 3]",
    ),
    "negative-id": ("side.input_ids", torch.tensor([[0, 1, -1]] * 2), "'side.input_ids' must be in 0:50, got -1..1"),
    "id-beyond": ("side.input_ids", torch.tensor([[0, 1, 50]] * 2), "'side.input_ids' must be in 0:50, got 0..50"),
    "bytes": (
        "side.input_ids",
        torch.zeros(2, 3, dtype=torch.uint8),
        "'side.input_ids' must be int64 or int32, got torch.uint8",
    ),
    "float-state": ("state.1", torch.zeros(2, 3, 2), "'state.1' must be [B, T, ?], got torch.float32 [2, 3, 2]"),
    "tokens-of-state": (
        "state.1",
        torch.zeros(2, 2, 2, dtype=torch.int64),
        "'state.1' must be [B, T, ?], got torch.int64 [2, 2, 2]",
    ),
    "empty-state": (
        "state.1",
        torch.zeros(2, 3, 0, dtype=torch.int64),
        "'state.1' must be [B, T, ?], got torch.int64 [2, 3, 0]",
    ),
    "state-beyond": ("state.1", torch.full((2, 3, 1), 3), "'state.1' must be in 0:3, got 3..3"),
    "width-of-state": ("state.2", hidden(2, 3, 5), "'state.2' must be [B, T, 4], got torch.float32 [2, 3, 5]"),
    "flat-side": ("side.1.3", hidden(2, 3), "'side.1.3' must be [B, T, ?], got torch.float32 [2, 3]"),
    "scalar-side": ("side.1.3", hidden(), "'side.1.3' must be [B, T, ?], got torch.float32 []"),
    "long-adapter": ("adapter.0", hidden(1), "a request that brings an adapter must name it"),
}


@pytest.mark.parametrize(("name", "tensor", "text"), UNFIT.values(), ids=UNFIT.keys())
def test_named_tensor_that_does_not_fit_is_refused(name: str, tensor: torch.Tensor, text: str) -> None:
    assert bad_request(lambda: checked(rich() | {name: tensor}, stack=RICH)) == text


def test_state_may_name_tokens_of_the_cache() -> None:
    tensors = rich(state_DOT_1=torch.full((2, 3, 1), 12))
    assert bad_request(lambda: checked(tensors, stack=RICH, position=9)) == "'state.1' must be in 0:12, got 12..12"
    checked(tensors, stack=RICH, position=10)


STRANGE = ["", ".", "x", "hidden_states.0", "state.", "state.0", "state.7", "state.1.2", "side.input_ids.3", "side.1.6"]
STRANGE += [
    "side.1",
    "position_ids.0",
    "attention_mask.",
    "owner.",
    "owner.input_ids",
    "owner.inputs_embeds",
    "owner.a b",
]
STRANGE += ["owner.use_cache", "grad.", "adapter.", "indices.", "indices", "past", "a\nb", "record.hidden_states.1"]


@pytest.mark.parametrize("name", STRANGE)
def test_tensor_of_another_name_is_refused_in_one_line(name: str) -> None:
    text = bad_request(lambda: checked(rich() | {name: HIDDEN}, stack=RICH))
    assert text.startswith(f"tensor {name!r} is not one that these blocks take: ['hidden_states', ")


def test_document_names_what_is_taken() -> None:
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    text = document.partition("### Names of tensors")[2].partition("| tensor of an `Output` |")[0]
    named = [
        name for cell in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    ]
    placed = {"<k>": "1", "<n>": "0", "<layer>": "2", "<name>": "hidden_states", "<type>": "full"}
    examples = []
    for name in named:
        for pattern, example in placed.items():
            name = name.replace(pattern, example)
        if name.startswith("side."):
            name = "side.1.2" if "<block>" in name else "side.input_ids"
        examples.append(name.replace("<argument>", "token_type_ids"))
    assert len(examples) == 14
    wanted = {**RICH.carried, **RICH.side_specs(HELD)}
    for name in examples:
        tensor = torch.zeros(1, dtype=torch.uint8)
        found = _sorted({name: tensor}, wanted)
        assert found != RequestTensors(), name


MASKS: dict[str, tuple[Tensors, str]] = {
    "both": (
        {"attention_mask": torch.ones(2, 3), "attention_mask.full": torch.ones(2, 3)},
        "attention_mask may be one tensor or one for each type of layer, got both",
    ),
    "columns-of-a-type": (
        {"attention_mask.full": torch.ones(2, 4)},
        "'attention_mask.full' must have 3 columns, got 4",
    ),
    "rows-of-a-type": (
        {"attention_mask.full": torch.ones(3, 3)},
        "'attention_mask.full' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.float32 [3, 3]",
    ),
    "columns-of-a-large-one": (
        {"attention_mask": torch.ones(2, 1, 3, 4)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.float32 [2, 1, 3, 4]",
    ),
    "tokens-of-a-large-one": (
        {"attention_mask": torch.ones(2, 1, 2, 3)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.float32 [2, 1, 2, 3]",
    ),
    "no-heads": (
        {"attention_mask": torch.ones(2, 0, 3, 3)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.float32 [2, 0, 3, 3]",
    ),
    "shorts": (
        {"attention_mask": torch.ones(2, 1, 3, 3, dtype=torch.int16)},
        "'attention_mask' must be [2, tokens] of integers or bools, or [2, h, 3, 3], got torch.int16 [2, 1, 3, 3]",
    ),
}


@pytest.mark.parametrize(("masks", "text"), MASKS.values(), ids=MASKS.keys())
def test_masks_that_do_not_fit_are_refused(masks: Tensors, text: str) -> None:
    assert bad_request(lambda: checked({"hidden_states": HIDDEN, **masks})) == text


def test_mask_of_a_step_covers_what_the_cache_holds() -> None:
    masks = {"attention_mask": torch.ones(2, 1, 3, 13), "hidden_states": HIDDEN}
    checked(masks, position=10)
    text = bad_request(lambda: checked(masks, position=9))
    assert text.endswith("or [2, h, 3, 12], got torch.float32 [2, 1, 3, 13]")


def keys_and_values(blocks: Span, *shape: int) -> Tensors:
    return {f"past.{block}.{kind}": hidden(*shape) for block in blocks for kind in ("key", "value")}


def test_keys_and_values_that_a_cache_begins_with_count_as_tokens() -> None:
    past = keys_and_values(HELD, 2, 1, 5, 4)
    for kind, position in (("forward", 0), ("step", 5)):
        mask = torch.ones(2, 1, 3, 8)
        found = checked({"hidden_states": HIDDEN, "attention_mask": mask, **past}, kind=kind, position=position)
        assert found.past == past


PASTS: dict[str, tuple[Tensors, str]] = {
    "flat": (
        keys_and_values(HELD, 2, 1, 5, 4) | {"past.2.key": hidden(4)},
        "'past.2.key' must be [B, heads, tokens, size], got [4]",
    ),
    "one-of-many": (
        {"past.2.key": hidden(2, 1, 5, 4)},
        (
            "keys and values must be given for all of "
            "['past.2.key', 'past.2.value', 'past.3.key', 'past.3.value']..., got ['past.2.key']"
        ),
    ),
    "rows": (
        keys_and_values(HELD, 1, 1, 5, 4),
        "'past.2.key' must be [2, heads, 5, size] of floats, got torch.float32 [1, 1, 5, 4]",
    ),
    "lengths": (
        keys_and_values(HELD, 2, 1, 5, 4) | {"past.5.value": hidden(2, 1, 6, 4)},
        "'past.5.value' must be [2, heads, 5, size] of floats, got torch.float32 [2, 1, 6, 4]",
    ),
    "integers": (
        keys_and_values(HELD, 2, 1, 5, 4) | {"past.3.key": torch.zeros(2, 1, 5, 4, dtype=torch.int64)},
        "'past.3.key' must be [2, heads, 5, size] of floats, got torch.int64 [2, 1, 5, 4]",
    ),
}


@pytest.mark.parametrize(("past", "text"), PASTS.values(), ids=PASTS.keys())
@pytest.mark.parametrize("kind", ["step", "forward"])
def test_keys_and_values_that_do_not_fit_are_refused(past: Tensors, text: str, kind: str) -> None:
    assert bad_request(lambda: checked({"hidden_states": HIDDEN, **past}, kind=kind)) == text
