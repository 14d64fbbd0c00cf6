"""An event loop in a thread of its own, called from synchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from remote_modules.wire.bodies import REUSED_BYTES, BodyPool
from remote_modules.wire.framing import Body

__all__ = ["LoopThread", "new_body", "shared_loop"]

T = TypeVar("T")

_pools = threading.local()


def new_body(num_bytes: int) -> Body:
    """Memory for a body that the event loop of this thread receives; that of all its connections is one pool."""
    if num_bytes < REUSED_BYTES:
        return bytearray(num_bytes)
    pool: BodyPool | None = getattr(_pools, "bodies", None)
    if pool is None:
        pool = _pools.bodies = BodyPool()
    return pool.take(num_bytes)


class LoopThread:
    """Runs coroutines for threads that have no loop.

    Uses uvloop where it is installed (a hop costs a third less). The thread is a daemon: it never keeps the
    interpreter alive. It does not exist in a process forked later, which is refused there.
    """

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self.loop = _new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        has_begun = threading.Event()
        self.loop.call_soon(has_begun.set)
        self._thread.start()
        has_begun.wait()  # else `run` could find a loop that does not run yet

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return the result, or raise what it raised. Ctrl-C cancels it.

        Raises:
            RuntimeError: called from the loop's own thread, after `stop`, or in a process forked meanwhile.
        """
        if os.getpid() != self._pid:
            coroutine.close()
            raise RuntimeError(
                f"process {os.getpid()} was forked from {self._pid} and has none of its connections; load the model "
                "again in this process, or keep it out of data loader workers"
            )
        if threading.current_thread() is self._thread or not self.loop.is_running():
            coroutine.close()
            raise RuntimeError("the event loop is stopped, or would wait for itself")
        call = _Call(coroutine, self.loop)
        try:
            self.loop.call_soon_threadsafe(call.begin)
            return call.result()
        except BaseException:
            self.call_soon(call.cancel)
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine without waiting for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call on the loop's thread, without waiting; nothing happens when the loop is gone."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(callback)

    def stop(self) -> None:
        """Cancel what is left, stop the loop and end the thread; idempotent."""
        if self.loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(timeout=5.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self.loop.close()

    def abandon(self) -> None:
        """Stop at once, cancelling nothing: what a killed process does."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


POLL_S = 1.0  # a Ctrl-C that comes just before a wait begins does not end the wait; it is seen after so long


class _Call(Generic[T]):
    """One coroutine that a thread waits for.

    The thread is woken from within the task: a future of `concurrent.futures` costs another round of the loop and a
    condition variable, for which each token of a generation would wait.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._answer: list[T] = []
        self._error: BaseException | None = None
        self._ended = threading.Lock()
        self._ended.acquire()

    def begin(self) -> None:
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._note_end)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def result(self) -> T:
        """Wait for the end; in the thread."""
        while not self._ended.acquire(timeout=POLL_S):
            pass
        error, self._error = self._error, None
        if error is None:
            return self._answer[0]
        try:
            raise error
        finally:
            del error  # the traceback refers to this frame

    async def _run(self) -> None:
        self._answer.append(await self._coroutine)
        self._ended.release()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Wake the thread if there is no answer."""
        if task.cancelled():
            self._coroutine.close()  # it may not have begun
            self._error = asyncio.CancelledError()
        else:
            self._error = task.exception()
        if self._error is not None:
            self._ended.release()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


_shared: LoopThread | None = None
_shared_pid = 0
_shared_lock = threading.Lock()


def shared_loop() -> LoopThread:
    """The one loop of this process for clients; started on first use, and anew after a fork."""
    global _shared, _shared_pid
    with _shared_lock:
        if _shared is None or _shared_pid != os.getpid() or _shared.loop.is_closed():
            _shared, _shared_pid = LoopThread("remote-modules-io"), os.getpid()
        return _shared
