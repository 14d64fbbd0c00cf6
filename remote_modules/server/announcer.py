"""Keeping a peer's record alive in discovery."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from remote_modules.discovery.base import Discovery
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, PeerState, SignedRecord

__all__ = ["Announcer"]

logger = logging.getLogger(__name__)


class Announcer:
    """Announces at once, at every change of state, and each interval.

    Args:
        describe: the record as of now, apart from its sequence and state.
        interval_s: between renewals.
        first_sequence: milliseconds of wall-clock time, so that a later start has higher numbers than an earlier one
            and nobody can replay a record of the past; see `plan.leases`.
    """

    def __init__(
        self,
        discovery: Discovery,
        identity: Identity,
        *,
        describe: Callable[[], PeerRecord],
        interval_s: float,
        first_sequence: int,
    ) -> None:
        self._discovery = discovery
        self._identity = identity
        self._describe = describe
        self._interval_s = interval_s
        self._state = PeerState.JOINING
        self._sequence = first_sequence
        self._task: asyncio.Task[None] | None = None
        self._is_lost = False
        self.signed: SignedRecord | None = None

    def start(self) -> None:
        """Renew each interval from now on; `set_state` announces at once."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def set_state(self, state: PeerState) -> None:
        """Change the state and announce it now; failures are logged and mended by the next renewal."""
        self._state = state
        await self._announce()

    def abandon(self) -> None:
        """Stop without withdrawing, as a killed process does."""
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """Withdraw and stop; idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if self.signed is not None:
            try:
                await asyncio.wait_for(self._discovery.withdraw(self._sign()), 2.0)
            except (DiscoveryError, asyncio.TimeoutError) as exc:
                logger.info("record not withdrawn, its lease will run out: %s", exc)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._announce()

    async def _announce(self) -> None:
        try:
            await self._discovery.announce(self._sign())
        except DiscoveryError as exc:
            if not self._is_lost:
                logger.warning("announce failed, trying again every %.0f s: %s", self._interval_s, exc)
            self._is_lost = True
        else:
            if self._is_lost:
                logger.info("announced again state=%s", self._state.value)
            self._is_lost = False

    def _sign(self) -> SignedRecord:
        self._sequence += 1
        record = msgspec.structs.replace(self._describe(), sequence=self._sequence, state=self._state)
        self.signed = self._identity.sign_record(record)
        return self.signed
