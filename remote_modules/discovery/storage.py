"""Where a tracker keeps its leases: an interface, and the memory of one process.

One contract suite (`tests/storage_contract.py`) runs against each implementation. The rules are those of
`plan.leases`, whichever holds the leases; times are on the clock of the storage, never on a peer's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord
from remote_modules.plan.leases import Lease, LeaseTable

__all__ = ["LeaseStorage", "Listing", "MemoryStorage", "StorageDownError", "give_memory_back"]


_rng = Random()
MANY = 4096  # leases whose end is worth asking the allocator for: 20 ms


class StorageDownError(DiscoveryError):
    """The storage behind a tracker does not answer; a later announcement may succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Live leases, and the time at which they were read on the clock of their times."""

    leases: list[Lease]
    now_s: float


class LeaseStorage(Protocol):
    """The leases of one tracker, or of several that share them. All methods run on one event loop."""

    async def announce(self, signed: SignedRecord, record: PeerRecord, lease_s: float) -> None:
        """Grant or renew a lease, all or nothing; see `LeaseTable.announce`.

        Raises:
            TableFullError: no room for another peer.
            StaleRecordError: something newer is held; it carries the proof.
            StorageDownError: not known whether it was taken.
        """

    async def withdraw(self, record: PeerRecord) -> None:
        """End a lease; see `LeaseTable.withdraw`.

        Raises:
            DiscoveryError: the record does not prove that its peer is leaving.
            StorageDownError: not known whether it was ended.
        """

    async def lookup(self, model_key: str | None, *, limit: int | None = None) -> Listing:
        """Live leases of one model, or of all for None; a random sample if there are more than ``limit``.

        Raises:
            StorageDownError: it does not answer.
        """

    async def count(self) -> int:
        """Live leases.

        Raises:
            StorageDownError: it does not answer.
        """

    async def aclose(self) -> None:
        """Free sockets; idempotent. Leases that others share stay."""


class MemoryStorage:
    """Leases in this process; gone with it, and filled again by the peers' next announcements."""

    def __init__(self, *, max_records: int, clock: Callable[[], float]) -> None:
        self._table = LeaseTable(max_records=max_records)
        self._clock = clock
        self._most = 0  # leases held at a time, since memory was last given back

    async def announce(self, signed: SignedRecord, record: PeerRecord, lease_s: float) -> None:
        self._table.announce(signed, record, self._clock(), lease_s)

    async def withdraw(self, record: PeerRecord) -> None:
        self._table.withdraw(record, self._clock())

    async def lookup(self, model_key: str | None, *, limit: int | None = None) -> Listing:
        now_s = self._clock()
        leases = self._table.lookup(model_key, now_s)
        if limit is not None and len(leases) > limit:
            leases = _rng.sample(leases, limit)
        return Listing(leases=leases, now_s=now_s)

    async def count(self) -> int:
        num_leases = self._table.count(self._clock())
        self._most = max(self._most, num_leases)
        if self._most >= MANY and num_leases < self._most // 2:
            self._most = num_leases
            give_memory_back()
        return num_leases

    async def aclose(self) -> None:
        """Nothing is held."""


def give_memory_back() -> None:
    """Free memory to the system: glibc keeps what lies between blocks in use, which may be nearly all."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another C library
        trim(0)
