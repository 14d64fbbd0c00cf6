"""A peer's device under virtual time: one job at a time, by priority, and everything that can be wrong with it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.server.jobs import Priority, Timed
from remote_modules.testing.fault_points import FaultPoints

__all__ = ["Ailment", "SimulatedDevice", "broken", "busy", "out_of_memory"]

T = TypeVar("T")
MAX_QUEUE = 64


def out_of_memory() -> Exception:
    return RuntimeError("not enough memory: the simulation says so")


def broken() -> Exception:
    return RuntimeError("the simulation says that the device is broken")


def busy() -> Exception:
    text = "the simulation says that too many requests wait for the device"
    return PeerRefused(text, peer_id="", reason=RefusalReason.BUSY, retry_after_s=0.5)


_ERRORS = {"out of memory": out_of_memory, "broken": broken, "busy": busy}


@dataclass(frozen=True, slots=True)
class Ailment:
    """What is wrong with a device.

    Attributes:
        name: under which it is counted.
        share: of the jobs that it befalls.
        slowness: factor of the time that they take.
        error: what they raise instead of being done, if anything.
        spoil: what becomes of their result (tensors by name), if anything.
    """

    name: str
    share: float = 1.0
    slowness: float = 1.0
    error: Callable[[], Exception] | None = None
    spoil: Callable[[Any], Any] | None = None


class SimulatedDevice:
    """The `Executor` of a simulated peer.

    As with the real one, a job that is cancelled before it began is dropped, and one that has begun is waited for.

    Args:
        compute_s: what each job takes, in virtual seconds.
        fired: how often each ailment happened.

    Attributes:
        ailment: what is wrong with it now, if anything.
        points: asked before each job, if there are any.
        on_crash: takes the peer down, at a point that says so.
    """

    def __init__(self, compute_s: float, rng: Random, fired: Counter[str]) -> None:
        self.compute_s = compute_s
        self.num_batches = self.num_batched = 0
        self.ailment: Ailment | None = None
        self.points: FaultPoints | None = None
        self.on_crash: Callable[[], None] | None = None
        self._rng = rng
        self._fired = fired
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._running: asyncio.Future[None] | None = None
        self._is_stopped = False

    @property
    def load(self) -> int:
        return sum(not turn.done() for _, _, turn in self._waiting) + (self._running is not None)

    async def run(
        self,
        priority: Priority,
        work: Callable[[], T],
        *,
        client: int = 0,
        timeout_s: float = math.inf,
        on_admitted: Callable[[], object] | None = None,
    ) -> Timed[T]:
        if self._is_stopped or len(self._waiting) >= MAX_QUEUE:
            raise busy()
        if on_admitted is not None:
            on_admitted()
        ailment = self.ailment
        if ailment is not None and self._rng.random() >= ailment.share:
            ailment = None
        loop = asyncio.get_running_loop()
        queued_s = loop.time()
        await self._turn(priority)
        began_s = loop.time()
        ended: asyncio.Future[None] = loop.create_future()
        self._running = ended
        timer = loop.call_later(self.compute_s * (1.0 if ailment is None else ailment.slowness), _finish, ended)
        try:
            await self._work_until(ended, work)
            return Timed(self._do(work, ailment), began_s - queued_s, loop.time() - began_s)
        finally:
            timer.cancel()
            self._running = None
            self._let_next()

    def stop(self) -> None:
        """The process is gone: what waits is dropped, what runs has no effect."""
        self._is_stopped = True
        for _, _, turn in self._waiting:
            turn.cancel()
        if self._running is not None:
            self._running.cancel()

    async def _turn(self, priority: Priority) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (int(priority), next(self._numbers), turn))
        if self._running is None:
            self._let_next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was granted at this very moment
                self._running = None
                self._let_next()
            raise

    def _let_next(self) -> None:
        while self._waiting and not self._is_stopped:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._running = turn  # until the job says for how long
                turn.set_result(None)
                return

    async def _work_until(self, ended: asyncio.Future[None], work: Callable[[], object]) -> None:
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            if not ended.cancelled():
                await asyncio.wait([ended])  # it touches its session: nobody else may until it ends
            if not ended.cancelled():
                work()
            raise

    def _do(self, work: Callable[[], T], ailment: Ailment | None) -> T:
        way = self.points.reach("device") if self.points is not None else None
        if way == "crash" and self.on_crash is not None:
            self.on_crash()
        if way is not None:
            raise _ERRORS.get(way, broken)()
        if ailment is None:
            return work()
        self._fired[ailment.name] += 1
        if ailment.error is not None:
            raise ailment.error()
        value = work()
        return value if ailment.spoil is None else ailment.spoil(value)


def _finish(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)
