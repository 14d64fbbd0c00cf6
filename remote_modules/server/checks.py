"""Everything that a request from the network must satisfy before any work is done for it.

Each check raises `PeerRefused` with ``bad_request`` (the client's mistake) or ``not_served`` (this peer's span
differs), in one line that says what was expected and what came. Nothing here allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from remote_modules.errors import PeerRefused, RefusalReason, UnsupportedCallError
from remote_modules.model.past import length_of, names_of
from remote_modules.model.stack import CACHE_ARGUMENTS, INPUT_ARGUMENTS, StackSpec
from remote_modules.model.tensors import TensorSpec
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp, CallMeta, CopyRequest, Request, StepRequest, kind_of

__all__ = ["RequestTensors", "check_blocks", "check_kept_gradients", "check_ops", "check_tensors", "refuse"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AUTOCASTS = ("", "bfloat16", "float16")
_MAX_POSITION_KINDS = 8
_MAX_POSITIONS = 2**31
_RESERVED = {"input_ids", *INPUT_ARGUMENTS, *CACHE_ARGUMENTS, "attention_mask", "position_ids", "use_cache"}
_RESERVED |= {"output_attentions", "output_hidden_states", "self"}
_INTEGERS = (torch.int64, torch.int32, torch.bool)
_MASK_DTYPES = (torch.int64, torch.int32, torch.bool, torch.float32, torch.uint8)


def refuse(text: str, reason: RefusalReason = RefusalReason.BAD_REQUEST) -> NoReturn:
    raise PeerRefused(text, peer_id="", reason=reason)


def check_blocks(request: Request | CopyRequest, held: Span, stack: StackSpec) -> Span:
    """The blocks to run."""
    if not 0 <= request.start < request.end <= stack.num_blocks:
        refuse(f"span {request.start}:{request.end} is outside the model's blocks 0:{stack.num_blocks}")
    blocks = Span(request.start, request.end)
    if not held.covers(blocks):
        refuse(f"blocks {blocks} are not served here, this peer holds {held}", RefusalReason.NOT_SERVED)
    try:
        stack.check_cuts(blocks)
    except UnsupportedCallError as exc:
        refuse(str(exc))
    return blocks


@dataclass(slots=True)
class RequestTensors:
    """What came with a request.

    Attributes:
        inputs: what enters the first block, and side inputs.
        position_ids, attention_mask, owner: as the owner of the blocks takes them.
        indices: of cache operations.
        grads: of the outputs, for a backward.
        past: keys and values that the cache begins with.
        adapter, adapter_tensors: entries and tensors of an adapter.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None
    owner: dict[str, torch.Tensor] = field(default_factory=dict)
    indices: dict[str, torch.Tensor] = field(default_factory=dict)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    past: dict[str, torch.Tensor] = field(default_factory=dict)
    adapter: torch.Tensor | None = None
    adapter_tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    request: Request,
    stack: StackSpec,
    blocks: Span,
    *,
    hidden_size: int,
    max_batch_tokens: int,
    vocab_size: int | None = None,
) -> RequestTensors:
    """The tensors of a request by what they are for, once names, shapes and dtypes fit the model and each other.

    Args:
        vocab_size: token ids are below it.
    """
    kind, call = kind_of(request), request.call
    _check_hidden(tensors, kind, call, stack, hidden_size)
    _check_call(call, max_batch_tokens)
    sides = stack.side_specs(blocks)
    wanted = {**stack.carried, **sides} if blocks.start else {"hidden_states": stack.hidden, **sides}
    found = _sorted(tensors, wanted)
    num_past = request.position if isinstance(request, StepRequest) else _past_length(found.past)
    num_columns = num_past + call.num_tokens
    for name, tensor in found.inputs.items():
        if name != "hidden_states":  # which fit
            most = num_columns if name.startswith("state.") else vocab_size
            _check_other(name, tensor, wanted[name], call, hidden_size, most)
    missing = [name for name in sides if name not in found.inputs]
    if missing:
        refuse(f"blocks {blocks} need the side inputs {missing[:4]}")
    if call.position_rows:
        found.position_ids = _following(found.position_ids, request)
    elif found.position_ids is not None:
        _check_positions(found.position_ids, call.rows, call.num_tokens)
    _check_masks(found, call, num_columns)
    if found.past:
        _check_past(found.past, stack, blocks, call.rows)
    if (found.adapter is not None or found.adapter_tensors) and not call.adapter:
        refuse("a request that brings an adapter must name it")
    if kind == "backward":
        _check_gradients(found)
    return found


def _check_hidden(
    tensors: Mapping[str, torch.Tensor], kind: str, call: CallMeta, stack: StackSpec, hidden_size: int
) -> None:
    hidden_states = tensors.get("hidden_states")
    if hidden_states is None:
        refuse(f"a {kind} needs a tensor 'hidden_states', got {sorted(tensors)[:8]}")
    if hidden_states.dtype not in _FLOATS:
        refuse(f"hidden states must be floating point, got {hidden_states.dtype}")
    rows, num_tokens = call.rows, call.num_tokens
    if rows * num_tokens == 0 or not stack.hidden.fits(hidden_states, rows, num_tokens, hidden_size):
        expected, got = stack.hidden.text(hidden_size), list(hidden_states.shape)
        refuse(f"hidden states must be {expected} for {rows} x {num_tokens} tokens, got {got}")


