"""Every input and output of a simulated run by number, so that each of them can fail once.

The simulated network, discovery and devices ask `FaultPoints.reach` before they do anything; the one whose number is
`fail_at` fails, in the way that is natural to it. First run without, to count; then once for each number and way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import asyncio
from collections.abc import Coroutine

__all__ = ["WAYS", "CancelledAt", "FaultPoints"]

T = TypeVar("T")

# What can happen at each kind of point, most telling first.
WAYS: dict[str, tuple[str, ...]] = {
    "dial": ("refused", "silent"),
    "send": ("reset", "swallowed"),
    "receive": ("reset", "flipped"),
    "lookup": ("error", "silent"),
    "announce": ("error",),
    "device": ("broken", "out of memory", "busy", "crash"),
}


class FaultPoints:
    """Counts what is reached; the point numbered ``fail_at`` fails in ``way``.

    Attributes:
        seen: the kind of each point, in order.
        fired: the kind that failed, once it has.
    """

    def __init__(self, fail_at: int | None = None, way: str = "") -> None:
        self.seen: list[str] = []
        self.fired: str | None = None
        self._fail_at = fail_at
        self._way = way

    def reach(self, kind: str) -> str | None:
        """The way to fail now, or None."""
        self.seen.append(kind)
        if len(self.seen) - 1 != self._fail_at:
            return None
        assert self._way in WAYS[kind], f"point {self._fail_at} is '{kind}', which does not fail by '{self._way}'"
        self.fired = kind
        return self._way

    def cases(self) -> Iterator[tuple[int, str]]:
        """Number and way of every failure that a run like this one can have."""
        for number, kind in enumerate(self.seen):
            for way in WAYS[kind]:
                yield number, way


class CancelledAt:
    """Await it for what ``work`` returns; the task is cancelled while it waits for the ``at``-th time.

    Attributes:
        num_waits: how often it has waited.
        fired: whether it was cancelled.
    """

    def __init__(self, work: Coroutine[Any, Any, T], at: int | None = None) -> None:
        self.num_waits = 0
        self.fired = False
        self._work = work
        self._at = at

    def __await__(self) -> Generator[Any, Any, Any]:
        awaiting = self._work.__await__()
        send, value = awaiting.send, None
        while True:
            try:
                future = send(value)
            except StopIteration as stop:
                return stop.value
            self.num_waits += 1
            if self.num_waits == self._at:
                self.fired = True
                task = asyncio.current_task()
                assert task is not None
                task.get_loop().call_soon(task.cancel)
            try:
                value = yield future
                send = awaiting.send
            except BaseException as exc:
                value, send = exc, awaiting.throw  # type: ignore[assignment]
