"""What happens next in a simulated swarm: a queue of events in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

__all__ = ["EventQueue"]


class EventQueue:
    """Events by time; those of one instant in the order in which they were added. ``now_s`` never goes back."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_handled = 0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at_s: float, handler: Callable[..., object], *arguments: Any) -> None:
        """Call ``handler(*arguments)`` at ``at_s``; never, if that is infinite.

        Raises:
            ValueError: the time is past or not a number.
        """
        if not at_s >= self.now_s:
            raise ValueError(f"an event happens now or later: expected a time from {self.now_s} s on, got {at_s}")
        if at_s < float("inf"):
            heapq.heappush(self._heap, (at_s, next(self._order), handler, arguments))

    def run_until(self, end_s: float) -> None:
        """Handle all events up to and including ``end_s``, then stand at ``end_s``."""
        while self._heap and self._heap[0][0] <= end_s:
            self.now_s, _, handler, arguments = heapq.heappop(self._heap)
            self.num_handled += 1
            handler(*arguments)
        self.now_s = max(self.now_s, end_s)
