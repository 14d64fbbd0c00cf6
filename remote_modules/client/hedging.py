"""Two peers at the same work: whoever is first is believed, the other is told to stop."""

from __future__ import annotations

import asyncio

from remote_modules.errors import PeerError, PeerRefused, RefusalReason

__all__ = ["race", "stop"]


async def race(first: asyncio.Task[None], second: asyncio.Task[None]) -> bool:
    """Wait until either has done the work, or neither can: whether the second was the first to do it.

    Both have ended afterwards. A failure of one does not end the race but for a request that is itself wrong;
    if both fail, that of ``first`` counts.

    Raises:
        Exception: the second ended with something that is no `PeerError`: a bug.
    """
    try:
        while not (_is_settled(first) or _is_won(second) or (first.done() and second.done())):
            running = [task for task in (first, second) if not task.done()]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if _is_settled(first) or not _is_won(second):
            return False
        await stop(first)
        return not _is_won(first)  # it may have been too late to stop it
    finally:
        await stop(second)
        error = None if second.cancelled() else second.exception()
        if error is not None and not isinstance(error, PeerError):
            raise error


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what it raised stays in it."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])


def _is_won(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _is_settled(task: asyncio.Task[None]) -> bool:
    """Whether nobody else's answer could change the outcome."""
    if not task.done() or task.cancelled():
        return task.done()
    error = task.exception()
    is_wrong_request = isinstance(error, PeerRefused) and error.reason is RefusalReason.BAD_REQUEST
    return error is None or is_wrong_request or not isinstance(error, PeerError)
