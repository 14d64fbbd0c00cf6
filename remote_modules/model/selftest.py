"""Proving on a tiny model that an architecture can be replayed in parts, before a true one is used."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.capture import OwnerCall
from remote_modules.model.pruning import prune
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span

__all__ = ["Trace", "self_tested"]

_TOLERANCE = 1e-3  # for what the architecture itself does not reproduce; a wrong mask or position gives about 1


@dataclass(frozen=True, slots=True)
class Trace:
    """One run of the whole tiny model.

    Attributes:
        call: what the owner of the blocks got.
        carried: what entered block 0, and what each block returned.
        sides: side inputs of all blocks.
    """

    call: OwnerCall
    carried: list[dict[str, torch.Tensor]]
    sides: dict[str, torch.Tensor]


def self_tested(model: PreTrainedModel, stack: StackSpec, trace: Trace) -> StackSpec:
    """``stack``, once two spans of ``model`` give what the whole of it gave; decides how the owner is replayed.

    Raises:
        UnsupportedCallError: they do not.
    """
    reasons = []
    for candidate in (stack, replace(stack, takes_ids=True)):
        try:
            _check(model, candidate, trace)
        except (UnsupportedCallError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as exc:
            reasons.append(first_line(exc))
        else:
            return replace(candidate, indirect=_indirect(model, candidate, trace))
    raise UnsupportedCallError(f"its blocks do not run apart from the model: {reasons[0]}")


def _indirect(model: PreTrainedModel, stack: StackSpec, trace: Trace) -> frozenset[str]:
    """The owner's tensors whose values do not matter to blocks that get their side inputs."""
    found = set()
    for name, tensor in trace.call.tensors.items():
        without = replace(trace.call, tensors={**trace.call.tensors, name: torch.zeros_like(tensor)})
        try:
            _check(model, stack, replace(trace, call=without))
        except UnsupportedCallError:
            continue
        found.add(name)
    return frozenset(found)


def _check(model: PreTrainedModel, stack: StackSpec, trace: Trace) -> None:
    inner = sorted(stack.cuts - {0, stack.num_blocks})
    cut = inner[len(inner) // 2] if inner else stack.num_blocks
    for span in [Span(0, cut), *([Span(cut, stack.num_blocks)] if inner else [])]:
        part = copy.deepcopy(model)
        prune(part, stack, lambda block, span=span: block is not None and block in span)  # type: ignore[misc]
        outputs = SpanModel(part, stack, span).run(
            trace.carried[span.start] | {name: trace.sides[name] for name in stack.side_specs(span)},
            span,
            _arguments(trace.call),
        )
        for name, output in outputs.items():
            expected = trace.carried[span.end].get(name)
            if expected is None or not torch.allclose(output, expected, atol=_TOLERANCE, rtol=_TOLERANCE):
                raise UnsupportedCallError(f"'{name}' of blocks {span} differs from the whole model's")


def _arguments(call: OwnerCall) -> OwnerArguments:
    return OwnerArguments(
        rows=call.rows,
        num_tokens=call.num_tokens,
        position_ids=call.position_ids,
        attention_mask=call.attention_mask,
        tensors=call.tensors,
        options=call.options,
        use_cache=call.use_cache,
    )
