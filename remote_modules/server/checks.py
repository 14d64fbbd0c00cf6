"""Everything that a request from the network must satisfy before any work is done for it.

Each check raises `PeerRefused` with ``bad_request`` (the client's mistake) or ``not_served`` (this peer's span
differs), in one line that says what was expected and what came. Nothing here allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp, Request, StepRequest

__all__ = ["check_blocks", "check_ops", "check_tensors", "refuse"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AUTOCASTS = ("", "bfloat16", "float16")
_MASK_DTYPES = (torch.int64, torch.int32, torch.bool, torch.float32, torch.uint8)


def refuse(text: str, reason: RefusalReason = RefusalReason.BAD_REQUEST) -> NoReturn:
    raise PeerRefused(text, peer_id="", reason=reason)


def check_blocks(request: Request, held: Span, num_blocks: int) -> Span:
    """The blocks to run."""
    if not 0 <= request.start < request.end <= num_blocks:
        refuse(f"span {request.start}:{request.end} is outside the model's blocks 0:{num_blocks}")
    blocks = Span(request.start, request.end)
    if not held.covers(blocks):
        refuse(f"blocks {blocks} are not served here, this peer holds {held}", RefusalReason.NOT_SERVED)
    return blocks


def check_tensors(
    tensors: Mapping[str, torch.Tensor], *, hidden_size: int, max_batch_tokens: int, autocast: str, kind: str
) -> torch.Tensor:
    """The hidden states, once every tensor of the request has a shape and dtype that fits them."""
    hidden_states = tensors.get("hidden_states")
    if hidden_states is None:
        refuse(f"a {kind} needs a tensor 'hidden_states', got {sorted(tensors)}")
    if hidden_states.dim() != 3 or hidden_states.shape[2] != hidden_size or hidden_states.numel() == 0:
        refuse(f"hidden states must be [B, T, {hidden_size}], got {list(hidden_states.shape)}")
    if hidden_states.dtype not in _FLOATS:
        refuse(f"hidden states must be floating point, got {hidden_states.dtype}")
    rows, num_tokens, _ = hidden_states.shape
    if rows * num_tokens > max_batch_tokens:
        refuse(f"a request may hold {max_batch_tokens} tokens, got {rows} x {num_tokens}; send smaller ones")
    if autocast not in _AUTOCASTS:
        refuse(f"autocast must be bfloat16 or float16, got '{autocast}'")
    _check_positions(tensors.get("position_ids"), rows, num_tokens)
    _check_mask(tensors.get("attention_mask"), rows)
    _check_gradient(tensors.get("grad_output"), hidden_states, kind)
    return hidden_states


def check_ops(
    request: StepRequest, tensors: Mapping[str, torch.Tensor], *, position: int, rows: int
) -> tuple[int, int, int]:
    """(position, rows) after the request's cache operations, and the most rows that the cache has while they run."""
    most_rows = 0
    for op in request.ops:
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
        refuse(f"select needs an int64 vector named '{op.tensor}'")
    if position and not (0 <= int(indices.min()) and int(indices.max()) < rows):
        refuse(f"select names rows {int(indices.min())}..{int(indices.max())}, the session has {rows}")
    return position, len(indices)


def _check_positions(position_ids: torch.Tensor | None, rows: int, num_tokens: int) -> None:
    if position_ids is None:
        return
    if position_ids.dtype != torch.int64 or position_ids.dim() != 2:
        refuse(f"position_ids must be int64 [B, T], got {position_ids.dtype} {list(position_ids.shape)}")
    if position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != num_tokens:
        refuse(f"position_ids must be [{rows}, {num_tokens}], got {list(position_ids.shape)}")
    if int(position_ids.min()) < 0 or int(position_ids.max()) >= 2**31:
        refuse("position_ids must be in 0:2**31")


def _check_mask(mask: torch.Tensor | None, rows: int) -> None:
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != rows or mask.dtype not in _MASK_DTYPES):
        refuse(f"attention_mask must be [{rows}, tokens] of integers or bools, got {mask.dtype} {list(mask.shape)}")


def _check_gradient(grad_output: torch.Tensor | None, hidden_states: torch.Tensor, kind: str) -> None:
    if kind != "backward":
        return
    if grad_output is None:
        refuse("a backward needs a tensor 'grad_output'")
    if grad_output.shape != hidden_states.shape or grad_output.dtype not in _FLOATS:
        expected, got = list(hidden_states.shape), list(grad_output.shape)
        refuse(f"grad_output must be floating point {expected}, got {grad_output.dtype} {got}")
