"""Every input and output of a simulated run by number, so that each of them can fail once.

The simulated network, discovery and devices ask `FaultPoints.reach` before they do anything; those whose numbers are
in `failures` fail, in a way that is natural to them. First run without, to count; then once for each number and way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Iterator, Mapping
from typing import Any

__all__ = ["WAYS", "CancelledAt", "FaultPoints"]

# What can happen at each kind of point.
WAYS: dict[str, tuple[str, ...]] = {
    "dial": ("refused", "silent"),
    "send": ("reset", "swallowed"),
    "receive": ("reset", "flipped"),
    "lookup": ("error", "silent"),
    "announce": ("error",),
    "device": ("broken", "out of memory", "busy", "crash"),
}


class FaultPoints:
    """Counts what is reached, and says what fails.

    Args:
        failures: by the number of the point, which of its kind's `WAYS` (counted round).

    Attributes:
        seen: the kind of each point, in order.
        fired: kind and way of those that failed.
    """

    def __init__(self, failures: Mapping[int, int] | None = None) -> None:
        self.seen: list[str] = []
        self.fired: list[tuple[str, str]] = []
        self._failures = dict(failures or {})

    def reach(self, kind: str) -> str | None:
        """The way to fail now, or None."""
        self.seen.append(kind)
        way = self._failures.get(len(self.seen) - 1)
        if way is None:
            return None
        ways = WAYS[kind]
        self.fired.append((kind, ways[way % len(ways)]))
        return self.fired[-1][1]

    def cases(self) -> Iterator[tuple[int, int]]:
        """Number and way of every single failure that a run like this one can have."""
        for number, kind in enumerate(self.seen):
            for way in range(len(WAYS[kind])):
                yield number, way


class CancelledAt:
    """Await it for what ``work`` returns; the task is cancelled while it waits for the ``at``-th time.

    Attributes:
        num_waits: how often it has waited.
        fired: whether it was cancelled.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], at: int | None = None) -> None:
        self.num_waits = 0
        self.fired = False
        self._work = work
        self._at = at

    def __await__(self) -> Generator[Any, Any, Any]:
        work = self._work
        exc: BaseException | None = None
        while True:
            try:
                future = work.send(None) if exc is None else work.throw(exc)
            except StopIteration as stop:
                return stop.value
            self.num_waits += 1
            if self.num_waits == self._at:
                self.fired = True
                task = asyncio.current_task()
                assert task is not None
                task.get_loop().call_soon(task.cancel)
            exc = None
            try:
                yield future
            except BaseException as thrown:  # noqa: BLE001 - handed on to the work, as if there was nothing between
                exc = thrown
