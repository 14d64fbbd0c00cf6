"""Attention of decode steps whose keys and values lie in an arena: one query token of each row, rows of any lengths.

Registered with transformers under a name of its own, which the configs bear only while a graph is captured. The kernel
is torch's flash attention, told by numbers on the device where each row's tokens begin and how many they are. It takes
the query heads of a group together, so keys and values are read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.library import custom_op
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.arena import Buffers

__all__ = ["NAME", "Rows", "attending"]

NAME = "remote_modules_decode"
FIELD = "_attn_implementation_internal"  # the property beside it would set parts of the config that we do not use
_REFUSED = ("softcap", "s_aux", "position_bias", "sliding_window", "head_mask")  # what the kernel does not do


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of a step lie, on the device.

    Attributes:
        starts: int32 ``[R + 1]``: first token of each row in the arena; the last is not read.
        positions: int64 ``[R]``: tokens that each row holds before the step.
        query_starts: int32 ``[R + 1]``: 0, 1, 2, ...
        max_tokens: of any row; the kernel divides so many among the processors.
    """

    starts: torch.Tensor
    positions: torch.Tensor
    query_starts: torch.Tensor
    max_tokens: int


@dataclass(slots=True)
class _Current:
    """The step that is being captured."""

    rows: Rows | None = None
    layers: Mapping[int, Buffers] | None = None


_current = _Current()  # no context variable: compiled blocks read it


@contextmanager
def attending(configs: list[Any], rows: Rows, layers: Mapping[int, Buffers]) -> Iterator[None]:
    """Attention of models of ``configs`` goes to the arena's ``layers``, in this thread's only use of these models."""
    before = [getattr(config, FIELD) for config in configs]
    _current.rows, _current.layers = rows, layers
    try:
        for config in configs:
            setattr(config, FIELD, NAME)
        yield
    finally:
        _current.rows = _current.layers = None
        for config, name in zip(configs, before, strict=True):
            setattr(config, FIELD, name)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    rows, layers = _current.rows, _current.layers
    if rows is None or layers is None or attention_mask is not None:
        raise UnsupportedCallError("this attention is for decode steps without a mask")
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedCallError(f"attention with {name} is not captured")
    keys, values = layers[module.layer_idx]  # type: ignore[index]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = torch.ops.remote_modules.decode_attention(
        query, key, value, keys, values, rows.starts, rows.positions, rows.query_starts, scale
    )
    return output, None


@custom_op(
    "remote_modules::decode_attention",
    mutates_args=("keys", "values"),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor starts, Tensor positions, "
        "Tensor query_starts, float scale) -> Tensor"
    ),
)
def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    positions: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Write the new token's key and value, then attend.

    Args:
        query: ``[R, query heads, 1, K]``.
        key, value: ``[R, heads, 1, K]``.
        keys, values: ``[N, heads, K]``.

    Returns:
        ``[R, 1, query heads, K]``.
    """
    slots = starts[:-1].long() + positions
    keys.index_copy_(0, slots, key.squeeze(2))
    values.index_copy_(0, slots, value.squeeze(2))
    if query.is_cuda:
        assert _current.rows is not None
        max_tokens = _current.rows.max_tokens  # no argument: for each number all blocks would be compiled
        used = (positions + 1).int()
        flash = torch.ops.aten._flash_attention_forward
        queries = query.squeeze(2)
        found = flash(
            queries, keys, values, query_starts, starts, 1, max_tokens, 0.0, False, False, scale=scale, seqused_k=used
        )
        return found[0].unsqueeze(1)  # type: ignore[no-any-return]
    return _attended_by_row(query, keys, values, starts, positions, scale)


def _attended_by_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same in other words, for the CPU."""
    outputs = []
    for row, (start, position) in enumerate(zip(starts.tolist(), positions.tolist(), strict=False)):
        seen = slice(start, start + position + 1)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                query[row],
                keys[seen].transpose(0, 1),
                values[seen].transpose(0, 1),
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.stack(outputs).transpose(1, 2).contiguous()


@decode_attention.register_fake
def _shape(query: torch.Tensor, *args: Any) -> torch.Tensor:
    return query.new_empty((query.shape[0], 1, query.shape[1], query.shape[3]))


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