def _check_other(
    name: str, tensor: torch.Tensor, spec: TensorSpec, call: CallMeta, hidden_size: int, most: int | None
) -> None:
    """Args: most: that indices are below."""
    if not spec.fits(tensor, call.rows, call.num_tokens, hidden_size):
        refuse(f"{name!r} must be {spec.text(hidden_size)}, got {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_floating_point():
        _check_indices(name, tensor, most)


def _check_call(call: CallMeta, max_batch_tokens: int) -> None:
    if call.rows * call.num_tokens > max_batch_tokens:
        batch = f"{call.rows} x {call.num_tokens}"
        refuse(f"a request may hold {max_batch_tokens} tokens, got {batch}; send smaller ones")
    if call.autocast not in _AUTOCASTS:
        refuse(f"autocast must be bfloat16 or float16, got {call.autocast!r}")
    if call.adapter_rows and len(call.adapter_rows) != call.rows:
        refuse(f"adapter_rows must be of {call.rows} rows, got {len(call.adapter_rows)}")
    wrong = [option.name for option in call.options if option.name in _RESERVED or not option.name.isidentifier()]
    if wrong:
        refuse(f"{wrong[0]!r} may not be an option of a request")


def _sorted(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, TensorSpec]) -> RequestTensors:
    """By name alone."""
    found = RequestTensors()
    masks: dict[str, torch.Tensor | None] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if name in wanted:
            found.inputs[name] = tensor
        elif name == "position_ids":
            found.position_ids = tensor
        elif name == "attention_mask":
            found.attention_mask = tensor
        elif head == "attention_mask" and rest:
            masks[rest] = None if tensor.numel() == 0 else tensor
        elif not _sort_other(found, name, tensor):
            refuse(f"tensor {name!r} is not one that these blocks take: {sorted(wanted)[:8]}")
    if masks and found.attention_mask is not None:
        refuse("attention_mask may be one tensor or one for each type of layer, got both")
    if masks:
        found.attention_mask = masks
    return found


def _sort_other(found: RequestTensors, name: str, tensor: torch.Tensor) -> bool:
    head, _, rest = name.partition(".")
    if name == "adapter" and tensor.dtype == torch.uint8 and tensor.dim() == 1:
        found.adapter = tensor
        return True
    group = {"indices": found.indices, "grad": found.grads, "owner": found.owner, "adapter": found.adapter_tensors}
    group["past"] = found.past
    if head not in group or not rest or (head == "owner" and (rest in _RESERVED or not rest.isidentifier())):
        return False
    group[head][name if head in ("indices", "adapter", "past") else rest] = tensor
    return True


def _past_length(past: Mapping[str, torch.Tensor]) -> int:
    for name, tensor in past.items():
        if tensor.dim() != 4:
            refuse(f"{name!r} must be [B, heads, tokens, size], got {list(tensor.shape)}")
    return length_of(past)


def _check_past(past: Mapping[str, torch.Tensor], stack: StackSpec, blocks: Span, rows: int) -> None:
    expected = [name for layer in stack.layers_of(blocks) for name in names_of(layer)]
    if past.keys() != set(expected):
        refuse(f"keys and values must be given for all of {expected[:4]}..., got {sorted(past)[:4]}")
    length = _past_length(past)
    for name, tensor in past.items():
        is_right = tensor.numel() and (tensor.shape[0], tensor.shape[2]) == (rows, length)
        if not is_right or tensor.dtype not in _FLOATS:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            refuse(f"{name!r} must be [{rows}, heads, {length}, size] of floats, got {got}")


def check_ops(
    request: StepRequest | CopyRequest,
    tensors: Mapping[str, torch.Tensor],
    *,
    position: int,
    rows: int,
    can_go_back: bool = True,
) -> tuple[int, int, int]:
    """(position, rows) after the request's cache operations, and the most rows that the cache has while they run.

    Args:
        can_go_back: whether some of the last tokens can be taken back.
    """
    most_rows = 0
    for op in request.ops:
        if op.kind == "crop" and 0 < op.length < position and not can_go_back:
            refuse("this model's cache cannot go back; open another session", RefusalReason.SESSION_LOST)
        position, rows = _check_op(op, tensors, position, rows)
        most_rows = max(most_rows, rows if position else 0)
    return position, rows, most_rows


def _check_op(op: CacheOp, tensors: Mapping[str, torch.Tensor], position: int, rows: int) -> tuple[int, int]:
    if op.kind == "reset":
        return 0, rows
    if op.kind == "crop":
        if op.length > position:
            refuse(f"cannot crop to {op.length} tokens, the session has {position}")
        return op.length, rows
    indices = tensors.get(op.tensor)
    if indices is None or indices.dtype != torch.int64 or indices.dim() != 1 or len(indices) == 0:
        refuse(f"select needs an int64 vector named {op.tensor!r}")
    if position and not (0 <= int(indices.min()) and int(indices.max()) < rows):
        refuse(f"select names rows {int(indices.min())}..{int(indices.max())}, the session has {rows}")
    return position, len(indices)


