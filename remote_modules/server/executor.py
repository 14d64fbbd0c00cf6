"""The device thread: one, with a bounded priority queue in front of it.

All work on the model happens here, in order of priority and then of arrival: decode before prefill before training,
so that a training batch never delays a token by more than the batch that already runs.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from remote_modules.errors import PeerRefused, RefusalReason

__all__ = ["DeviceThread", "Executor", "Priority", "Timed"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Smaller goes first."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A result, the seconds it waited and the seconds it ran."""

    value: T
    queue_s: float
    compute_s: float


class Executor(Protocol):
    """Runs work on the device: a thread, or inline in a simulation."""

    @property
    def load(self) -> int:
        """Jobs waiting or running."""

    async def run(self, priority: Priority, work: Callable[[], T]) -> Timed[T]:
        """Run ``work``; cancelling before it began drops it, cancelling later waits for its end.

        Raises:
            PeerRefused: ``busy``, the queue is full.
            Exception: whatever ``work`` raised.
        """

    def stop(self) -> None:
        """Take no more work; jobs not begun are cancelled."""


@dataclass(order=True, slots=True)
class _Job:
    priority: int
    number: int
    work: Callable[[], Any] = field(compare=False)
    answer: asyncio.Future[Timed[Any]] = field(compare=False)
    queued_s: float = field(compare=False)
    has_begun: bool = field(default=False, compare=False)


class DeviceThread:
    """The `Executor` of a real peer.

    Args:
        max_queue: jobs that may wait.
        name: of the thread.
    """

    def __init__(self, *, max_queue: int, name: str = "remote-modules-device") -> None:
        self._max_queue = max_queue
        self._heap: list[_Job] = []
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._is_stopped = False
        self._num_running = 0
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        return len(self._heap) + self._num_running

    async def run(self, priority: Priority, work: Callable[[], T]) -> Timed[T]:
        loop = asyncio.get_running_loop()
        job = _Job(priority, next(self._numbers), work, loop.create_future(), time.perf_counter())
        with self._wake:
            if self._is_stopped or len(self._heap) >= self._max_queue:
                text = f"{len(self._heap)} requests wait for the device already"
                raise PeerRefused(text, peer_id="", reason=RefusalReason.BUSY, retry_after_s=1.0)
            heapq.heappush(self._heap, job)
            self._wake.notify()
        try:
            return await asyncio.shield(job.answer)
        except asyncio.CancelledError:
            if not self._drop(job):
                await asyncio.wait([job.answer])  # it touches its session: nobody else may until it ends
            raise

    def stop(self) -> None:
        with self._wake:
            self._is_stopped = True
            dropped, self._heap = self._heap, []
            self._wake.notify()
        for job in dropped:
            _answer(job, lambda job=job: job.answer.cancel())  # type: ignore[misc]
        self._thread.join(timeout=10.0)

    def _drop(self, job: _Job) -> bool:
        with self._wake:
            if job.has_begun or job not in self._heap:
                return False
            self._heap.remove(job)
            heapq.heapify(self._heap)
            return True

    def _loop(self) -> None:
        while (job := self._next()) is not None:
            began_s = time.perf_counter()
            try:
                value = job.work()
            except Exception as exc:  # the device thread's boundary: whatever failed is the job's answer
                logger.debug("job failed on the device", exc_info=exc)
                _answer(job, lambda job=job, exc=exc: _set_exception(job.answer, exc))  # type: ignore[misc]
            else:
                timed = Timed(value, began_s - job.queued_s, time.perf_counter() - began_s)
                _answer(job, lambda job=job, timed=timed: _set_result(job.answer, timed))  # type: ignore[misc]
            self._num_running = 0
            del job

    def _next(self) -> _Job | None:
        with self._wake:
            while not self._heap and not self._is_stopped:
                self._wake.wait()
            if self._is_stopped:
                return None
            job = heapq.heappop(self._heap)
            job.has_begun = True
            self._num_running = 1
            return job


def _answer(job: _Job, callback: Callable[[], object]) -> None:
    try:
        job.answer.get_loop().call_soon_threadsafe(callback)
    except RuntimeError:  # the loop is closed: nobody waits for this answer
        logger.debug("result dropped, the event loop is gone")


def _set_result(answer: asyncio.Future[Timed[Any]], timed: Timed[Any]) -> None:
    if not answer.done():
        answer.set_result(timed)


def _set_exception(answer: asyncio.Future[Timed[Any]], exc: Exception) -> None:
    if not answer.done():
        answer.set_exception(exc)
        answer.exception()  # seen, even when the request was cancelled meanwhile
