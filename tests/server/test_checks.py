from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.server.checks import check_blocks, check_ops, check_tensors, refuse
from remote_modules.spans import Span
from remote_modules.wire.messages import BackwardRequest, CacheOp, ForwardRequest, Request, StepRequest

Tensors = dict[str, torch.Tensor]

MAX_BATCH_TOKENS = 16
HELD, NUM_BLOCKS = Span(2, 6), 8


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


def checked(tensors: Tensors, *, kind: str = "step", autocast: str = "") -> torch.Tensor:
    return check_tensors(tensors, hidden_size=4, max_batch_tokens=MAX_BATCH_TOKENS, autocast=autocast, kind=kind)


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
    assert [check_blocks(request, HELD, NUM_BLOCKS) for request in requests] == [Span(start, end)] * 3


@pytest.mark.parametrize(
    ("start", "end"), [(0, 9), (8, 9), (4096, 4096), (3, 3), (4, 3), (-1, 3), (0, 0)], ids=lambda block: str(block)
)
def test_blocks_outside_the_model_are_a_bad_request(start: int, end: int) -> None:
    text = bad_request(lambda: check_blocks(step(start=start, end=end), HELD, NUM_BLOCKS))
    assert text == f"span {start}:{end} is outside the model's blocks 0:8"


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 3), (5, 7), (6, 8), (0, 8)])
def test_blocks_of_other_peers_are_not_served(start: int, end: int) -> None:
    assert refusal_of(lambda: check_blocks(step(start=start, end=end), HELD, NUM_BLOCKS)) == (
        RefusalReason.NOT_SERVED,
        f"blocks {start}:{end} are not served here, this peer holds 2:6",
    )


# -------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_hidden_states_of_every_float_dtype_are_taken(dtype: torch.dtype) -> None:
    states = hidden(2, 3, 4, dtype=dtype)
    assert checked({"hidden_states": states}) is states


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
    "unknown-name": {"indices.0": torch.tensor([1, 0])},
}


@pytest.mark.parametrize("others", FITTING.values(), ids=FITTING.keys())
def test_fitting_side_inputs_are_taken(others: Tensors) -> None:
    assert checked({"hidden_states": HIDDEN, **others}) is HIDDEN


REFUSED: dict[str, tuple[Tensors, str]] = {
    "missing": ({"grad_output": HIDDEN}, "a step needs a tensor 'hidden_states', got ['grad_output']"),
    "two-dims": ({"hidden_states": hidden(3, 4)}, "hidden states must be [B, T, 4], got [3, 4]"),
    "four-dims": ({"hidden_states": hidden(1, 1, 3, 4)}, "hidden states must be [B, T, 4], got [1, 1, 3, 4]"),
    "scalar": ({"hidden_states": hidden()}, "hidden states must be [B, T, 4], got []"),
    "width": ({"hidden_states": hidden(2, 3, 5)}, "hidden states must be [B, T, 4], got [2, 3, 5]"),
    "no-rows": ({"hidden_states": hidden(0, 3, 4)}, "hidden states must be [B, T, 4], got [0, 3, 4]"),
    "no-tokens": ({"hidden_states": hidden(2, 0, 4)}, "hidden states must be [B, T, 4], got [2, 0, 4]"),
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
        "attention_mask must be [2, tokens] of integers or bools, got torch.int64 [3]",
    ),
    "rows-of-mask": (
        {"hidden_states": HIDDEN, "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
        "attention_mask must be [2, tokens] of integers or bools, got torch.int64 [1, 3]",
    ),
    "half-mask": (
        {"hidden_states": HIDDEN, "attention_mask": torch.ones(2, 3, dtype=torch.float16)},
        "attention_mask must be [2, tokens] of integers or bools, got torch.float16 [2, 3]",
    ),
}


