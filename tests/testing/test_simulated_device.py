"""The simulated device keeps the real one's order and promises, and ails as it is told."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.server.jobs import Priority
from remote_modules.testing.fault_points import WAYS, CancelledAt, FaultPoints
from remote_modules.testing.simulated_device import MAX_QUEUE, Ailment, SimulatedDevice, busy

from .test_memory_network import now_s, virtual


def device(compute_s: float = 1.0) -> SimulatedDevice:
    return SimulatedDevice(compute_s, Random(0), Counter())


@virtual
async def test_jobs_run_one_at_a_time_by_priority() -> None:
    dev, log = device(), []
    kinds = [Priority.TRAINING, Priority.TRAINING, Priority.PREFILL, Priority.DECODE]
    jobs = [
        asyncio.ensure_future(dev.run(kind, lambda n=number: log.append((n, now_s()))))  # type: ignore[misc]
        for number, kind in enumerate(kinds)
    ]
    await asyncio.sleep(0.5)
    assert dev.load == 4
    await asyncio.gather(*jobs)
    assert log == [(0, 1.0), (3, 2.0), (2, 3.0), (1, 4.0)]
    assert dev.load == 0


@virtual
async def test_cancelled_job_is_dropped_before_it_begins_and_waited_for_afterwards() -> None:
    dev, log = device(), []
    first = asyncio.ensure_future(dev.run(Priority.DECODE, lambda: log.append("first")))
    second = asyncio.ensure_future(dev.run(Priority.DECODE, lambda: log.append("second")))
    await asyncio.sleep(0.5)
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    assert now_s() == 1.0
    assert log == ["first"]
    await dev.run(Priority.DECODE, lambda: log.append("third"))
    assert (log, now_s()) == (["first", "third"], 2.0)


@virtual
async def test_full_queue_refuses() -> None:
    dev = device()
    jobs = [asyncio.ensure_future(dev.run(Priority.DECODE, lambda: None)) for _ in range(MAX_QUEUE + 1)]
    await asyncio.sleep(0.1)
    with pytest.raises(PeerRefused) as caught:
        await dev.run(Priority.DECODE, lambda: None)
    assert caught.value.reason is RefusalReason.BUSY
    await asyncio.gather(*jobs)


@virtual
async def test_ailments_slow_fail_and_spoil() -> None:
    dev = device()
    dev.ailment = Ailment("slow", slowness=10.0)
    assert (await dev.run(Priority.DECODE, lambda: 1)).compute_s == 10.0
    dev.ailment = Ailment("busy", error=busy)
    with pytest.raises(PeerRefused):
        await dev.run(Priority.DECODE, lambda: 1)
    dev.ailment = Ailment("spoilt", spoil=lambda value: value + 1)
    assert (await dev.run(Priority.DECODE, lambda: 1)).value == 2
    dev.ailment = None
    assert (await dev.run(Priority.DECODE, lambda: 1)).value == 1
    assert dev._fired == {"slow": 1, "busy": 1, "spoilt": 1}


@virtual
async def test_points_are_counted_and_fail_by_number() -> None:
    counted = FaultPoints()
    assert [counted.reach(kind) for kind in ("dial", "send", "announce")] == [None, None, None]
    assert list(counted.cases()) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    failing = FaultPoints({1: 3})
    assert [failing.reach(kind) for kind in ("dial", "send", "send")] == [None, WAYS["send"][1], None]
    assert failing.fired == [("send", WAYS["send"][1])]


@virtual
async def test_work_is_cancelled_at_a_wait() -> None:
    log: list[int] = []

    async def work() -> str:
        for number in range(3):
            log.append(number)
            await asyncio.sleep(1.0)
        return "done"

    async def awaited(cancelled: CancelledAt) -> object:
        return await cancelled

    undisturbed = CancelledAt(work())
    assert await awaited(undisturbed) == "done"
    assert (undisturbed.num_waits, undisturbed.fired) == (3, False)
    log.clear()
    cancelled = CancelledAt(work(), at=2)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.ensure_future(awaited(cancelled))
    assert (log, cancelled.num_waits, cancelled.fired) == ([0, 1], 2, True)
