"""Jobs for the device, and how whoever waits for one gets its answer."""

from __future__ import annotations

import asyncio
import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from remote_modules.plan.admission import Ticket

__all__ = ["Batchable", "Job", "Priority", "Timed", "answer_all", "fail", "tell"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Smaller goes first; but every so many decodes a prefill has its turn, which chunks keep short."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


PATIENCE = {Priority.PREFILL: 8}


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A result, the seconds it waited and the seconds it ran."""

    value: T
    queue_s: float
    compute_s: float


class Batchable(ABC):
    """Work that may run together with more of its group.

    Attributes:
        group: of those that may; None: alone.
        who: comes back with the next such work, once this is answered; None: is not waited for.
        rows: how much of a batch it is.
        may_run_here: whether it never takes much longer than such work took before, so that it may run on the event
            loop, where nobody is answered meanwhile.
    """

    may_run_here = True
    group: Hashable | None
    who: Hashable
    rows: int

    @abstractmethod
    def __call__(self) -> Any:
        """Run alone."""

    @abstractmethod
    def with_others(self, others: Sequence[Any]) -> list[Any]:
        """Run with ``others`` of its group: what each would have returned. If it raises, nothing has changed."""

    @abstractmethod
    def parted(self) -> None:
        """What failed with it as the first was done by each alone, without a fault."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Ticket):
    """One piece of work.

    Attributes:
        work: callable; its result, or what it raises, is the answer.
        queued_s: when it came.
        has_begun, has_ended: on the device; its answer may have been cancelled before.
        is_here: it runs on the event loop of whoever waits for it.
    """

    work: Any  # callable
    answer: asyncio.Future[Timed[Any]]
    queued_s: float
    has_begun: bool = False
    has_ended: bool = False
    is_here: bool = False
    end: asyncio.Future[None] | None = None  # that somebody waits for

    def answer_with(self, give: Callable[[asyncio.Future[Timed[Any]]], object]) -> None:
        """On the event loop, once the device is through with it."""
        if not self.answer.done():
            give(self.answer)
        self.has_ended = True
        if self.end is not None and not self.end.done():
            self.end.set_result(None)

    async def wait_end(self) -> None:
        if not self.has_ended:
            self.end = asyncio.get_running_loop().create_future()
            await self.end


def answer_all(jobs: Sequence[Job], found: Sequence[Timed[Any]]) -> None:
    """Give jobs of one event loop their results; from any thread."""
    tell(jobs[0], partial(_give_all, jobs, found))


def fail(job: Job, error: Exception) -> None:
    """Give a job's caller an error; from any thread."""
    tell(job, partial(job.answer_with, partial(_set_exception, error)))


def tell(job: Job, callback: Callable[[], object]) -> None:
    """Call on the event loop of whoever waits for ``job``."""
    if job.is_here:
        callback()
        return
    try:
        job.answer.get_loop().call_soon_threadsafe(callback)
    except RuntimeError:  # the loop is closed: nobody waits for this answer
        logger.debug("result dropped, the event loop is gone")


def _give_all(jobs: Sequence[Job], found: Sequence[Timed[Any]]) -> None:
    for job, timed in zip(jobs, found, strict=True):
        job.answer_with(lambda answer, timed=timed: answer.set_result(timed))  # type: ignore[misc]


def _set_exception(error: Exception, answer: asyncio.Future[Timed[Any]]) -> None:
    answer.set_exception(error)
    answer.exception()  # seen, even when the request was cancelled meanwhile