@pytest.mark.parametrize(("tensors", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_do_not_fit_are_refused(tensors: Tensors, text: str) -> None:
    assert bad_request(lambda: checked(tensors)) == text


@pytest.mark.parametrize("autocast", ["", "bfloat16", "float16"])
def test_autocast_dtype_is_taken(autocast: str) -> None:
    checked({"hidden_states": HIDDEN}, autocast=autocast)


@pytest.mark.parametrize("autocast", ["float8", "torch.float16", "__class__"])
def test_autocast_of_no_dtype_is_refused(autocast: str) -> None:
    text = bad_request(lambda: checked({"hidden_states": HIDDEN}, autocast=autocast))
    assert text == f"autocast must be bfloat16 or float16, got '{autocast}'"


GRADIENTS: dict[str, tuple[Tensors, str]] = {
    "missing": ({}, "a backward needs a tensor 'grad_output'"),
    "shape": (
        {"grad_output": hidden(2, 4, 4)},
        "grad_output must be floating point [2, 3, 4], got torch.float32 [2, 4, 4]",
    ),
    "dtype": (
        {"grad_output": hidden(2, 3, 4, dtype=torch.int32)},
        "grad_output must be floating point [2, 3, 4], got torch.int32 [2, 3, 4]",
    ),
}


@pytest.mark.parametrize(("tensors", "text"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradient_that_does_not_fit_is_refused(tensors: Tensors, text: str) -> None:
    assert bad_request(lambda: checked({"hidden_states": HIDDEN, **tensors}, kind="backward")) == text
    checked({"hidden_states": HIDDEN, **tensors}, kind="forward")


def test_gradient_of_another_float_dtype_is_taken() -> None:
    gradient = hidden(2, 3, 4, dtype=torch.bfloat16)
    checked({"hidden_states": HIDDEN, "grad_output": gradient}, kind="backward")


# -------------------------------------------------------------------------------- cache operations

ROWS: Tensors = {
    "swap": torch.tensor([1, 0]),
    "repeat": torch.tensor([0, 0, 0, 1, 1, 1]),
    "one": torch.tensor([1]),
    "beyond": torch.tensor([0, 2]),
    "negative": torch.tensor([-1, 0]),
    "none": torch.tensor([], dtype=torch.int64),
    "floats": torch.tensor([0.0, 1.0]),
    "square": torch.tensor([[0, 1]]),
}
RESET = CacheOp("reset")


def crop(length: int) -> CacheOp:
    return CacheOp("crop", length=length)


def select(name: str) -> CacheOp:
    return CacheOp("select", tensor=name)


@pytest.mark.parametrize(
    ("ops", "after"),
    [
        ((), (10, 2, 0)),
        ((crop(10),), (10, 2, 2)),
        ((crop(4),), (4, 2, 2)),
        ((crop(0),), (0, 2, 0)),
        ((RESET,), (0, 2, 0)),
        ((select("swap"),), (10, 2, 2)),
        ((select("repeat"),), (10, 6, 6)),
        ((select("one"),), (10, 1, 1)),
        ((select("repeat"), select("one")), (10, 1, 6)),
        ((select("repeat"), crop(3), RESET), (0, 6, 6)),
        ((RESET, select("beyond")), (0, 2, 0)),
    ],
    ids=str,
)
def test_operations_give_position_rows_and_most_rows(ops: tuple[CacheOp, ...], after: tuple[int, int, int]) -> None:
    assert check_ops(step(*ops), ROWS, position=10, rows=2) == after


@pytest.mark.parametrize(
    ("ops", "text"),
    [
        ((crop(11),), "cannot crop to 11 tokens, the session has 10"),
        ((crop(4), crop(5)), "cannot crop to 5 tokens, the session has 4"),
        ((RESET, crop(1)), "cannot crop to 1 tokens, the session has 0"),
        ((select("missing"),), "select needs an int64 vector named 'missing'"),
        ((select("none"),), "select needs an int64 vector named 'none'"),
        ((select("floats"),), "select needs an int64 vector named 'floats'"),
        ((select("square"),), "select needs an int64 vector named 'square'"),
        ((select("beyond"),), "select names rows 0..2, the session has 2"),
        ((select("negative"),), "select names rows -1..0, the session has 2"),
        ((select("one"), select("swap")), "select names rows 0..1, the session has 1"),
    ],
    ids=str,
)
def test_operations_that_do_not_fit_the_session_are_refused(ops: tuple[CacheOp, ...], text: str) -> None:
    assert bad_request(lambda: check_ops(step(*ops), ROWS, position=10, rows=2)) == text
