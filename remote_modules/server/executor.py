"""The device thread: one, with a bounded queue in front of it.

All work on the model happens here, in order of priority, clients taking turns (`plan.admission`): decode before
prefill before training, so that a training batch never delays a token by more than the batch that already runs.
`Batchable` work of one group that waits when the device becomes free runs as one (`plan.batching`); should that fail,
each runs alone, so that only those who are at fault see an error.

A session that is alone with short steps has them run where they come in, on the event loop, while the thread is idle: a
hand-over there and back takes as long as some small blocks.

::

    running -- something that is no `Exception`, or a fatal one --> broken -- restart --> running
    running, broken -- stop --> stopped

A broken device answers what it holds and whatever comes with a refusal: nobody waits for a thread that is dead.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol, TypeVar

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.plan.admission import AdmissionQueue
from remote_modules.plan.batching import MAX_ROWS, LoneSession, Rounds
from remote_modules.server.jobs import PATIENCE, Batchable, Job, Priority, Timed, answer_all, fail, tell

__all__ = ["DeviceThread", "Executor"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Executor(Protocol):
    """Runs work on the device: a thread, or inline in a simulation.

    Attributes:
        num_batches, num_batched: times that several jobs ran as one, and those jobs.
    """

    num_batches: int
    num_batched: int

    @property
    def load(self) -> int:
        """Jobs waiting or running."""

    async def run(
        self,
        priority: Priority,
        work: Callable[[], T],
        *,
        client: int = 0,
        timeout_s: float = math.inf,
        on_admitted: Callable[[], object] | None = None,
    ) -> Timed[T]:
        """Run ``work``; cancelling before it began drops it, cancelling later waits for its end.

        Args:
            client: whose work it is; clients take turns.
            timeout_s: work that has not begun by then is refused, for nobody waits for it any more.
            on_admitted: called, on the event loop, when the work has its place in the queue.

        Raises:
            PeerRefused: ``busy``, and the work was not begun; or ``internal``, the device broke under it.
            Exception: whatever ``work`` raised.
        """

    def stop(self) -> None:
        """Take no more work; jobs not begun are cancelled."""


class DeviceThread:
    """The `Executor` of a real peer.

    Args:
        max_queue: jobs that may wait.
        name: of the thread.
        clock: monotonic seconds.
        is_fatal: whether the device is of no use after this error of a job.

    Attributes:
        on_broken: called in the dying thread, with what broke it, once the device is broken.
        retry_after_s: hint to those who come while it is broken.
    """

    def __init__(
        self,
        *,
        max_queue: int,
        name: str = "remote-modules-device",
        clock: Callable[[], float] = time.perf_counter,
        is_fatal: Callable[[Exception], bool] = lambda exc: False,
    ) -> None:
        self.on_broken: Callable[[BaseException], object] = lambda exc: None
        self.retry_after_s = 1.0
        self._queue: AdmissionQueue[Job] = AdmissionQueue(max_waiting=max_queue)
        self._clock = clock
        self._is_fatal = is_fatal
        self.num_batches = self.num_batched = 0
        self._num_failed = 0  # jobs that raised
        self._rounds = Rounds()
        self._lone = LoneSession()
        self._gathering: tuple[float, Hashable] | None = None  # since when, and for which group
        self._wake = threading.Condition()
        self._is_stopped = False
        self._broken_by: BaseException | None = None
        self._running: list[Job] = []
        self._name = name
        with self._wake:
            self._thread = self._new_thread()

    @property
    def load(self) -> int:
        return len(self._queue) + len(self._running)

    @property
    def is_broken(self) -> bool:
        return self._broken_by is not None

    async def run(
        self,
        priority: Priority,
        work: Callable[[], T],
        *,
        client: int = 0,
        timeout_s: float = math.inf,
        on_admitted: Callable[[], object] | None = None,
    ) -> Timed[T]:
        now_s = self._clock()
        job = Job(
            priority=priority,
            client=client,
            deadline_s=now_s + timeout_s,
            patience=PATIENCE.get(priority, math.inf),
            work=work,
            answer=asyncio.get_running_loop().create_future(),
            queued_s=now_s,
        )
        refused = self._admit(job)
        if job.is_here:
            self._do([job])
            self._running = []
        if refused:
            self._refuse(refused, f"{len(self._queue)} requests wait for the device already")
        if on_admitted is not None and job not in refused:
            on_admitted()
        try:
            return await job.answer
        except asyncio.CancelledError:
            if not self._drop(job):
                await job.wait_end()  # it touches its session: nobody else may until it ends
            raise

    def _admit(self, job: Job) -> list[Job]:
        """Queue a job, or let it run here; the jobs to refuse.

        Raises:
            PeerRefused: the device is broken.
        """
        who, now_s = None, job.queued_s
        if isinstance(job.work, Batchable):
            job.group, job.rows = job.work.group, job.work.rows
            who = None if job.group is None else job.work.who
        with self._wake:
            if self._is_stopped:
                return [job]
            if self._broken_by is not None:
                raise _busy("the device failed and is being restarted", self.retry_after_s)
            if who is not None:
                self._rounds.came(who, now_s=now_s)
            is_lone = self._lone.came(who)
            if is_lone and job.work.may_run_here and not (self._running or len(self._queue)):
                job.is_here = job.has_begun = True
                self._running = [job]
                return []
            refused = self._queue.put(job, now_s=now_s)
            if self._begins_s(now_s, job) <= now_s:
                self._wake.notify()
            return refused

    def restart(self) -> None:
        """Bring a broken device back; without effect on one that runs or is stopped."""
        with self._wake:
            if self._broken_by is not None and not self._is_stopped:
                self._broken_by = None
                self._thread = self._new_thread()
                self._wake.notify_all()  # one that did not break itself, but saw a step break that ran elsewhere

    def stop(self) -> None:
        with self._wake:
            self._is_stopped = True
            dropped = self._queue.clear()
            self._wake.notify()
        for job in dropped:
            tell(job, partial(job.answer_with, asyncio.Future.cancel))
        self._thread.join(timeout=10.0)

    def _new_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
        thread.start()
        return thread

    def _drop(self, job: Job) -> bool:
        with self._wake:
            return not job.has_begun and self._queue.remove(job)

    def _loop(self) -> None:
        while jobs := self._next():
            if not self._do(jobs):
                return
            self._running = []
            del jobs

    def _do(self, jobs: list[Job]) -> bool:
        """Run jobs and answer them; False if the device is broken now."""
        if len(jobs) > 1:
            began_s = self._clock()
            try:
                values = jobs[0].work.with_others([job.work for job in jobs[1:]])
            except BaseException as exc:  # the device thread's boundary, as in `_do_alone`
                logger.warning("%d steps failed together", len(jobs), exc_info=True)
                if not isinstance(exc, Exception) or self._is_fatal(exc):
                    self._break(exc)
                    return False
            else:
                self.num_batches, self.num_batched = self.num_batches + 1, self.num_batched + len(jobs)
                self._succeed(jobs, values, began_s)
                return True
        num_failed = self._num_failed
        is_usable = all(self._do_alone(job) for job in jobs)
        if is_usable and len(jobs) > 1 and self._num_failed == num_failed:
            jobs[0].work.parted()
        return is_usable

    def _do_alone(self, job: Job) -> bool:
        began_s = self._clock()
        try:
            value = job.work()
        except Exception as exc:  # the device thread's boundary: whatever failed is the job's answer
            logger.debug("job failed on the device", exc_info=exc)
            if self._is_fatal(exc):
                self._break(exc)
                return False
            self._num_failed += 1
            self._running.remove(job)
            fail(job, exc)
        except BaseException as exc:  # the end of the thread must not be the end of those who wait
            logger.exception("the device thread died")
            self._break(exc)
            return False
        else:
            self._succeed([job], [value], began_s)
        return True

    def _succeed(self, jobs: list[Job], values: list[Any], began_s: float) -> None:
        now_s = self._clock()
        with self._wake:
            self._running = [job for job in self._running if job not in jobs]
            self._queue.done(took_s=now_s - began_s, num_jobs=len(jobs))
            self._lone.done(now_s - began_s)
            if jobs[0].group is not None and jobs[0].work.who is not None:
                self._rounds.answered([job.work.who for job in jobs], now_s=now_s, took_s=now_s - began_s)
        found = [Timed(value, began_s - job.queued_s, now_s - began_s) for job, value in zip(jobs, values, strict=True)]
        answer_all(jobs, found)

    def _break(self, cause: BaseException) -> None:
        """Answer all that runs and waits: the device is of no use."""
        with self._wake:
            self._broken_by = cause
            running, self._running = self._running, []
            waiting = self._queue.clear()
        try:
            self.on_broken(cause)
        finally:
            for job in running:
                fail(job, cause if isinstance(cause, Exception) else _broken())
            for job in waiting:
                fail(job, _broken())

    def _next(self) -> list[Job]:
        """The next jobs, begun; none once stopped, or once another thread is the device's."""
        while True:
            with self._wake:
                job, expired = self._take()
                while job is None and not expired and not self._is_over:
                    self._wake.wait()
                    job, expired = self._take()
                if job is not None:
                    job.has_begun = True
                    self._running = [job]
                    if job.group is not None:
                        self._gather(job)
                is_over = self._is_over
            self._refuse(expired, "the request waited longer than its client does")
            if job is not None or is_over:
                return [] if job is None else list(self._running)

    @property
    def _is_over(self) -> bool:
        """Whether this thread has no more work to expect."""
        return self._is_stopped or self._thread is not threading.current_thread()

    def _take(self) -> tuple[Job | None, list[Job]]:
        is_mine = self._thread is threading.current_thread()
        return self._queue.take(now_s=self._clock()) if is_mine else (None, [])

    def _gather(self, first: Job) -> None:
        """Let others of its group run with ``first``, and wait a moment for those who are due; the lock is held."""
        self._gathering = (self._clock(), first.group)
        while True:
            now_s = self._clock()
            room = MAX_ROWS - sum(job.rows for job in self._running)
            joined = self._queue.take_like(first, room=room, now_s=now_s)
            for job in joined:
                job.has_begun = True
            self._running += joined
            wait_s = self._begins_s(now_s, first) - now_s
            if len(self._queue) or self._is_stopped or wait_s <= 0:  # others want the device, or nobody is due
                self._gathering = None
                return
            self._wake.wait(timeout=wait_s)

    def _begins_s(self, now_s: float, job: Job) -> float:
        """Until when the device waits for more that may run with ``job``, which is here; the lock is held."""
        if self._gathering is None or self._gathering[1] != job.group:
            return now_s
        return self._rounds.wait_until(free_s=self._gathering[0], now_s=now_s)

    def _refuse(self, jobs: list[Job], text: str) -> None:
        for job in jobs:
            fail(job, _busy(text, self._queue.retry_after_s))


def _busy(text: str, retry_after_s: float) -> PeerRefused:
    return PeerRefused(text, peer_id="", reason=RefusalReason.BUSY, retry_after_s=retry_after_s)


def _broken() -> PeerRefused:
    return PeerRefused("the device failed under this request", peer_id="", reason=RefusalReason.INTERNAL)
