"""Brings a broken device thread back, and takes the peer out of routing meanwhile.

::

    up -- the device breaks --> down -- back-off, probe done --> up
                                down -- back-off, probe fails --> down, twice the back-off

While the device is down the peer refuses work with a hint (`DeviceThread.run`), so that nobody waits. The sessions are
dropped when it breaks: their caches lay on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from remote_modules.errors import RemoteModulesError
from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Priority

__all__ = ["DeviceSupervisor"]

logger = logging.getLogger(__name__)

MIN_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
PROBE_TIMEOUT_S = 10.0


class DeviceSupervisor:
    """Watches one device thread, from `start` to `stop`.

    Args:
        probe: small work on the device; it must succeed before the peer is up again.
        on_down: drop what lay on the device, and say that the peer is gone.
        on_up: say that it is back.
        sleep: waits so many seconds.

    Attributes:
        num_restarts: times that the device came back.
    """

    def __init__(
        self,
        device: DeviceThread,
        *,
        probe: Callable[[], object],
        on_down: Callable[[], Awaitable[None]],
        on_up: Callable[[], Awaitable[None]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.num_restarts = 0
        self._device = device
        self._probe = probe
        self._on_down = on_down
        self._on_up = on_up
        self._sleep = sleep
        self._clock = asyncio.get_running_loop().time
        self._broken = asyncio.Event()
        self._backoff_s = MIN_BACKOFF_S
        self._up_since_s = self._clock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def tell(cause: BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the peer has ended
                loop.call_soon_threadsafe(self._broken.set)

        self._device.on_broken = tell
        self._task = loop.create_task(self._run())

    async def stop(self) -> None:
        """Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            await self._broken.wait()
            self._broken.clear()
            if not self._device.is_broken:  # it broke under a probe, and the next one went well
                continue
            if self._clock() - self._up_since_s >= MAX_BACKOFF_S:  # it held for a while: no crash loop
                self._backoff_s = MIN_BACKOFF_S
            self._device.retry_after_s = self._backoff_s
            logger.error("the device is down, restarting it in %.0f s", self._backoff_s)
            await self._on_down()
            while not await self._bring_up():
                self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)
                self._device.retry_after_s = self._backoff_s
            self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)
            self.num_restarts += 1
            self._up_since_s = self._clock()
            logger.warning("the device is up again restarts=%d", self.num_restarts)
            await self._on_up()

    async def _bring_up(self) -> bool:
        await self._sleep(self._backoff_s)
        self._device.restart()
        try:
            await asyncio.wait_for(self._device.run(Priority.DECODE, self._probe), PROBE_TIMEOUT_S)
        except (RemoteModulesError, RuntimeError, asyncio.TimeoutError) as exc:
            logger.warning("the device is still down, restarting it in %.0f s: %s", 2 * self._backoff_s, exc)
            return False
        return True
