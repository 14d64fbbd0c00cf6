"""Jobs for the device thread that run for as long as a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Priority, Timed


class Gate:
    """A job that runs until `open`; then it returns, or raises ``error``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.is_passed = False
        self._error = error
        self._has_begun = threading.Event()
        self._opened = threading.Event()

    def __call__(self) -> None:
        self._has_begun.set()
        assert self._opened.wait(timeout=5.0), "nobody opened the gate"
        self.is_passed = True
        if self._error is not None:
            raise self._error

    def open(self) -> None:
        self._opened.set()

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self._has_begun.wait, 5.0), "the job did not begin"


async def begun(executor: DeviceThread, gate: Gate) -> asyncio.Task[Timed[None]]:
    """Give the device a job that now runs until ``gate`` is opened."""
    task = asyncio.create_task(executor.run(Priority.DECODE, gate))
    await gate.has_begun()
    return task


@asynccontextmanager
async def device(*, max_queue: int = 8) -> AsyncIterator[DeviceThread]:
    executor = DeviceThread(max_queue=max_queue)
    try:
        yield executor
    finally:
        executor.stop()
