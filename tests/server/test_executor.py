from __future__ import annotations

import asyncio
import threading
import time

import pytest
from net.memory import turns

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.plan.admission import UNKNOWN_JOB_S
from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Priority

from .device import Gate, begun, device


def test_result_and_times_come_back() -> None:
    async def main() -> None:
        async with device() as executor:
            timed = await executor.run(Priority.DECODE, lambda: threading.current_thread().name)
        assert timed.value == "remote-modules-device"
        assert 0.0 <= timed.queue_s < 1.0
        assert 0.0 <= timed.compute_s < 1.0

    asyncio.run(main())


def test_waiting_time_counts_as_queue_and_running_time_as_compute() -> None:
    async def main() -> None:
        async with device() as executor:
            gate = Gate()
            first = await begun(executor, gate)
            begun_s = time.perf_counter()
            second = asyncio.create_task(executor.run(Priority.DECODE, lambda: None))
            await asyncio.sleep(0)
            queued_s = time.perf_counter()
            await asyncio.to_thread(sum, range(100_000))
            opened_s = time.perf_counter()
            gate.open()
            assert (await first).compute_s >= opened_s - begun_s
            assert (await second).queue_s >= opened_s - queued_s

    asyncio.run(main())


def test_jobs_run_by_priority_and_then_in_order_of_arrival() -> None:
    async def main() -> None:
        order: list[str] = []
        async with device() as executor:
            gate = Gate()
            first = await begun(executor, gate)
            jobs = [
                asyncio.create_task(executor.run(priority, lambda name=name: order.append(name)))  # type: ignore[misc]
                for name, priority in [
                    ("training-1", Priority.TRAINING),
                    ("prefill-1", Priority.PREFILL),
                    ("decode-1", Priority.DECODE),
                    ("training-2", Priority.TRAINING),
                    ("decode-2", Priority.DECODE),
                    ("prefill-2", Priority.PREFILL),
                ]
            ]
            await asyncio.sleep(0)
            assert executor.load == 7
            gate.open()
            await asyncio.gather(first, *jobs)
        assert order == ["decode-1", "decode-2", "prefill-1", "prefill-2", "training-1", "training-2"]

    asyncio.run(main())


def test_full_queue_refuses_as_busy_and_goes_on() -> None:
    async def main() -> None:
        async with device(max_queue=2) as executor:
            gate = Gate()
            first = await begun(executor, gate)
            waiting = [asyncio.create_task(executor.run(Priority.TRAINING, lambda: "done")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(PeerRefused, match=r"^2 requests wait for the device already$") as caught:
                await executor.run(Priority.DECODE, lambda: None)
            assert (caught.value.reason, caught.value.retry_after_s) == (RefusalReason.BUSY, 2 * UNKNOWN_JOB_S)
            gate.open()
            await first
            assert [(await job).value for job in waiting] == ["done", "done"]
            assert (await executor.run(Priority.DECODE, lambda: "next")).value == "next"

    asyncio.run(main())


def test_job_cancelled_before_it_begins_is_dropped() -> None:
    async def main() -> None:
        ran: list[str] = []
        async with device(max_queue=1) as executor:
            gate = Gate()
            first = await begun(executor, gate)
            dropped = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("dropped")))
            await asyncio.sleep(0)
            dropped.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dropped  # although the device is still at the first job
            assert executor.load == 1
            other = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("other")))
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(first, other)
        assert ran == ["other"]

    asyncio.run(main())


def test_job_cancelled_while_it_runs_is_waited_for() -> None:
    async def main() -> None:
        async with device() as executor:
            gate = Gate()
            running = await begun(executor, gate)
            running.cancel()
            await turns()
            assert not running.done()
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert gate.is_passed

    asyncio.run(main())


def test_failure_of_a_job_is_its_answer_and_the_thread_lives_on() -> None:
    def fail() -> None:
        raise ZeroDivisionError("no such number")

    async def main() -> None:
        async with device() as executor:
            for _ in range(2):
                with pytest.raises(ZeroDivisionError, match="no such number"):
                    await executor.run(Priority.DECODE, fail)
            assert (await executor.run(Priority.DECODE, lambda: 1)).value == 1

    asyncio.run(main())


def test_failure_of_a_cancelled_job_is_dropped() -> None:
    async def main() -> None:
        async with device() as executor:
            gate = Gate(ValueError("late"))
            running = await begun(executor, gate)
            running.cancel()
            await asyncio.sleep(0)
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert (await executor.run(Priority.DECODE, lambda: 1)).value == 1

    asyncio.run(main())


def test_stopped_device_refuses_work() -> None:
    async def main() -> None:
        executor = DeviceThread(max_queue=4)
        executor.stop()
        executor.stop()
        with pytest.raises(PeerRefused) as caught:
            await executor.run(Priority.DECODE, lambda: None)
        assert caught.value.reason is RefusalReason.BUSY

    asyncio.run(main())


