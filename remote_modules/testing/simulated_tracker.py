"""Trackers under virtual time: the real lease table, and everything that can be wrong with a tracker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from remote_modules.errors import DiscoveryError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord
from remote_modules.plan.leases import LeaseTable, merge_records
from remote_modules.testing.memory_network import MemoryNetwork

__all__ = ["LEASE_S", "SimulatedTracker", "TrackerLink"]

LEASE_S = 30.0
ANSWER_S = 0.01
TIMEOUT_S = 5.0  # of whoever asks a tracker
MAX_REMEMBERED = 64

_verified = lru_cache(maxsize=4096)(verify_record)  # every tracker gets the same, and most runs


class SimulatedTracker:
    """A tracker that can be down, late, or lie; it lives at ``address``.

    Attributes:
        late_s: how long it takes to answer, beyond the usual.
        lies: whether it answers with the oldest records that it ever saw.
        fired: how often it was down, late or lied.
    """

    def __init__(
        self, clock: Callable[[], float], address: str = "tracker-0", fired: Counter[str] | None = None
    ) -> None:
        self.address = address
        self.is_up = True
        self.late_s = 0.0
        self.lies = False
        self.fired: Counter[str] = Counter() if fired is None else fired
        self._clock = clock
        self._table = LeaseTable(max_records=1000)
        self._oldest: dict[str, PeerRecord] = {}

    def kill(self) -> None:
        self.is_up = False

    def restart(self) -> None:
        """Come back empty."""
        self.is_up = True
        self._table = LeaseTable(max_records=1000)

    def live(self) -> dict[str, PeerRecord]:
        """What it would answer now if nothing were wrong with it, by peer id."""
        return {lease.record.peer_id: lease.record for lease in self._table.lookup(None, self._clock())}

    async def announce(self, signed: SignedRecord) -> None:
        await self._answer()
        record = _verified(signed)
        if len(self._oldest) < MAX_REMEMBERED:
            self._oldest.setdefault(record.peer_id, record)
        self._table.announce(signed, record, self._clock(), LEASE_S)

    async def withdraw(self, signed: SignedRecord) -> None:
        await self._answer()
        self._table.withdraw(_verified(signed), self._clock())

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        await self._answer()
        if self.lies:
            self.fired["tracker lies"] += 1
            return [record for record in self._oldest.values() if model_key in (None, record.model_key)]
        return merge_records([[lease.record for lease in self._table.lookup(model_key, self._clock())]])

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _answer(self) -> None:
        if self.late_s:
            self.fired["tracker late"] += 1
        await asyncio.sleep(ANSWER_S + self.late_s)
        if not self.is_up:
            self.fired["tracker down"] += 1
            raise DiscoveryError("tracker is down")


class TrackerLink:
    """The `Discovery` through which ``source`` asks one tracker: as good as the network between them."""

    def __init__(self, tracker: SimulatedTracker, network: MemoryNetwork, source: str) -> None:
        self._tracker = tracker
        self._network = network
        self._source = source

    async def announce(self, signed: SignedRecord) -> None:
        await self._pass("announce")
        await self._tracker.announce(signed)

    async def withdraw(self, signed: SignedRecord) -> None:
        await self._pass("announce")
        await self._tracker.withdraw(signed)

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        await self._pass("lookup")
        return await self._tracker.lookup(model_key)

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _pass(self, kind: str) -> None:
        """Find out whether the question arrives, and the answer in time."""
        network, tracker = self._network, self._tracker
        way = network.points.reach(kind) if network.points is not None else None
        if way == "error":
            raise DiscoveryError("the simulation says that this tracker is broken")
        is_open = network.is_open(self._source, tracker.address) and network.is_open(tracker.address, self._source)
        if way == "silent" or not is_open or tracker.late_s >= TIMEOUT_S:
            network.fired["tracker unreachable"] += 1
            await asyncio.sleep(TIMEOUT_S)
            raise DiscoveryError(f"{tracker.address} does not answer")
