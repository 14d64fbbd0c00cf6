"""What the tensors of an adapter held when a call began, and their digests, taken on the caller's thread.

A pass needs a copy of each tensor anyway, as the optimizer may change it before the backward. A tensor is hashed again
only if it differs from the copy that was taken last: the contents are compared, bit by bit, which costs a fraction of a
hash. Version counters would not do: a write through ``.data`` leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from remote_modules.model.adapter_content import part_digest

__all__ = ["Snapshot", "Snapshots"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One tensor.

    Attributes:
        tensor: a copy on the CPU; never written to.
        digest: see `model.adapter_content.part_digest`.
    """

    tensor: torch.Tensor
    digest: bytes

    @classmethod
    def take(cls, tensor: torch.Tensor) -> Snapshot:
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return cls(copy, part_digest(copy))

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` has the same bits: NaN equals itself, and 0.0 is not -0.0."""
        if (tensor.dtype, tensor.shape) != (self.tensor.dtype, self.tensor.shape):
            return False
        bits = _BITS.get(tensor.itemsize)
        return bits is not None and torch.equal(tensor.detach().to("cpu").view(bits), self.tensor.view(bits))


class Snapshots:
    """Of the adapters of one set of remote blocks: one of each tensor, the latest. Any thread may ask."""

    def __init__(self) -> None:
        self._latest: tuple[Snapshot, ...] = ()

    def take(self, tensors: Sequence[torch.Tensor]) -> tuple[Snapshot, ...]:
        """What ``tensors`` hold now."""
        latest = self._latest
        found = []
        for number, tensor in enumerate(tensors):
            before = latest[number] if number < len(latest) else None
            found.append(before if before is not None and before.is_of(tensor) else Snapshot.take(tensor))
        self._latest = tuple(found)
        return self._latest
