"""IA3 vectors, in peft's order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remote_modules.model.adapted_item import Batch, Item

__all__ = ["ia3_input", "ia3_output"]


def ia3_output(items: Sequence[Item], x: torch.Tensor, result: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Output of the layer, from its own."""
    return (result * _ia3_scale(items)).to(result.dtype)


def _ia3_scale(items: Sequence[Item]) -> torch.Tensor:
    scale: torch.Tensor = items[0].tensors[0].flatten()
    for item in items[1:]:
        scale = scale * item.tensors[0].flatten()
    return scale


def ia3_input(items: Sequence[Item], x: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = x.to(items[-1].tensors[0].dtype) * _ia3_scale(items)
    return scaled.to(x.dtype)
