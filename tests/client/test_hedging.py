from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import pytest

from remote_modules.client.hedging import race, stop
from remote_modules.errors import PeerError, PeerRefused, RefusalReason
from remote_modules.testing.virtual_time import run_virtual

BROKEN = PeerError("broken", peer_id="alice")
WRONG = PeerRefused("wrong", peer_id="alice", reason=RefusalReason.BAD_REQUEST)
BUSY = PeerRefused("busy", peer_id="alice", reason=RefusalReason.BUSY)
BUG = KeyError("bug")


async def after(wait_s: float, error: Exception | None = None) -> None:
    await asyncio.sleep(wait_s)
    if error is not None:
        raise error


def raced(first: Coroutine[None, None, None], second: Coroutine[None, None, None]) -> tuple[bool, float, str]:
    """Whether the second won, how long the race took, and how the first ended."""

    async def run() -> tuple[bool, float, str]:
        loop = asyncio.get_running_loop()
        tasks = loop.create_task(first), loop.create_task(second)
        is_won = await race(*tasks)
        assert all(task.done() for task in tasks)
        how = "cancelled" if tasks[0].cancelled() else str(tasks[0].exception())
        return is_won, loop.time(), how

    return run_virtual(run())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1.0, None), (2.0, None), (False, 1.0, "None")),
        ((2.0, None), (1.0, None), (True, 1.0, "cancelled")),
        ((2.0, None), (1.0, BROKEN), (False, 2.0, "None")),
        ((1.0, BROKEN), (2.0, None), (True, 2.0, "broken")),
        ((1.0, BUSY), (2.0, None), (True, 2.0, "busy")),
        ((1.0, BROKEN), (2.0, BROKEN), (False, 2.0, "broken")),
        ((2.0, BROKEN), (1.0, BROKEN), (False, 2.0, "broken")),
        ((1.0, WRONG), (2.0, None), (False, 1.0, "wrong")),
        ((1.0, BUG), (2.0, None), (False, 1.0, "'bug'")),
        ((1.0, None), (1.0, None), (False, 1.0, "None")),
    ],
)
def test_first_good_answer_wins(
    first: tuple[float, Exception | None], second: tuple[float, Exception | None], expected: tuple[bool, float, str]
) -> None:
    assert raced(after(*first), after(*second)) == expected


def test_bug_in_the_second_is_raised() -> None:
    with pytest.raises(KeyError, match="bug"):
        raced(after(3.0), after(1.0, BUG))


def test_first_that_ends_although_it_is_stopped_wins() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(2.0)
        except asyncio.CancelledError:
            return

    assert raced(stubborn(), after(1.0)) == (False, 1.0, "None")


def test_race_that_is_cancelled_stops_the_second() -> None:
    async def run() -> tuple[bool, bool]:
        loop = asyncio.get_running_loop()
        first, second = loop.create_task(after(5.0)), loop.create_task(after(5.0))
        both = loop.create_task(race(first, second))
        await asyncio.sleep(1.0)
        await stop(both)
        assert both.cancelled()
        states = first.done(), second.done()
        await stop(first)
        return states

    assert run_virtual(run()) == (False, True)


def test_task_that_ended_need_not_be_stopped() -> None:
    async def run() -> bool:
        task = asyncio.get_running_loop().create_task(after(0.0, BROKEN))
        await asyncio.sleep(1.0)
        await stop(task)
        return task.exception() is BROKEN

    assert run_virtual(run())
