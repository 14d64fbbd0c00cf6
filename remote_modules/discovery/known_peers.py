"""Which peers this process knows of, from wherever: what it may tell others, and whom it may ask when others fail.

One table for each client and each peer of ours. Every source puts into it what it has verified; `discovery.exchange`
reads it. A record leaves `LEASE_S` after its peer was last known to live, however often it is told in the meantime
(`LeaseTable.hear`); where it could be dialled is remembered longer, in memory and on disk (`discovery.peer_cache`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from remote_modules.discovery.addresses import usable_addresses
from remote_modules.discovery.peer_cache import PeerCache
from remote_modules.peers import PeerRecord, SignedRecord
from remote_modules.plan.leases import Lease, LeaseTable

__all__ = ["LEASE_S", "KnownPeers"]

LEASE_S = 45.0  # as long as a tracker's, unless that is stretched
MAX_KNOWN = 1024  # records held; about 2 KiB each


class KnownPeers:
    """The table; all methods on one event loop, but for `open`.

    Args:
        own_peer_id: the peer whose table this is: what others say of it is no news.
        cache: where addresses outlive the process; None keeps them in memory only.
        lease_s: how long a peer counts as alive after it was last known to be.
        clock: monotonic seconds; whoever hands in times reads this one.
    """

    def __init__(
        self,
        *,
        own_peer_id: str = "",
        cache: PeerCache | None = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_s = lease_s
        self.own_peer_id = own_peer_id
        self._cache = cache
        self.clock = clock
        self._table = LeaseTable(max_records=MAX_KNOWN)

    @classmethod
    def kept_in(cls, folder: Path | None, *, own_peer_id: str = "") -> KnownPeers:
        """A table whose addresses are remembered in ``folder``, or nowhere for None."""
        return cls(own_peer_id=own_peer_id, cache=None if folder is None else PeerCache(folder))

    def hear(self, signed: SignedRecord, record: PeerRecord, *, at_s: float | None = None, via: str = "") -> None:
        """Take a verified record.

        Args:
            at_s: when its peer was known to live, on this process's monotonic clock; None means now.
            via: the IP address of whoever told, if that was not the peer itself: its private addresses are another's.
        """
        if record.peer_id == self.own_peer_id:
            return
        now_s = self.clock()
        heard_s = now_s if at_s is None else min(at_s, now_s)
        if self._table.hear(signed, record, at_s=heard_s, now_s=now_s, lease_s=self.lease_s, via=via):
            if self._cache is not None and _addresses(record, via):
                self._cache.note(signed, record, via)

    def announce(self, signed: SignedRecord, record: PeerRecord, *, via: str) -> None:
        """Take what a peer says of itself, from the IP address ``via``.

        Raises:
            TableFullError: no room.
            StaleRecordError: something newer is known.
        """
        self._table.announce(signed, record, self.clock(), self.lease_s, via=via)
        if self._cache is not None and _addresses(record, via):
            self._cache.note(signed, record, via)

    def withdraw(self, record: PeerRecord) -> None:
        """Forget a peer that says goodbye.

        Raises:
            DiscoveryError: the record does not prove that its peer is leaving.
        """
        self._table.withdraw(record, self.clock())
        if self._cache is not None:
            self._cache.forget(record)

    def leases(self, model_key: str | None) -> tuple[list[Lease], float]:
        """What may be told others, and the present time on the clock of these leases."""
        now_s = self.clock()
        return self._table.lookup(model_key, now_s), now_s

    def records(self, model_key: str | None) -> list[PeerRecord]:
        """Peers known to live, with the addresses that may be dialled; those without any are left out."""
        leases, _ = self.leases(model_key)
        records = []
        for lease in leases:
            record = lease.record
            if addresses := _addresses(record, lease.via):
                records.append(msgspec.structs.replace(record, addresses=addresses))
        return records

    def remembered(self, model_key: str | None) -> list[tuple[str, ...]]:
        """Addresses of each peer that was known once, latest first; whether they still live is not known."""
        return [] if self._cache is None else self._cache.addresses(model_key)

    def save(self) -> None:
        """Write what is new to disk; failures are logged."""
        if self._cache is not None:
            self._cache.save()


def _addresses(record: PeerRecord, via: str) -> tuple[str, ...]:
    return usable_addresses(record.addresses, via) if via else record.addresses
