from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from remote_modules.client.hedging import Hedge, Outrun
from remote_modules.testing.virtual_time import run_virtual


class Asked:
    """Work elsewhere that takes a while; notes what happened to it."""

    def __init__(self, takes_s: float, answer: str | None = "done", error: Exception | None = None) -> None:
        self.begun_s: list[float] = []
        self.is_cancelled = False
        self._takes_s = takes_s
        self._answer = answer
        self._error = error

    async def __call__(self, hedge: Hedge[str]) -> str | None:
        self.begun_s.append(asyncio.get_running_loop().time())
        try:
            await asyncio.sleep(self._takes_s)
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        if self._error is not None:
            raise self._error
        return self._answer


async def request(hedge: Hedge[str], takes_s: float, *, patience_s: float = 1.0) -> float:
    """A request that takes so long unless it is abandoned; when it ended."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[None] = loop.create_future()
    hedge.request_begins(patience_s, answer.set_exception)
    timer = loop.call_later(takes_s, answer.set_result, None)
    try:
        await answer
    finally:
        timer.cancel()
        hedge.request_ends()
    return loop.time()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtual(main())


def test_answer_in_time_nobody_else_is_asked() -> None:
    async def main() -> None:
        asked = Asked(1.0)
        hedge: Hedge[str] = Hedge(asked)
        for _ in range(3):
            await request(hedge, 0.9)
        await asyncio.sleep(10.0)
        assert await hedge.outcome() is None
        await hedge.stop()
        assert asked.begun_s == []

    run(main)


def test_nothing_is_expected_nobody_else_is_asked() -> None:
    async def main() -> None:
        asked = Asked(1.0)
        hedge: Hedge[str] = Hedge(asked)
        assert await request(hedge, 100.0, patience_s=float("inf")) == 100.0
        assert asked.begun_s == []

    run(main)


def test_second_that_is_faster_makes_the_first_fail() -> None:
    async def main() -> None:
        asked = Asked(2.0)
        hedge: Hedge[str] = Hedge(asked)
        with pytest.raises(Outrun):
            await request(hedge, 10.0)
        assert asyncio.get_running_loop().time() == 3.0
        assert (asked.begun_s, hedge.won) == ([1.0], "done")
        await hedge.stop()
        with pytest.raises(Outrun):  # before anything is sent
            hedge.request_begins(1.0, lambda outrun: None)

    run(main)


def test_first_that_is_late_but_faster_is_believed_and_the_second_stopped() -> None:
    async def main() -> None:
        asked = Asked(5.0)
        hedge: Hedge[str] = Hedge(asked)
        assert await request(hedge, 2.0) == 2.0
        await hedge.stop()
        assert (asked.is_cancelled, hedge.won) == (True, None)

    run(main)


def test_second_is_asked_once_however_many_requests_are_late() -> None:
    async def main() -> None:
        asked = Asked(5.0, answer=None)
        hedge: Hedge[str] = Hedge(asked)
        for _ in range(5):
            await request(hedge, 2.0)
        assert asked.begun_s == [1.0]
        assert hedge.won is None
        await hedge.stop()

    run(main)


def test_second_that_ends_between_two_requests_makes_the_next_one_fail() -> None:
    async def main() -> None:
        hedge: Hedge[str] = Hedge(Asked(3.0))
        await request(hedge, 2.0)
        await asyncio.sleep(5.0)
        assert hedge.won == "done"
        with pytest.raises(Outrun):
            await request(hedge, 1.0)

    run(main)


@pytest.mark.parametrize(("answer", "outcome"), [("done", "done"), (None, None)])
def test_first_has_failed_the_second_is_waited_for(answer: str | None, outcome: str | None) -> None:
    async def main() -> None:
        hedge: Hedge[str] = Hedge(Asked(3.0, answer))
        await request(hedge, 2.0)
        assert await hedge.outcome() == outcome
        assert asyncio.get_running_loop().time() == 4.0
        await hedge.stop()

    run(main)


def test_first_has_failed_the_second_holds_back_no_longer() -> None:
    async def main() -> None:
        async def patient(hedge: Hedge[str]) -> str:
            await hedge.hold_back(2.0)
            return f"begun at {asyncio.get_running_loop().time()}"

        hedge: Hedge[str] = Hedge(patient)
        await request(hedge, 1.5)
        assert await hedge.outcome() == "begun at 1.5"
        hedge = Hedge(patient)
        with pytest.raises(Outrun):
            await request(hedge, 50.0)
        assert hedge.won == "begun at 4.5"

    run(main)


def test_bug_in_the_second_is_raised() -> None:
    async def main() -> None:
        hedge: Hedge[str] = Hedge(Asked(0.5, error=KeyError("bug")))
        await request(hedge, 2.0)
        with pytest.raises(KeyError, match="bug"):
            await hedge.stop()

    run(main)