def _check_positions(position_ids: torch.Tensor, rows: int, num_tokens: int) -> None:
    if position_ids.dtype != torch.int64 or position_ids.dim() not in (2, 3):
        refuse(f"position_ids must be int64 [B, T], got {position_ids.dtype} {list(position_ids.shape)}")
    if position_ids.shape[-2] not in (1, rows) or position_ids.shape[-1] != num_tokens:
        refuse(f"position_ids must be [{rows}, {num_tokens}], got {list(position_ids.shape)}")
    if position_ids.dim() == 3 and not 0 < position_ids.shape[0] <= _MAX_POSITION_KINDS:
        refuse(f"position_ids may be of {_MAX_POSITION_KINDS} kinds, got {list(position_ids.shape)}")
    few = position_ids.flatten().tolist() if num_tokens == 1 else None
    low, high = (min(few), max(few)) if few else (int(position_ids.min()), int(position_ids.max()))
    if low < 0 or high >= _MAX_POSITIONS:
        refuse("position_ids must be in 0:2**31")


def _following(position_ids: torch.Tensor | None, request: Request) -> torch.Tensor:
    """What the client left out, as it counts up from the position."""
    call = request.call
    if position_ids is not None or not isinstance(request, StepRequest) or call.position_rows not in (1, call.rows):
        refuse(f"position_rows must be 1 or {call.rows}, in a step without position_ids; got {call.position_rows}")
    start, end = request.position, request.position + call.num_tokens
    if end > _MAX_POSITIONS:
        refuse("position_ids must be in 0:2**31")
    if call.num_tokens == 1:
        return torch.full((call.position_rows, 1), start)
    return torch.arange(start, end).repeat(call.position_rows, 1)


def _check_masks(found: RequestTensors, call: CallMeta, num_columns: int) -> None:
    mask = found.attention_mask
    if isinstance(mask, torch.Tensor):
        _check_mask("attention_mask", mask, call, num_columns)
    elif mask is not None:
        for kind, part in mask.items():
            name = f"attention_mask.{kind}"
            if part is not None:
                _check_mask(name, part, call, num_columns)
            if part is not None and part.dim() == 2 and part.shape[1] != num_columns:
                refuse(f"{name!r} must have {num_columns} columns, got {part.shape[1]}")


def _check_mask(name: str, mask: torch.Tensor, call: CallMeta, num_columns: int) -> None:
    """Columns of two-dimensional masks are for the session to check, which may have others already."""
    rows, num_tokens = call.rows, call.num_tokens
    if mask.dim() == 2 and mask.shape[0] == rows and mask.dtype in _MASK_DTYPES:
        return
    is_large = mask.dim() in (3, 4) and mask.numel() > 0 and mask.dtype in (*_MASK_DTYPES, *_FLOATS)
    if is_large and mask.shape[0] in (1, rows) and mask.shape[-2] in (1, num_tokens) and mask.shape[-1] <= num_columns:
        return
    refuse(
        f"{name!r} must be [{rows}, tokens] of integers or bools, or [{rows}, h, {num_tokens}, {num_columns}], "
        f"got {mask.dtype} {list(mask.shape)}"
    )


def _check_indices(name: str, tensor: torch.Tensor, most: int | None) -> None:
    """One out of bounds can end the whole process on an accelerator."""
    if tensor.dtype not in _INTEGERS:
        refuse(f"{name!r} must be int64 or int32, got {tensor.dtype}")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or (most is not None and high >= most):
        refuse(f"{name!r} must be in 0:{most}, got {low}..{high}")


def check_kept_gradients(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of outputs by the outputs' names; shapes are compared when the forward's outputs are at hand."""
    wrong = [name for name in tensors if not name.startswith("grad.")]
    if wrong:
        refuse(f"the backward of a kept forward takes gradients alone, got {wrong[:4]}")
    grads = {name.removeprefix("grad."): tensor for name, tensor in tensors.items()}
    _check_floats(grads)
    return grads


def _check_floats(grads: Mapping[str, torch.Tensor]) -> None:
    if "hidden_states" not in grads:
        refuse("a backward needs a tensor 'grad.hidden_states'")
    for name, grad in grads.items():
        if grad.dtype not in _FLOATS:
            refuse(f"gradient {name!r} must be floating point, got {grad.dtype}")


def _check_gradients(found: RequestTensors) -> None:
    """Shapes of other gradients are compared with the outputs, once these are known."""
    _check_floats(found.grads)
    grad, hidden = found.grads["hidden_states"], found.inputs["hidden_states"]
    if grad.shape != hidden.shape:
        refuse(f"grad.hidden_states must be {list(hidden.shape)}, got {list(grad.shape)}")