def test_stop_waits_for_the_running_job_and_cancels_the_others() -> None:
    async def main() -> None:
        ran: list[str] = []
        executor = DeviceThread(max_queue=4)
        gate = Gate()
        running = await begun(executor, gate)
        waiting = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("waiting")))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(executor.stop))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not stopping.done()
        gate.open()
        await stopping
        assert gate.is_passed
        assert (await running).value is None
        assert not ran

    asyncio.run(main())


def test_stop_ends_the_thread() -> None:
    before = threading.active_count()
    for _ in range(3):
        DeviceThread(max_queue=1).stop()
    assert threading.active_count() == before


def test_event_loop_gone_before_the_answer_is_no_error() -> None:
    executor = DeviceThread(max_queue=1)
    gate = Gate()
    loop = asyncio.new_event_loop()
    running = loop.run_until_complete(begun(executor, gate))
    loop.close()
    gate.open()
    executor.stop()
    assert gate.is_passed
    assert not running.done()
    running.get_coro().close()


# -------------------------------------------------------------------------------- fairness and deadlines


def test_clients_take_turns() -> None:
    async def main() -> None:
        order: list[str] = []
        async with device() as executor:
            gate = Gate()
            first = await begun(executor, gate)
            jobs = [
                asyncio.create_task(
                    executor.run(Priority.DECODE, lambda name=name: order.append(name), client=client)  # type: ignore[misc]
                )
                for name, client in [("a0", 1), ("a1", 1), ("a2", 1), ("b0", 2), ("b1", 2)]
            ]
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(first, *jobs)
        assert order == ["a0", "b0", "a1", "b1", "a2"]

    asyncio.run(main())


def test_job_displaced_by_another_client_is_refused_as_busy() -> None:
    async def main() -> None:
        async with device(max_queue=2) as executor:
            gate = Gate()
            first = await begun(executor, gate)
            greedy = [asyncio.create_task(executor.run(Priority.DECODE, lambda: "a", client=1)) for _ in range(2)]
            await asyncio.sleep(0)
            modest = asyncio.create_task(executor.run(Priority.DECODE, lambda: "b", client=2))
            with pytest.raises(PeerRefused, match="wait for the device already") as caught:
                await greedy[1]
            assert caught.value.reason is RefusalReason.BUSY
            gate.open()
            await first
            assert [(await job).value for job in (greedy[0], modest)] == ["a", "b"]

    asyncio.run(main())


def test_job_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def main() -> None:
        now_s, ran = [100.0], []
        executor = DeviceThread(max_queue=8, clock=lambda: now_s[0])
        try:
            gate = Gate()
            first = await begun(executor, gate)
            late = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("late"), timeout_s=5.0))
            good = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("good"), timeout_s=6.0))
            await asyncio.sleep(0)
            now_s[0] = 105.0
            gate.open()
            with pytest.raises(PeerRefused, match="^the request waited longer than its client does$") as caught:
                await late
            assert caught.value.reason is RefusalReason.BUSY
            await asyncio.gather(first, good)
            assert ran == ["good"]
        finally:
            executor.stop()

    asyncio.run(main())


# -------------------------------------------------------------------------------- a device that breaks


class Fatal(Exception):
    """Says that the device is of no use any more."""


def raising(error: BaseException) -> Gate:
    return Gate(error)  # type: ignore[arg-type]  # a job may raise anything


@pytest.mark.parametrize("error", [SystemExit("bye"), Fatal("sticky")], ids=["no-exception", "fatal"])
def test_broken_device_answers_everybody_and_refuses_until_restarted(error: BaseException) -> None:
    async def main() -> None:
        executor = DeviceThread(max_queue=8, is_fatal=lambda exc: isinstance(exc, Fatal))
        causes: list[BaseException] = []
        executor.on_broken = causes.append
        executor.restart()  # without effect
        try:
            gate = raising(error)
            running = await begun(executor, gate)
            waiting = asyncio.create_task(executor.run(Priority.DECODE, lambda: 1))
            await asyncio.sleep(0)
            gate.open()
            failures = await asyncio.gather(running, waiting, return_exceptions=True)
            for failure in failures[isinstance(error, Fatal) :]:
                assert isinstance(failure, PeerRefused)
                assert failure.reason is RefusalReason.INTERNAL
            assert (executor.is_broken, executor.load) == (True, 0)
            executor.retry_after_s = 4.0
            with pytest.raises(PeerRefused, match="failed and is being restarted") as caught:
                await executor.run(Priority.DECODE, lambda: 1)
            assert (caught.value.reason, caught.value.retry_after_s) == (RefusalReason.BUSY, 4.0)
            executor.restart()
            assert (executor.is_broken, executor.load) == (False, 0)
            assert (await executor.run(Priority.DECODE, lambda: 2)).value == 2
            assert causes == [error]
        finally:
            executor.stop()
        executor.restart()
        assert executor.load == 0

    asyncio.run(main())
