"""An event loop whose clock jumps: order and times as on a real one, and no waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from remote_modules.testing.virtual_time import SimulationDeadlock, VirtualLoop, run_virtual


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_time_starts_at_zero_and_jumps_to_the_next_timer() -> None:
    async def main() -> list[float]:
        times = [now_s()]
        for delay_s in (0.5, 86_400.0, 0.25):
            await asyncio.sleep(delay_s)
            times.append(now_s())
        return times

    began_s = time.monotonic()
    assert run_virtual(main()) == [0.0, 0.5, 86_400.5, 86_400.75]
    assert time.monotonic() - began_s < 5.0


def test_time_stands_still_while_something_can_run() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return now_s()

    assert run_virtual(main()) == 0.0


def test_timers_fire_in_order_of_time() -> None:
    async def main() -> list[tuple[str, float]]:
        fired: list[tuple[str, float]] = []
        loop = asyncio.get_running_loop()

        def note(name: str) -> None:
            fired.append((name, now_s()))

        for name, delay_s in (("late", 3.0), ("second", 1.5), ("first", 1.0), ("soon", 0.0)):
            loop.call_later(delay_s, note, name)
        await asyncio.sleep(5.0)
        return fired

    assert run_virtual(main()) == [("soon", 0.0), ("first", 1.0), ("second", 1.5), ("late", 3.0)]


def test_tasks_interleave_by_their_sleeps() -> None:
    async def worker(log: list[str], name: str, period_s: float) -> None:
        for _ in range(3):
            await asyncio.sleep(period_s)
            log.append(f"{name}{now_s():.0f}")

    async def main() -> list[str]:
        log: list[str] = []
        await asyncio.gather(worker(log, "a", 2.0), worker(log, "b", 5.0))
        return log

    assert run_virtual(main()) == ["a2", "a4", "b5", "a6", "b10", "b15"]


def test_timeouts_happen_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(1000.0), 600.0)
        return now_s()

    assert run_virtual(main()) == 600.0


def test_cancelled_timer_does_not_move_the_clock() -> None:
    async def main() -> float:
        asyncio.get_running_loop().call_later(5.0, lambda: None).cancel()
        await asyncio.sleep(1.0)
        return now_s()

    assert run_virtual(main()) == 1.0


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.sleep(1.0)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationDeadlock, match="every task waits and no timer is set"):
        run_virtual(main())


def test_tasks_that_wait_for_each_other_are_a_deadlock() -> None:
    async def main() -> None:
        ready = asyncio.Event()
        first = asyncio.ensure_future(ready.wait())
        second = asyncio.ensure_future(asyncio.wait_for(ready.wait(), None))
        await asyncio.gather(first, second)

    with pytest.raises(SimulationDeadlock):
        run_virtual(main())


def test_deadlocked_tasks_are_cancelled_and_clean_up() -> None:
    cleaned: list[str] = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("main")

    with pytest.raises(SimulationDeadlock):
        run_virtual(main())
    assert cleaned == ["main"]


def test_error_of_the_main_task_is_raised() -> None:
    async def main() -> None:
        await asyncio.sleep(1.0)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        run_virtual(main())


def test_tasks_left_running_are_cancelled() -> None:
    cleaned: list[float] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            cleaned.append(now_s())

    async def main() -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(background())
        await asyncio.sleep(2.0)
        return task

    assert run_virtual(main()).cancelled()
    assert cleaned == [2.0]


def test_unfinished_generators_are_closed() -> None:
    closed: list[str] = []

    async def ticks() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(1.0)
        finally:
            closed.append("ticks")

    async def main() -> AsyncIterator[int]:
        source = ticks()
        async for _ in source:
            break
        return source

    run_virtual(main())
    assert closed == ["ticks"]


def test_loop_is_closed_afterwards_and_runs_are_independent() -> None:
    async def main() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(3.0)
        return asyncio.get_running_loop()

    first, second = run_virtual(main()), run_virtual(main())
    assert isinstance(first, VirtualLoop)
    assert first is not second
    assert first.is_closed()
    assert second.time() == 3.0


def test_two_runs_of_one_program_are_equal() -> None:
    async def worker(log: list[tuple[int, float]], number: int) -> None:
        for turn in range(5):
            await asyncio.sleep((number * 7 + turn * 3) % 5 * 0.1)
            log.append((number, now_s()))

    async def main() -> list[tuple[int, float]]:
        log: list[tuple[int, float]] = []
        await asyncio.gather(*(worker(log, number) for number in range(6)))
        return log

    assert run_virtual(main()) == run_virtual(main())
