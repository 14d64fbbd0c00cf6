"""LoRA, rsLoRA and DoRA on a linear layer, in peft's order of operations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapted_item import Batch, Item

__all__ = ["lora_output", "row_lora_output"]

_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes; known by name, as it need not be installed


def lora_output(items: Sequence[Item], x: torch.Tensor, result: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Output of the layer, from its input and its own output. Any shape before the features."""
    dtype = result.dtype
    is_quantized = type(items[0].module).__name__ in _QUANTIZED
    casts = not (is_quantized and torch.is_autocast_enabled())
    for item in items:
        down, up = item.tensors[:2]
        if casts and item.entry.cast_input:
            x = x.to(down.dtype)
        if item.entry.is_dora:
            result = _dora(item, x, result, batch)
            if is_quantized and casts:
                result = result.to(dtype)
        else:
            update = F.linear(F.linear(_dropped(item, x, batch), down), up) * item.entry.scaling
            result = result + (update.to(dtype) if is_quantized and casts else update)
    output: torch.Tensor = result if is_quantized else result.to(dtype)
    return output


def row_lora_output(items: Sequence[Item], x: torch.Tensor, result: torch.Tensor, batch: Batch) -> torch.Tensor:
    """As `lora_output`, for rows that have different adapters; ``result`` is changed, as peft changes it."""
    dtype = result.dtype
    is_quantized = type(items[0].module).__name__ in _QUANTIZED
    casts = not (is_quantized and torch.is_autocast_enabled())
    for item in items:
        down, up = item.tensors
        rows = batch.rows_of(item.entry.group, x)
        if not len(rows):
            continue
        if is_quantized and casts and item.entry.cast_input:
            x = x.to(down.dtype)
        own = x[rows] if is_quantized else x[rows].to(down.dtype)
        update = F.linear(F.linear(own, down), up) * item.entry.scaling
        result[rows] += update.to(dtype) if casts else update
    return result


def _dora(item: Item, x: torch.Tensor, result: torch.Tensor, batch: Batch) -> torch.Tensor:
    down, up, magnitude = item.tensors
    module, scaling = item.module, item.entry.scaling
    base: torch.Tensor | None = result
    if item.entry.dropout > 0:
        x, base = _dropped(item, x, batch), None
    identity = torch.eye(down.shape[1], device=down.device, dtype=down.dtype)
    update = F.linear(F.linear(identity, down), up).T.to(x.dtype)
    weight = _weight(module).to(x.dtype)
    by_output = weight.T if isinstance(module, Conv1D) else weight
    total = by_output + scaling * update.detach()
    norm = torch.linalg.norm(total, dim=1).to(total.dtype).detach()
    scale = (magnitude / norm).view(1, -1)
    lora = F.linear(F.linear(x, down), up)
    if base is None:
        base = F.linear(x, by_output)
    elif module.bias is not None:
        base = base - module.bias
    output: torch.Tensor = result + ((scale - 1) * base + scale * lora * scaling)
    return output


def _weight(module: Any) -> torch.Tensor:
    """In full precision where it is quantized."""
    weight: torch.Tensor = module.weight
    if type(module).__name__ == "Linear4bit":
        dequantize: Any = sys.modules["bitsandbytes"].functional.dequantize_4bit
        weight = dequantize(module.weight.data, module.weight.quant_state)
    elif type(module).__name__ == "Linear8bitLt":
        raise UnsupportedCallError("DoRA on peers that hold 8-bit weights is not carried; use LoRA or other peers")
    return weight


def _dropped(item: Item, x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """``x`` with dropout. The mask is drawn on the CPU, so that a peer with another device draws the same."""
    entry = item.entry
    if entry.dropout == 0.0:
        return x
    keep = batch.uniform(item, x.shape) >= entry.dropout
    dropped: torch.Tensor = x * keep.to(x.device, x.dtype) / (1.0 - entry.dropout)
    return dropped
