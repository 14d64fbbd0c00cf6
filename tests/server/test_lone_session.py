"""Steps of a session that is alone run where they come in; whatever else comes, and what fails, is as ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from remote_modules.errors import PeerRefused
from remote_modules.plan.batching import MANY_STEPS, SHORT_S
from remote_modules.server.batcher import StepWork
from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Batchable, Priority, Timed

from .device import Gate, begun, device

DEVICE = "remote-modules-device"


@dataclass(eq=False)
class Step(Batchable):
    """Answers the name of the thread that it runs in."""

    who: Hashable = "a"
    group: Hashable | None = "g"
    rows: int = 1
    error: BaseException | None = None
    may_run_here: bool = True

    def __call__(self) -> str:
        if self.error is not None:
            raise self.error
        return threading.current_thread().name

    def with_others(self, others: Sequence[Any]) -> list[str]:
        return [self()] * (1 + len(others))

    def parted(self) -> None: ...


async def run(executor: DeviceThread, step: Step) -> Timed[str]:
    return await executor.run(Priority.DECODE, step)


async def threads_of(executor: DeviceThread, number: int, who: Hashable = "a") -> list[str]:
    return [(await run(executor, Step(who))).value for _ in range(number)]


def test_lone_session_needs_no_thread_after_some_short_steps() -> None:
    async def main() -> None:
        async with device() as executor:
            here = threading.current_thread().name
            assert await threads_of(executor, MANY_STEPS + 3) == [DEVICE] * MANY_STEPS + [here] * 3
            timed = await run(executor, Step())
            assert (timed.queue_s < 1.0, timed.compute_s < 1.0, executor.load) == (True, True, 0)

    asyncio.run(main())


def test_others_steps_and_other_work_run_in_the_thread() -> None:
    async def main() -> None:
        async with device() as executor:
            await threads_of(executor, MANY_STEPS + 1)
            assert await threads_of(executor, MANY_STEPS, "b") == [DEVICE] * MANY_STEPS
            assert await threads_of(executor, 1, "b") != [DEVICE]
            other = await executor.run(Priority.PREFILL, lambda: threading.current_thread().name)
            assert other.value == DEVICE
            assert await threads_of(executor, 1, "b") == [DEVICE]
            await threads_of(executor, MANY_STEPS)
            assert (await run(executor, Step(may_run_here=False))).value == DEVICE
            assert (await run(executor, Step(group=None))).value == DEVICE

    asyncio.run(main())


def test_long_steps_run_in_the_thread() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.5 * SHORT_S
        return now[0]

    async def main() -> None:
        executor = DeviceThread(max_queue=4, clock=clock)
        assert set(await threads_of(executor, 2 * MANY_STEPS)) == {DEVICE}
        executor.stop()

    asyncio.run(main())


def test_step_waits_for_what_the_thread_is_at() -> None:
    async def main() -> None:
        async with device() as executor:
            await threads_of(executor, MANY_STEPS)
            gate = Gate()
            first = await begun(executor, gate)
            step = asyncio.create_task(run(executor, Step()))
            await asyncio.sleep(0)
            assert not step.done()
            gate.open()
            assert (await step).value == DEVICE
            await first

    asyncio.run(main())


def test_failure_is_the_answer_and_the_device_goes_on() -> None:
    async def main() -> None:
        async with device() as executor:
            await threads_of(executor, MANY_STEPS)
            with pytest.raises(ValueError, match="no such"):
                await run(executor, Step(error=ValueError("no such")))
            assert (executor.load, executor.is_broken) == (0, False)
            assert await threads_of(executor, 1) != [DEVICE]

    asyncio.run(main())


def test_step_that_breaks_the_device_leaves_one_thread_after_the_restart() -> None:
    async def main() -> None:
        causes: list[BaseException] = []
        executor = DeviceThread(max_queue=4, is_fatal=lambda exc: isinstance(exc, MemoryError))
        executor.on_broken = causes.append
        old = executor._thread
        await threads_of(executor, MANY_STEPS)
        with pytest.raises(MemoryError):
            await run(executor, Step(error=MemoryError("gone")))
        assert executor.is_broken
        assert len(causes) == 1
        with pytest.raises(PeerRefused, match="restarted"):
            await run(executor, Step())
        executor.restart()
        old.join(timeout=5.0)
        assert not old.is_alive()
        result = await executor.run(Priority.PREFILL, threading.current_thread)
        assert result.value is executor._thread
        executor.stop()

    asyncio.run(main())


@pytest.mark.parametrize("has_graphs", [False, True])
def test_step_that_may_have_to_be_captured_first_does_not_run_here(has_graphs: bool) -> None:
    model = SimpleNamespace(graphs=object() if has_graphs else None)
    work: Any = SimpleNamespace(engine=SimpleNamespace(model=model))
    assert StepWork.may_run_here.fget(work) is not has_graphs  # type: ignore[attr-defined]
