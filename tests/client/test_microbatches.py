from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from remote_modules.client.autograd import RemotePass
from remote_modules.client.call import CallArguments
from remote_modules.client.failures import PassFailures
from remote_modules.client.microbatches import NotCutError, cut, cut_grads, join, sum_in_order
from remote_modules.client.stats import StatsRecorder
from remote_modules.config import ClientConfig
from remote_modules.model.stack import SideInput, StackSpec
from remote_modules.model.tensors import TensorSpec
from remote_modules.net.loop import LoopThread
from remote_modules.peers import PeerId
from remote_modules.spans import Span

ROWS, NUM_TOKENS, SIZE = 5, 4, 3
CONFIG = ClientConfig(microbatch_tokens=2 * NUM_TOKENS)
BLOCKS = Span(0, 2)
STACK = StackSpec("model.layers", 2)
HIDDEN = torch.arange(ROWS * NUM_TOKENS * SIZE, dtype=torch.float32).reshape(ROWS, NUM_TOKENS, SIZE)
PER_ROW = torch.arange(ROWS)[:, None].expand(ROWS, NUM_TOKENS).contiguous()


def call(**changes: Any) -> CallArguments:
    return CallArguments(rows=ROWS, num_tokens=NUM_TOKENS, **changes)


def rows_of(stack: StackSpec, arguments: CallArguments, hidden: torch.Tensor = HIDDEN) -> list[range]:
    return [part.rows for part in cut(stack, BLOCKS, {"hidden_states": hidden}, arguments, CONFIG)]


CUT = [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_ids": PER_ROW},
        {"position_ids": torch.arange(NUM_TOKENS)[None]},
        {"position_ids": PER_ROW.expand(3, ROWS, NUM_TOKENS)},
        {"attention_mask": torch.ones(ROWS, NUM_TOKENS)},
        {"attention_mask": torch.ones(ROWS, 1, NUM_TOKENS, NUM_TOKENS)},
        {"attention_mask": torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS)},
        {"attention_mask": {"full": torch.ones(ROWS, NUM_TOKENS, NUM_TOKENS), "sliding": None}},
        {"tensors": {"token_type_ids": PER_ROW}},
        {"tensors": {"encoder_hidden_states": torch.zeros(ROWS, 7, NUM_TOKENS)}},
        {"tensors": {"scale": torch.ones(1)}},
        {"past": {"past.0.key": torch.zeros(ROWS, 2, 6, 3), "past.0.value": torch.zeros(ROWS, 2, 6, 3)}},
    ],
    ids=str,
)
def test_tensors_are_cut_with_their_rows(changes: dict[str, Any]) -> None:
    arguments = call(**changes)
    parts = cut(STACK, BLOCKS, {"hidden_states": HIDDEN}, arguments, CONFIG)
    assert [part.rows for part in parts] == CUT
    whole = {**arguments.owner_tensors(), **arguments.past}
    for part in parts:
        rows = slice(part.rows.start, part.rows.stop)
        assert torch.equal(part.inputs["hidden_states"], HIDDEN[rows])
        assert (part.call.rows, part.call.num_tokens) == (len(part.rows), NUM_TOKENS)
        for name, tensor in {**part.call.owner_tensors(), **part.call.past}.items():
            dim = whole[name].dim() - 2 if name == "position_ids" else 0
            is_shared = whole[name].numel() == 0 or whole[name].shape[dim] == 1
            expected = whole[name] if is_shared else whole[name][(slice(None),) * dim + (rows,)]
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("stack", "changes"),
    [
        (replace(STACK, hidden=TensorSpec(("T", "1H"))), {}),
        (replace(STACK, states={1: TensorSpec(("B", "T", "?"), is_float=False)}), {}),
        (replace(STACK, sides=(SideInput("x", False, TensorSpec(("T", "1H"))),)), {"sides": {"side.x": HIDDEN[0]}}),
        (
            replace(STACK, sides=(SideInput("x", False, TensorSpec(("B", "T", "1H"))),)),
            {"sides": {"side.x": HIDDEN[:1]}},  # its gradient is of all rows
        ),
        (replace(STACK, replays_steps=True), {"position_ids": PER_ROW}),
        (STACK, {"tensors": {"of_layers": torch.zeros(2, 2)}}),
        (STACK, {"attention_mask": torch.ones(3, NUM_TOKENS)}),
        (STACK, {"past": {"past.0.key": torch.zeros(1, 2, 6, 3)}}),
    ],
)
def test_what_cannot_be_told_apart_is_not_cut(stack: StackSpec, changes: dict[str, Any]) -> None:
    assert rows_of(stack, call(**changes)) == [range(ROWS)]


