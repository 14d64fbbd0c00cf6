"""Cutting a call into microbatches by rows, and joining what came of them.

Which rows go together is decided by `plan.microbatches`; here is which dimension of each tensor has the rows. What
cannot be told for certain is not cut: such a call is one microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from remote_modules.client.call import CallArguments, Mask, Named
from remote_modules.config import ClientConfig
from remote_modules.errors import RemoteModulesError
from remote_modules.model.stack import StackSpec
from remote_modules.model.tensors import TensorSpec, num_bytes, owner_spec
from remote_modules.plan.microbatches import split
from remote_modules.spans import Span

__all__ = ["Microbatch", "NotCutError", "cut", "cut_grads", "join", "sum_in_order", "whole"]

_PER_ROW = ("encoder_hidden_states", "encoder_attention_mask")  # of the owner's arguments; others must show it


class NotCutError(RemoteModulesError):
    """What came of the microbatches does not say which rows are whose."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Some rows of a call.

    Attributes:
        rows: of the whole batch.
        inputs: what enters the first block.
        dims: by name of each tensor of the call, the dimension that has the rows; None: it is the same for all.
    """

    rows: range
    inputs: Named
    call: CallArguments
    dims: Mapping[str, int | None]


def whole(inputs: Named, call: CallArguments) -> list[Microbatch]:
    """The call as one microbatch."""
    return [Microbatch(range(call.rows), inputs, call, {})]


def cut(
    stack: StackSpec, blocks: Span, inputs: Named, call: CallArguments, config: ClientConfig, most_tokens: int = 0
) -> list[Microbatch]:
    """The microbatches of a call, in order of their rows; one where it is small, or cannot be cut.

    Args:
        most_tokens: of one microbatch, where that is less than the setting; 0 for no such limit.
    """
    parts = _rows_of_parts(blocks, inputs, call, config, most_tokens or config.microbatch_tokens)
    dims = _dims_of(stack, blocks, inputs, call) if len(parts) > 1 else None
    if dims is None:
        return whole(inputs, call)
    return [Microbatch(rows, _take(inputs, dims, rows), _rows_of_call(call, dims, rows), dims) for rows in parts]


def cut_grads(stack: StackSpec, grads: Named, num_rows: int, rows: range) -> Named:
    """Those of some rows, of gradients of a pass's outputs."""
    dims = {name: _output_dim(stack, name) for name in grads}
    found = {}
    for name, grad in grads.items():
        dim = dims[name]
        each = grad.shape[dim] // num_rows
        found[name] = grad.narrow(dim, rows.start * each, len(rows) * each).contiguous()
    return found


def join(stack: StackSpec, parts: Sequence[Named], microbatches: Sequence[Microbatch]) -> Named:
    """Outputs, or gradients of inputs, one after the other; names that not all have are left out.

    Raises:
        NotCutError: one is not as long as its rows.
    """
    if len(parts) == 1:
        return parts[0]
    dims = microbatches[0].dims
    joined = {}
    for name in parts[0]:
        if not all(name in part for part in parts):
            continue
        own = dims.get(name)
        dim = _output_dim(stack, name) if own is None else own
        joined[name] = _joined([part[name] for part in parts], dim, microbatches)
    return joined


