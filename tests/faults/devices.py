"""A device under virtual time that queues as the real one does."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.plan.admission import AdmissionQueue, Ticket
from remote_modules.server.jobs import Priority, Timed

T = TypeVar("T")


@dataclass(slots=True, eq=False, kw_only=True)
class _Job(Ticket):
    work: Callable[[], Any]
    answer: asyncio.Future[Timed[Any]]
    queued_s: float


class QueuedDevice:
    """An `Executor`.

    Args:
        compute_s: what each job takes.
        max_queue: jobs that may wait.

    Attributes:
        num_refused: jobs turned away because the queue was full.
        num_expired: jobs dropped because nobody waited for them any more.
    """

    def __init__(self, *, compute_s: float, max_queue: int) -> None:
        self.num_batches = self.num_batched = 0
        self.num_refused = 0
        self.num_expired = 0
        self._compute_s = compute_s
        self._queue: AdmissionQueue[_Job] = AdmissionQueue(max_waiting=max_queue)
        self._loop = asyncio.get_running_loop()
        self._worker: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        return len(self._queue) + (self._worker is not None)

    async def run(
        self,
        priority: Priority,
        work: Callable[[], T],
        *,
        client: int = 0,
        timeout_s: float = math.inf,
        on_admitted: Callable[[], object] | None = None,
    ) -> Timed[T]:
        now_s = self._loop.time()
        job = _Job(
            priority=priority,
            client=client,
            deadline_s=now_s + timeout_s,
            work=work,
            answer=self._loop.create_future(),
            queued_s=now_s,
        )
        refused = self._queue.put(job, now_s=now_s)
        self.num_refused += len(refused)
        self._refuse(refused)
        if on_admitted is not None and job not in refused:
            on_admitted()
        if self._worker is None:
            self._worker = self._loop.create_task(self._work())
        try:
            return await job.answer
        finally:
            self._queue.remove(job)

    def stop(self) -> None:
        self._refuse(self._queue.clear())

    async def _work(self) -> None:
        while True:
            job, expired = self._queue.take(now_s=self._loop.time())
            self.num_expired += len(expired)
            self._refuse(expired)
            if job is None:
                self._worker = None
                return
            waited_s = self._loop.time() - job.queued_s
            await asyncio.sleep(self._compute_s)
            self._queue.done(took_s=self._compute_s)
            if not job.answer.done():
                job.answer.set_result(Timed(job.work(), waited_s, self._compute_s))

    def _refuse(self, jobs: list[_Job]) -> None:
        for job in jobs:
            if not job.answer.done():
                error = PeerRefused("busy", peer_id="", reason=RefusalReason.BUSY)
                error.retry_after_s = self._queue.retry_after_s
                job.answer.set_exception(error)
