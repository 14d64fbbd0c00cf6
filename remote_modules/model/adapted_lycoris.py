"""LoHa and LoKr on a linear layer, in peft's order of operations: an update of the size of the weight itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from remote_modules.model.adapted_item import Batch, Item
from remote_modules.model.adapter_entries import LoHa

__all__ = ["updated_output"]


def updated_output(items: Sequence[Item], x: torch.Tensor, result: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Output of the layer, from its input and its own output. Any shape before the features."""
    for item in items:
        update = _loha(item, batch) if isinstance(item.entry, LoHa) else _lokr(item, batch)
        given = x.to(update.dtype) if item.entry.cast_input else x
        result = result + F.linear(given, update)
    return result.to(x.dtype)


def _loha(item: Item, batch: Batch) -> torch.Tensor:
    scale = torch.tensor(item.entry.scaling)
    weight: torch.Tensor = _Hadamard.apply(*item.tensors, scale)  # type: ignore[no-untyped-call]
    if item.entry.rank_dropout > 0:
        kept = _kept(item, batch, weight).to(weight.dtype)
        weight = weight * (kept / kept.mean()).view(-1, 1).to(weight.device)
    return weight


def _lokr(item: Item, batch: Batch) -> torch.Tensor:
    named = dict(zip(item.entry.tensor_names, item.tensors, strict=True))
    first = named["w1"] if "w1" in named else named["w1_a"] @ named["w1_b"]
    second = named["w2"] if "w2" in named else named["w2_a"] @ named["w2_b"]
    weight: torch.Tensor = torch.kron(first, second.contiguous()) * item.entry.scaling
    if item.entry.rank_dropout > 0:
        kept = _kept(item, batch, weight).float()
        if item.entry.scales_dropout:
            kept = kept / kept.mean()
        weight *= kept.view(-1, 1).to(weight.device)  # in place: a bfloat16 weight stays one
    return weight


def _kept(item: Item, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
    """Which outputs of the update stay: the same of all rows."""
    drawn: torch.Tensor = torch.rand(weight.shape[0], generator=batch.generator(item)) > item.entry.rank_dropout
    return drawn


class _Hadamard(torch.autograd.Function):
    """Of two products of low rank; the backward multiplies in the order in which peft does."""

    @staticmethod
    def forward(
        ctx: Any, w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(w1_a, w1_b, w2_a, w2_b, scale)
        return ((w1_a @ w1_b) * (w2_a @ w2_b)) * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w1_a, w1_b, w2_a, w2_b, scale = ctx.saved_tensors
        grad = grad * scale
        of_first, of_second = grad * (w2_a @ w2_b), grad * (w1_a @ w1_b)
        return of_first @ w1_b.T, w1_a.T @ of_first, of_second @ w2_b.T, w2_a.T @ of_second, None
