"""One piece of memory for the KV caches of all sessions, so that one captured graph can serve them all.

A CUDA graph reads and writes at the addresses that it was captured with. The buffers of all sessions therefore lie in
one tensor per layer, token after token; where a row's tokens begin is a number that the graph is told at each step.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["Arena", "Region", "Rooms"]

SPARE_TOKENS = 1  # the first: rows of a graph that no session uses read and write there

Buffers = tuple[torch.Tensor, torch.Tensor]


class Region:
    """Some tokens of an arena, one range for all layers; free again when nothing refers to it any more."""

    __slots__ = ("__weakref__", "_arena", "num_tokens", "start", "successor")

    def __init__(self, arena: Arena, start: int, num_tokens: int) -> None:
        self._arena = arena
        self.start = start
        self.num_tokens = num_tokens
        self.successor: weakref.ref[Region] | None = None  # what the other layers of a session move to

    def __del__(self) -> None:
        self._arena.returned.append((self.start, self.num_tokens))


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of the keys, and of the values, of one token."""

    heads: int
    head_size: int


class Arena:
    """
    Args:
        shapes: of the layers held.
        num_tokens: room, of all sessions together.

    Attributes:
        layers: keys and values ``[num_tokens, heads, head_size]`` of each layer.
        returned: ranges that are free again. Sessions end in any thread, and in the middle of anything, so that is all
            that happens then; all else is the device thread's.
    """

    def __init__(
        self, shapes: Mapping[int, LayerShape], num_tokens: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_tokens = num_tokens
        self.layers: dict[int, Buffers] = {}
        for index, shape in shapes.items():
            size = (num_tokens, shape.heads, shape.head_size)
            keys, values = (torch.zeros(size, device=device, dtype=dtype) for _ in range(2))
            self.layers[index] = (keys, values)
        self.returned: deque[tuple[int, int]] = deque()
        self._free = [(SPARE_TOKENS, num_tokens)] if num_tokens > SPARE_TOKENS else []  # [start, end), ascending

    @property
    def free_tokens(self) -> int:
        self._take_back()
        return sum(end - start for start, end in self._free)

    def take(self, num_tokens: int) -> Region | None:
        """The first range that is large enough; None if there is none."""
        self._take_back()
        for number, (start, end) in enumerate(self._free):
            if end - start >= num_tokens:
                rest = [(start + num_tokens, end)] if end - start > num_tokens else []
                self._free[number : number + 1] = rest
                return Region(self, start, num_tokens)
        return None

    def _take_back(self) -> None:
        """What kernels read of a returned range still was queued before whatever will be written to it."""
        returned: list[tuple[int, int]] = []
        while self.returned:
            start, num_tokens = self.returned.popleft()
            returned.append((start, start + num_tokens))
        if not returned:
            return
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self._free, *returned]):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        self._free = merged

    def buffers(self, index: int, region: Region, rows: int) -> Buffers:
        """Views ``[rows, heads, capacity, head_size]`` of ``region`` for layer ``index``."""
        keys, values = (
            tensor[region.start : region.start + region.num_tokens]
            .view(rows, region.num_tokens // rows, *tensor.shape[1:])
            .transpose(1, 2)
            for tensor in self.layers[index]
        )
        return keys, values


class Rooms:
    """Where one session's layers lie: all in the same range.

    The first layer that needs more moves to a new region; the others follow it there, in whatever order they come.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._first: weakref.ref[Region] | None = None

    def next_region(self, old: Region | None, num_tokens: int) -> Region | None:
        """For a layer that lies in ``old``; None if the arena is full."""
        known = self._first if old is None else old.successor
        region = None if known is None else known()
        if region is None or region.num_tokens != num_tokens:
            region = self.arena.take(num_tokens)
            if region is None:
                return None
            if old is None:
                self._first = weakref.ref(region)
            else:
                old.successor = weakref.ref(region)
        return region