def sum_in_order(parts: Sequence[Mapping[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Sums by number, always in the same order; half precision is summed in single and rounded once."""
    if len(parts) == 1:
        return dict(parts[0])
    totals: dict[int, torch.Tensor] = {}
    dtypes: dict[int, torch.dtype] = {}
    for part in parts:
        for number, grad in part.items():
            if number not in totals:
                dtypes[number] = grad.dtype
                is_half = grad.dtype in (torch.float16, torch.bfloat16)
                totals[number] = grad.to(torch.float32 if is_half else grad.dtype, copy=True)
            else:
                totals[number] += grad
    return {number: total.to(dtypes[number]) for number, total in totals.items()}


def _rows_of_parts(
    blocks: Span, inputs: Named, call: CallArguments, config: ClientConfig, most_tokens: int
) -> tuple[range, ...]:
    carried = num_bytes(inputs) + num_bytes(call.sides) + num_bytes(call.past)
    if call.with_grad:  # its gradient comes along in the backward
        carried *= 2
    if "hidden_states" in call.record:
        carried += len(blocks) * num_bytes({"": inputs["hidden_states"]})
    carried += num_bytes(call.owner_tensors())
    fixed = 0 if call.adapter is None else num_bytes(dict(enumerate(call.adapter.adapters.parameters)))  # type: ignore[arg-type]
    limit = config.max_request_bytes
    return split(
        call.rows,
        call.num_tokens,
        max_tokens=min(most_tokens, config.microbatch_tokens),
        bytes_per_row=-(-carried // max(1, call.rows)),
        max_bytes=max(limit // 2, limit - fixed),
    )


def _dims_of(stack: StackSpec, blocks: Span, inputs: Named, call: CallArguments) -> dict[str, int | None] | None:
    """The dimension of the rows by name; None if the call cannot be cut."""
    specs = {**stack.carried, **stack.side_specs(blocks)}
    if any(spec.batch is None or "?" in spec.dims for spec in stack.carried.values()):
        return None
    positions = call.position_ids
    if stack.replays_steps and positions is not None and positions.shape[-2] > 1:
        return None  # rotary tables follow the largest position of the whole batch
    found = dict(_input_dims(specs, inputs | call.sides, call))
    found |= {name: (0 if tensor.shape[0] == call.rows else -1) for name, tensor in call.past.items()}
    for name, tensor in call.owner_tensors().items():
        found[name] = _owner_dim(stack, name, tensor, call)
    return None if -1 in found.values() else found


def _input_dims(
    specs: Mapping[str, TensorSpec], tensors: Named, call: CallArguments
) -> Iterable[tuple[str, int | None]]:
    """-1 for what cannot be cut."""
    for name, tensor in tensors.items():
        dim = specs[name].batch if name in specs else None
        if dim is None:
            yield name, -1
        elif tensor.shape[dim] == call.rows:
            yield name, dim
        else:  # one for all rows: its gradient would have to be summed
            yield name, -1 if tensor.is_floating_point() or tensor.shape[dim] != 1 else None


def _owner_dim(stack: StackSpec, name: str, tensor: torch.Tensor, call: CallArguments) -> int | None:
    """-1 for what cannot be cut."""
    head, _, argument = name.partition(".")
    if head == "attention_mask":
        dim: int | None = 0
    elif name == "position_ids":
        dim = tensor.dim() - 2
    elif argument in _PER_ROW:
        dim = 0
    else:
        spec = stack.owner_tensors.get(argument) or owner_spec(tensor, call.num_tokens)
        dim = spec.batch if len(spec.dims) == tensor.dim() else None
    if tensor.numel() <= 1 or (dim is not None and tensor.shape[dim] == 1):
        return None
    return dim if dim is not None and tensor.shape[dim] == call.rows else -1


def _take(tensors: Named, dims: Mapping[str, int | None], rows: range) -> Named:
    return {name: _narrowed(tensor, dims[name], rows) for name, tensor in tensors.items()}


def _narrowed(tensor: torch.Tensor, dim: int | None, rows: range) -> torch.Tensor:
    return tensor if dim is None else tensor.narrow(dim, rows.start, len(rows)).contiguous()


def _rows_of_call(call: CallArguments, dims: Mapping[str, int | None], rows: range) -> CallArguments:
    positions = call.position_ids
    return replace(
        call,
        rows=len(rows),
        first_row=call.first_row + rows.start,
        row_names=call.row_names[rows.start : rows.stop],
        position_ids=None if positions is None else _narrowed(positions, dims["position_ids"], rows),
        attention_mask=_mask_rows(call.attention_mask, dims, rows),
        tensors={name: _narrowed(tensor, dims[f"owner.{name}"], rows) for name, tensor in call.tensors.items()},
        sides=_take(call.sides, dims, rows),
        past=_take(call.past, dims, rows),
    )


def _mask_rows(mask: Mask | None, dims: Mapping[str, int | None], rows: range) -> Mask | None:
    if isinstance(mask, dict):
        return {
            kind: None if part is None else _narrowed(part, dims[f"attention_mask.{kind}"], rows)
            for kind, part in mask.items()
        }
    return None if mask is None else _narrowed(mask, dims["attention_mask"], rows)


def _output_dim(stack: StackSpec, name: str) -> int:
    if name.startswith("record.router_logits"):
        return 0  # [B * T, E] or [B, T, E], rows first
    name = "hidden_states" if name.startswith("record.") else name
    dim = stack.carried[name].batch
    assert dim is not None  # else nothing was cut
    return dim


def _joined(tensors: Sequence[torch.Tensor], dim: int, microbatches: Sequence[Microbatch]) -> torch.Tensor:
    """Raises: NotCutError: one is not as long as its rows, or as many times as long as the others are."""
    lengths = [tensor.shape[dim] for tensor in tensors]
    each = lengths[0] // len(microbatches[0].rows)
    num_tokens = microbatches[0].call.num_tokens
    is_right = [length == each * len(part.rows) for length, part in zip(lengths, microbatches, strict=True)]
    if each not in (1, num_tokens) or not all(is_right):
        raise NotCutError(f"tensors of lengths {lengths} are of {[len(part.rows) for part in microbatches]} rows")
    return torch.cat(list(tensors), dim)
