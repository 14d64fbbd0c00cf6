"""A second peer at the same work: begun when the first one is late, believed if it is done first."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

__all__ = ["Hedge", "Outrun"]

T = TypeVar("T")


class Outrun(Exception):
    """Somebody else has done the work meanwhile: a request need not be awaited any longer."""


class Hedge(Generic[T]):
    """The work of one hop, perhaps done elsewhere. Costs a timer for each request until somebody is late.

    Args:
        elsewhere: does the work on other peers and returns what came of it, or None if that could not be. Called with
            this hedge, at most once; may be cancelled.

    Attributes:
        won: what came of it, once it is there.
    """

    def __init__(self, elsewhere: Callable[[Hedge[T]], Coroutine[Any, Any, T | None]]) -> None:
        self.won: T | None = None
        self._elsewhere = elsewhere
        self._is_alone = asyncio.Event()  # the first peer has failed
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._abandon: Callable[[Outrun], object] | None = None

    def request_begins(self, patience_s: float, abandon: Callable[[Outrun], object]) -> None:
        """Begin the work elsewhere if this request is not done after ``patience_s``.

        Args:
            abandon: makes the request fail.

        Raises:
            Outrun: the work is done elsewhere already.
        """
        if self.won is not None:
            raise Outrun
        self._abandon = abandon
        if self._task is None and not math.isinf(patience_s):
            self._timer = asyncio.get_running_loop().call_later(patience_s, self._begin)

    def request_ends(self) -> None:
        """The request was answered, or failed."""
        self._abandon = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def hold_back(self, wait_s: float) -> None:
        """Give the first peer a little longer; ends at once if it fails."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_alone.wait(), wait_s)

    async def outcome(self) -> T | None:
        """The first peer has failed. Wait for the work elsewhere, if it was begun: what came of it, or None."""
        self._is_alone.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        return self.won

    async def stop(self) -> None:
        """End the work elsewhere; raises what is a bug of it."""
        if self._task is None:
            return
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    def _begin(self) -> None:
        self._timer = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        self.won = await self._elsewhere(self)
        if self.won is not None and self._abandon is not None:
            self._abandon(Outrun())
