from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from remote_modules.errors import PeerRefused
from remote_modules.server import supervisor as supervisor_module
from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Priority
from remote_modules.server.supervisor import DeviceSupervisor


def die() -> None:
    raise SystemExit("the thread ends")


class Watched:
    """A supervised device, and what was said about it; it sleeps only as long as `wake` is not called."""

    def __init__(self, probe: Callable[[], object]) -> None:
        self.said: list[str] = []
        self.slept_s: list[float] = []
        self.device = DeviceThread(max_queue=4)
        self.changed = asyncio.Event()
        self.supervisor = DeviceSupervisor(
            self.device, probe=probe, on_down=self._down, on_up=self._up, sleep=self._sleep
        )

    async def break_it(self) -> None:
        with pytest.raises(PeerRefused):
            await self.device.run(Priority.DECODE, die)

    async def until(self, said: str) -> None:
        while not self.said or self.said[-1] != said:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 5.0)

    async def _down(self) -> None:
        self.said.append("down")
        self.changed.set()

    async def _up(self) -> None:
        self.said.append("up")
        self.changed.set()

    async def _sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)


@asynccontextmanager
async def watched(probe: Callable[[], object] = lambda: None) -> AsyncIterator[Watched]:
    watched = Watched(probe)
    watched.supervisor.start()
    try:
        yield watched
    finally:
        await watched.supervisor.stop()
        await watched.supervisor.stop()
        watched.device.stop()


def test_device_that_breaks_is_brought_back() -> None:
    async def main() -> None:
        async with watched() as it:
            await it.break_it()
            await it.until("up")
            assert it.said == ["down", "up"]
            assert (await it.device.run(Priority.DECODE, lambda: 7)).value == 7
            assert (it.slept_s, it.supervisor.num_restarts) == ([1.0], 1)

    asyncio.run(main())


def test_crash_loop_is_slowed_down_up_to_a_minute() -> None:
    async def main() -> None:
        async with watched() as it:
            for number in range(1, 9):
                await it.break_it()
                await it.until("up")
                it.said.clear()
                assert it.supervisor.num_restarts == number
            assert it.slept_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]

    asyncio.run(main())


@pytest.mark.parametrize("failure", [RuntimeError("sticky error"), SystemExit("dies again")], ids=["error", "dies"])
def test_device_that_fails_its_probe_stays_down(failure: BaseException) -> None:
    probes: list[int] = []

    def probe() -> None:
        probes.append(1)
        if len(probes) < 3:
            raise failure

    async def main() -> None:
        async with watched(probe) as it:
            await it.break_it()
            await it.until("up")
            assert it.said == ["down", "up"]
            assert it.slept_s == [1.0, 2.0, 4.0]
            assert it.supervisor.num_restarts == 1
            assert it.device.retry_after_s == 4.0

    asyncio.run(main())


def test_device_that_held_for_a_while_is_restarted_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with watched() as it:
            await it.break_it()
            await it.until("up")
            monkeypatch.setattr(supervisor_module, "MAX_BACKOFF_S", 0.0)
            it.said.clear()
            await it.break_it()
            await it.until("up")
            assert it.slept_s == [1.0, 1.0]

    asyncio.run(main())


def test_device_that_breaks_after_the_loop_is_gone_harms_nobody() -> None:
    async def main() -> Watched:
        it = Watched(lambda: None)
        it.supervisor.start()
        await it.supervisor.stop()
        return it

    it = asyncio.run(main())
    asyncio.run(it.break_it())
    assert it.device.is_broken
    it.device.stop()
