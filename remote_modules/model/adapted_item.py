"""One adapter entry together with the real module that it changes at a peer, and what it may know of the request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remote_modules.errors import UnsupportedCallError

__all__ = ["Batch", "Item"]


@dataclass(frozen=True, slots=True)
class Item:
    """One entry and the module that it changes."""

    entry: Any
    tensors: Sequence[torch.Tensor]
    module: Any
    number: int  # among those of the module


@dataclass(frozen=True, slots=True)
class Batch:
    """Which part of the client's batch a request is, and its random numbers.

    These are decided by seed, block, module and, where each row has its own, the row's number in the client's batch:
    they are the same however the batch is split, in a recomputation, and on a device of another kind.

    Attributes:
        rows, num_tokens: shape of the owner's inputs ``[B, T]``; 0: unknown.
        first_row: number of the first row in the client's batch.
        position: tokens in the KV cache before.
        seed: None if there is no dropout.
        adapter_rows: of each row the group of its adapter, where rows have different ones; 0: none.
    """

    rows: int = 0
    num_tokens: int = 0
    first_row: int = 0
    position: int = 0
    seed: int | None = None
    adapter_rows: bytes = b""

    def rows_of(self, group: int, x: torch.Tensor) -> torch.Tensor:
        """Numbers of the rows of ``x`` that have the adapter of this group.

        Raises:
            UnsupportedCallError: ``x`` is not made of the batch's rows.
        """
        if len(x) != len(self.adapter_rows):
            text = f"adapters are given for {len(self.adapter_rows)} rows, but an adapted layer takes {len(x)}"
            raise UnsupportedCallError(f"{text}: several adapters in one batch need layers that keep rows apart")
        found = [row for row, own in enumerate(self.adapter_rows) if own == group]
        return torch.tensor(found, dtype=torch.int64, device=x.device)

    def generator(self, item: Item, *more: int) -> torch.Generator:
        """On the CPU, whatever the device is."""
        text = " ".join(map(str, (self.seed, item.entry.block, item.entry.module, item.number, *more)))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def uniform(self, item: Item, shape: torch.Size) -> torch.Tensor:
        """Of ``shape`` ``[B, ...]`` or ``[B * T, ...]``, on the CPU; of each row its own."""
        rows = self.rows or shape[0]
        if shape[0] not in (rows, rows * self.num_tokens):  # such as tokens that were sent to one of the experts
            return torch.rand(shape, generator=self.generator(item, self.first_row))
        of_row = (shape[0] // rows, *shape[1:])
        numbers = range(self.first_row, self.first_row + rows)
        drawn = [torch.rand(of_row, generator=self.generator(item, number)) for number in numbers]
        return torch.cat(drawn)
