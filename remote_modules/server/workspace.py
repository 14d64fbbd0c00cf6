"""Memory that a pass takes beside weights and KV cache, measured.

Counts the tensors that are alive at once while a pass runs, on any device. What kernels take inside of one operation,
and what an allocator keeps, is not seen: `SLACK_BYTES` is added for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["extrapolate", "peak_bytes"]

SLACK_BYTES = 256 * 1024 * 1024


class _Peak(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and (key := _key(leaf)) not in known and key not in self._alive:
                self._note(leaf.untyped_storage(), key)
        return output

    def _note(self, storage: torch.UntypedStorage, key: int) -> None:
        num_bytes = storage.nbytes()
        self._alive.add(key)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.now_bytes -= num_bytes


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that tensors made by ``work`` held at once."""
    with _Peak() as peak:
        work()
    return int(peak.peak_bytes)


def extrapolate(num_tokens: int, few: int, few_bytes: int, twice_bytes: int) -> int:
    """Bytes for ``num_tokens``, from those for ``few`` and for twice as many.

    Part of a pass grows with the tokens, and part, where attention scores are kept, with their square.
    """
    square = max(0.0, (twice_bytes - 2 * few_bytes) / (2 * few * few))
    linear = max(0.0, few_bytes / few - square * few)
    return int(linear * num_tokens + square * num_tokens * num_tokens)