def test_what_was_cut_is_joined_again() -> None:
    parts = cut(STACK, BLOCKS, {"hidden_states": HIDDEN}, call(), CONFIG)
    logits = torch.arange(ROWS * NUM_TOKENS * 2).reshape(ROWS * NUM_TOKENS, 2)
    found = [
        {
            "hidden_states": HIDDEN[part.rows.start : part.rows.stop],
            "record.router_logits.0": logits[part.rows.start * NUM_TOKENS : part.rows.stop * NUM_TOKENS],
        }
        for part in parts
    ]
    joined = join(STACK, found, parts)
    assert torch.equal(joined["hidden_states"], HIDDEN)
    assert torch.equal(joined["record.router_logits.0"], logits)
    for part, expected in zip(parts, found, strict=True):
        grads = cut_grads(STACK, joined, ROWS, part.rows)
        assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


def test_records_that_do_not_go_by_rows_are_not_joined() -> None:
    parts = cut(STACK, BLOCKS, {"hidden_states": HIDDEN}, call(), CONFIG)
    with pytest.raises(NotCutError, match=r"lengths \[3, 3, 3\] are of \[2, 2, 1\] rows"):
        join(STACK, [{"record.router_logits.0": torch.zeros(3, 2)} for _ in parts], parts)


def test_half_precision_is_summed_in_single_and_rounded_once() -> None:
    parts = [{0: torch.tensor([256.0], dtype=torch.bfloat16)}] + [{0: torch.tensor([0.75], dtype=torch.bfloat16)}] * 4
    (total,) = sum_in_order(parts).values()
    assert total.dtype == torch.bfloat16
    assert total.item() == torch.tensor(259.0).bfloat16().item()
    assert sum_in_order(parts[1:2]) == parts[1]
    assert sum_in_order([{1: torch.ones(2)}, {1: torch.ones(2)}])[1].tolist() == [2.0, 2.0]


def test_call_brings_the_sides_of_its_own_blocks_only() -> None:
    """Where blocks between are wrapped, a call runs span by span: sides of other blocks must not keep it whole."""
    stack = replace(STACK, sides=(SideInput("x", True, TensorSpec(("B", "T", "1H"))),))
    arguments = call(sides={"side.x.0": HIDDEN, "side.x.1": HIDDEN})
    swarm: Any = SimpleNamespace(stack=stack)
    own = RemotePass(swarm, cast(LoopThread, None), Span(1, 2), arguments).call
    assert own.sides.keys() == {"side.x.1"}
    parts = cut(stack, Span(1, 2), {"hidden_states": HIDDEN}, own, CONFIG)
    assert [part.rows for part in parts] == CUT
    assert torch.equal(parts[2].call.sides["side.x.1"], HIDDEN[4:])


def test_failure_is_told_once_and_its_time_counted_once() -> None:
    stats = StatsRecorder()
    failures, (one, two) = PassFailures(stats), ("one", "two")
    alice, bob = PeerId("alice"), PeerId("bob")
    assert not failures.meet(one, alice, "1", 1.0)
    assert failures.meet(two, alice, "1", 2.0)
    assert not failures.meet(two, alice, "1", 2.5)  # again, after it went on there
    assert not failures.meet(one, alice, "2", 2.5)  # it was started anew
    assert not failures.meet(one, bob, "1", 3.0)
    failures.go_on(one, 3.5)
    assert stats.stall_s == 0.0
    failures.go_on(two, 4.0)
    failures.go_on(two, 5.0)
    assert stats.stall_s == 3.0
