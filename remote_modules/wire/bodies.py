"""Memory for the bodies of frames: that of large ones is used again.

A fresh buffer of tens of megabytes costs as much as the copy into it: each of its pages is mapped, and cleared, anew.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

__all__ = ["REUSED_BYTES", "BodyPool"]

REUSED_BYTES = 1 << 20  # smaller ones come from the allocator's own free lists
MAX_HELD_BYTES = 256 << 20
MAX_SPARE = 1.25  # of the size asked for

_Array = np.ndarray[Any, np.dtype[np.uint8]]


class BodyPool:
    """Buffers that are handed out again once nothing refers to them any more. Of one thread; the views may be of any.

    Args:
        max_held_bytes: of large buffers, in use or not, that are remembered; what is beyond is fresh each time.
    """

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_held_bytes = max_held_bytes
        self._held: list[_Array] = [np.empty(0, np.uint8)]
        self._free_references = sys.getrefcount(self._held[0])  # of what only the list refers to

    @property
    def held_bytes(self) -> int:
        """In use or not."""
        return sum(array.nbytes for array in self._held)

    def take(self, num_bytes: int) -> memoryview:
        """A buffer; what lay in it is still there. It is free once the last view of it (of NumPy, of torch) is gone."""
        if num_bytes < REUSED_BYTES:
            return memoryview(bytearray(num_bytes))
        array = self._free(num_bytes)
        if array is None:
            array = np.empty(num_bytes, np.uint8)
            self._hold(array)
        return array.data[:num_bytes]

    def _free(self, num_bytes: int) -> _Array | None:
        for index in range(len(self._held)):
            if num_bytes <= self._held[index].nbytes <= MAX_SPARE * num_bytes and self._is_free(index):
                return self._held[index]
        return None

    def _is_free(self, index: int) -> bool:
        return sys.getrefcount(self._held[index]) <= self._free_references

    def _hold(self, array: _Array) -> None:
        """Remember it, in place of free ones of other sizes where there is no room."""
        room = self._max_held_bytes - array.nbytes
        while self.held_bytes > room:
            free = next((index for index in range(len(self._held)) if self._is_free(index)), None)
            if free is None:
                return
            del self._held[free]
        self._held.append(array)
