"""IA3 vectors, in peft's order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remote_modules.model.adapted_item import Item

__all__ = ["ia3_input", "ia3_scale"]


def ia3_scale(items: Sequence[Item]) -> torch.Tensor:
    scale: torch.Tensor = items[0].tensors[0].flatten()
    for item in items[1:]:
        scale = scale * item.tensors[0].flatten()
    return scale


def ia3_input(items: Sequence[Item], x: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = x.to(items[-1].tensors[0].dtype) * ia3_scale(items)
    return scaled.to(x.dtype)
