"""A tiny model has to agree with itself in parts before a true one is used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config

from model import support
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.capture import OwnerCall
from remote_modules.model.classes import serving_class
from remote_modules.model.probe import probe_stack, tiny_twin
from remote_modules.model.selftest import Trace, self_tested
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span


def traced(family: str) -> tuple[Any, StackSpec, Trace]:
    cls, config = serving_class(tiny_config(family))
    model, stack = tiny_twin(cls, config), probe_stack(cls, config)
    seen = support.Trace(model)
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        arguments = seen.arguments()
        call = OwnerCall(
            rows=3,
            num_tokens=7,
            position_ids=arguments.position_ids,
            attention_mask=arguments.attention_mask,
            tensors=dict(arguments.tensors),
            options=dict(arguments.options),
            use_cache=False,
        )
    carried = [dict(seen.carried(boundary)) for boundary in range(stack.num_blocks + 1)]
    return model, stack, Trace(call, carried, seen.sides(Span(0, stack.num_blocks)))


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3n_text", "mamba"])
def test_architecture_whose_parts_agree_passes(family: str) -> None:
    model, stack, trace = traced(family)
    with torch.no_grad():
        assert self_tested(model, stack, trace) == stack
    assert all(parameter.device.type == "cpu" for parameter in model.parameters()), "the model is left as it is"


@pytest.mark.parametrize("boundary", [2, 4])
def test_other_result_is_refused_with_the_blocks(boundary: int) -> None:
    model, stack, trace = traced("llama")
    trace.carried[boundary]["hidden_states"] = trace.carried[boundary]["hidden_states"] + 0.1
    blocks = "0:2" if boundary == 2 else "2:4"
    with (
        torch.no_grad(),
        pytest.raises(
            UnsupportedCallError,
            match=rf"^its blocks do not run apart from the model: 'hidden_states' of blocks {blocks} differs",
        ),
    ):
        self_tested(model, stack, trace)


def test_side_inputs_that_are_not_given_are_noticed() -> None:
    model, stack, trace = traced("gemma3n_text")
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match=r"^its blocks do not run apart from the model: "):
        self_tested(model, replace(stack, sides=()), trace)
