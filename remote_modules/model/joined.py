"""Projections of the same input as one matrix: queries, keys and values; gate and up.

A small matrix does not keep an accelerator busy, and each is a kernel of its own. Which linear layers take the same
tensor is seen in one run of the blocks. Their weights are put one after another in memory, each still a parameter of
its own layer, so everything else goes on as before; only within `JoinedLinears.used` the first of them multiplies for
all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["JoinedLinears"]


class JoinedLinears:
    """
    Args:
        blocks: whose linear layers are looked at.
        run: calls the blocks once.
    """

    def __init__(self, blocks: Iterable[nn.Module], run: Callable[[], object]) -> None:
        seen: dict[int, list[nn.Linear]] = {}
        inputs: list[torch.Tensor] = []  # so that no two have the same identity

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Linear)
            inputs.append(args[0])
            seen.setdefault(id(args[0]), []).append(module)

        linears = [module for block in blocks for module in block.modules() if type(module) is nn.Linear]
        handles = [linear.register_forward_pre_hook(note) for linear in linears]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        weights: _Weights = {}  # blocks may share theirs
        self._groups = [_Group(group, weights) for group in seen.values() if _may_join(group)]

    def __len__(self) -> int:
        return len(self._groups)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Meanwhile the layers of a group must be called one after another, with the same input."""
        try:
            for group in self._groups:
                group.enter()
            yield
        finally:
            for group in self._groups:
                group.leave()


_Weights = dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]]  # by the identities of those joined


class _Group:
    def __init__(self, linears: list[nn.Linear], weights: _Weights) -> None:
        self._linears = linears
        self._sizes = [linear.out_features for linear in linears]
        key = tuple(id(linear.weight) for linear in linears)
        if key not in weights:
            weights[key] = _joined(linears)
        self._weight, self._bias = weights[key]
        self._parts: tuple[torch.Tensor, ...] = ()

    def enter(self) -> None:
        for number, linear in enumerate(self._linears):
            linear.forward = self._multiply if number == 0 else _Part(self, number)  # type: ignore[method-assign, assignment]

    def leave(self) -> None:
        self._parts = ()
        for linear in self._linears:
            vars(linear).pop("forward", None)

    def _multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        self._parts = nn.functional.linear(inputs, self._weight, self._bias).split(self._sizes, dim=-1)
        return self._parts[0]

    def part(self, number: int) -> torch.Tensor:
        return self._parts[number]


def _joined(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        weight = torch.cat([linear.weight for linear in linears])
        for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
            linear.weight.data = part
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return weight, bias


class _Part:
    """Of what the first layer of a group made."""

    def __init__(self, group: _Group, number: int) -> None:
        self._group = group
        self._number = number

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._group.part(self._number)


def _may_join(linears: list[nn.Linear]) -> bool:
    first = linears[0]
    return (
        len(linears) > 1
        and len(set(linears)) == len(linears)
        and all(linear.weight.dtype == first.weight.dtype for linear in linears)
        and all((linear.bias is None) == (first.bias is None) for linear in linears)
        and not any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears)
    )
