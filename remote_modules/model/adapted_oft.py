"""OFT at a linear layer, in peft's order of operations: its input is rotated, in groups of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remote_modules.model.adapted_item import Item

__all__ = ["rotated_input"]


def rotated_input(items: Sequence[Item], x: torch.Tensor) -> torch.Tensor:
    """What the layer takes instead of ``x``. Any shape before the features."""
    dtype = x.dtype
    for item in items:
        own = item.tensors[0].dtype
        if item.entry.cast_input:
            x = x.to(own)
        given = x.dtype
        x = _rotated(item, x.to(own)).to(given)
    return x.to(dtype)


def _rotated(item: Item, x: torch.Tensor) -> torch.Tensor:
    entry = item.entry
    groups = entry.num_inputs // entry.size
    rotation = _cayley(item)
    if entry.is_shared:
        rotation = rotation.repeat(groups, 1, 1)
    grouped = x.reshape(*x.shape[:-1], groups, entry.size)
    rotated: torch.Tensor = torch.einsum("...rk,rkc->...rc", grouped, rotation).reshape(x.shape)
    return rotated


def _cayley(item: Item) -> torch.Tensor:
    """Rotations ``[groups, size, size]``: (I + Q)^-1 (I - Q), or the first terms of its series."""
    triangle, size, terms = item.tensors[0], item.entry.size, item.entry.neumann_terms
    count = triangle.shape[0]
    rows, columns = torch.triu_indices(size, size, 1, device=triangle.device)
    upper = torch.zeros(count, size, size, device=triangle.device, dtype=triangle.dtype)
    upper[:, rows, columns] = triangle
    skew = upper - upper.transpose(-2, -1)
    if terms == 0:
        identity = torch.eye(size, device=triangle.device).unsqueeze(0).expand(count, size, size)
        exact: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
        return exact.to(triangle.dtype)
    rotation = torch.eye(size, device=triangle.device, dtype=triangle.dtype).repeat(count, 1, 1)
    if terms > 1:
        rotation.add_(skew, alpha=2.0)
    if terms > 2:
        power = square = torch.bmm(skew, skew)
        rotation.add_(square, alpha=2.0)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, skew)
            rotation.add_(power, alpha=2.0)
        rotation.add_(torch.bmm(power, skew))
    return rotation
