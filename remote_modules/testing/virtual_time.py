"""An event loop whose clock jumps to the next timer instead of waiting.

Everything that runs on it is deterministic as long as it uses no threads, sockets or clocks of its own.

Hosts share the loop, and each can be suspended: what was begun in a context where `HOST` names it (tasks, timers,
callbacks) does not run until it is resumed, and then finds that time has passed.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Coroutine, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["HOST", "SimulationDeadlock", "VirtualLoop", "run_virtual"]

T = TypeVar("T")

HOST: ContextVar[str] = ContextVar("HOST", default="")  # on which host something runs


class SimulationDeadlock(Exception):
    """Every task waits and no timer is set: nothing could ever happen again."""


class _NoSelector(selectors.BaseSelector):
    """Waits for nothing: moves the clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, number, events, data)
        self._keys[number] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SimulationDeadlock("every task waits and no timer is set")
        self.now_s += max(0.0, timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time` starts at 0 and moves only when nothing can run."""

    # What asyncio keeps for itself, and a suspended host's part of it must leave.
    _ready: Any
    _scheduled: Any

    def __init__(self) -> None:
        self._virtual = _NoSelector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-9
        self._suspended: dict[str, list[asyncio.Handle]] = {}

    def time(self) -> float:
        return self._virtual.now_s

    def suspend(self, host: str) -> None:
        """Run nothing of ``host`` until it is resumed."""
        self._suspended.setdefault(host, [])

    def resume(self, host: str) -> None:
        """Undo `suspend`: first what was due, in its order; ``host`` may be running."""
        for handle in self._suspended.pop(host, []):
            if handle.cancelled():
                continue
            if isinstance(handle, asyncio.TimerHandle):
                handle._scheduled = True  # type: ignore[attr-defined]
                heapq.heappush(self._scheduled, handle)
            else:
                self._ready.append(handle)

    def resume_all(self) -> None:
        for host in list(self._suspended):
            self.resume(host)

    def _run_once(self) -> None:
        if self._suspended:
            self._set_aside()
        super()._run_once()  # type: ignore[misc]

    def _set_aside(self) -> None:
        """Take out what would run next, if it is of suspended hosts."""
        for handle in [handle for handle in self._ready if self._is_suspended(handle)]:
            self._ready.remove(handle)
            self._suspended[_host_of(handle)].append(handle)
        kept: list[Any] = []
        timers = self._scheduled
        while timers and (not kept or timers[0]._when <= kept[0]._when + self._clock_resolution):
            handle = heapq.heappop(timers)
            if self._is_suspended(handle):
                handle._scheduled = False
                self._suspended[_host_of(handle)].append(handle)
            else:
                kept.append(handle)
        for handle in kept:
            heapq.heappush(timers, handle)

    def _is_suspended(self, handle: asyncio.Handle) -> bool:
        return not handle.cancelled() and _host_of(handle) in self._suspended


def _host_of(handle: asyncio.Handle) -> str:
    host: str = handle._context.get(HOST, "")  # type: ignore[attr-defined]
    return host


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` under virtual time; the loop is closed afterwards.

    Raises:
        SimulationDeadlock: ``main`` can never end.
    """
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.resume_all()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
