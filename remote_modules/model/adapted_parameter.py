"""LoRA on a parameter, such as the fused weights of all experts, in peft's order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remote_modules.model.adapted_item import Item

__all__ = ["adapted_parameter"]


def adapted_parameter(items: Sequence[Item]) -> torch.Tensor:
    """The parameter with all its updates, in its own shape and dtype."""
    entry, module = items[0].entry, items[0].module
    weight: torch.Tensor = module._parameters[entry.parameter]
    if len(items) == 1 and entry.num_experts > 1:
        left, right = _factors(items[0])
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            folded: torch.Tensor = torch.baddbmm(weight, left, right, alpha=entry.scaling)
            return folded
    update = _update(items[0]).to(weight.dtype)
    for item in items[1:]:
        update = update + _update(item).to(weight.dtype)
    return weight + update


def _factors(item: Item) -> tuple[torch.Tensor, torch.Tensor]:
    """The two whose product is the update without scaling: ``[E, out, r]``, ``[E, r, in]`` or both transposed."""
    down, up = item.tensors
    experts = item.entry.num_experts
    a = down.reshape(experts, -1, down.shape[-1])
    b = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    return (a.transpose(-2, -1), b.transpose(-2, -1)) if item.entry.is_in_out else (b, a)


def _update(item: Item) -> torch.Tensor:
    down, up = item.tensors
    experts, scaling = item.entry.num_experts, item.entry.scaling
    if experts == 1:
        is_slow = up.device.type == "cpu" and up.dtype in (torch.float16, torch.bfloat16)
        product: torch.Tensor = (up.float() @ down.float() if is_slow else up @ down) * scaling
        return product.to(up.dtype)
    a = down.reshape(experts, -1, down.shape[-1])
    b = up.reshape(up.shape[0], -1, experts)
    update: torch.Tensor = torch.einsum("ore,eri->eio" if item.entry.is_in_out else "ore,eri->eoi", b, a) * scaling
    return update
