"""The lease table of a tracker, and the rule that merges the answers of several sources.

Pure: verified records and the monotonic time go in; nothing here waits, sends or reads a clock.

One lease for each peer id. Who may change it:

    same instance, higher sequence      renews it
    same instance, same or lower        refused as stale
    instance not seen before            replaces it; the older instance is retired
    retired instance                    refused as a duplicate identity, until the newer lease ends
    withdrawal                          ends it; must be newer than what the tracker hands out to everybody

A signed record is public and can be repeated by anyone, so what counts is never "signed" alone but "newer
than before". Instances of one peer are ordered by sequence too once a peer starts its sequences from a clock
(`CLOCKED_SEQUENCE`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, PeerState, SignedRecord, short_id

__all__ = ["CLOCKED_SEQUENCE", "Lease", "LeaseTable", "TableFullError", "merge_records"]

# Sequences from here on can only come from a clock (2**40 ms is the year 2004): an identity that uses one
# never goes back, so an old record of a dead instance cannot be repeated to oust the live one. Smaller
# sequences start from zero in each process and say nothing about other instances.
CLOCKED_SEQUENCE = 2**40

MAX_RETIRED = 8  # instances remembered for each lease; a peer that restarts more often only fools itself


class TableFullError(DiscoveryError):
    """No room for another peer; a later announcement may succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One accepted announcement. Times are on the tracker's monotonic clock.

    Attributes:
        retired: ids of the instances that this peer's present instance replaced, oldest first.
    """

    signed: SignedRecord
    record: PeerRecord
    announced_at_s: float
    expires_at_s: float
    retired: tuple[str, ...] = ()


class LeaseTable:
    """What a tracker knows: at most ``max_records`` leases, about 4 KiB each (the worst case is 40 KiB)."""

    def __init__(self, *, max_records: int) -> None:
        self._max_records = max_records
        self._leases: dict[str, Lease] = {}

    def announce(self, signed: SignedRecord, record: PeerRecord, now_s: float, lease_s: float) -> None:
        """Grant or renew the lease of ``record``, which must be what `verify_record(signed)` returned.

        Raises:
            TableFullError: the table holds ``max_records`` other live leases.
            DiscoveryError: the record is stale, or its instance was replaced by a newer one.
        """
        held = self._get_live(record.peer_id, now_s)
        retired: tuple[str, ...] = ()
        if held is None:
            self._make_room(now_s)
        else:
            _check_newer(record, held)
            retired = held.retired
            if record.instance_id != held.record.instance_id:
                retired = (*retired, held.record.instance_id)[-MAX_RETIRED:]
        self._leases[record.peer_id] = Lease(
            signed=signed,
            record=record,
            announced_at_s=now_s,
            expires_at_s=now_s + lease_s,
            retired=retired,
        )

    def withdraw(self, record: PeerRecord, now_s: float) -> None:
        """End the lease of a peer; an unknown peer is no error.

        The sequence must be higher than the announced one, or equal if the peer announced that it is
        draining: everybody can look up the announced record and send it here.

        Raises:
            DiscoveryError: the record does not prove that its peer is leaving, or comes from another
            instance.
        """
        held = self._get_live(record.peer_id, now_s)
        if held is None:
            return
        if record.instance_id != held.record.instance_id:
            raise DiscoveryError(f"peer '{short_id(record.peer_id)}' runs as another instance: nothing withdrawn")
        is_goodbye = record.state is PeerState.DRAINING and record == held.record
        if not is_goodbye:
            _check_newer(record, held)
        del self._leases[record.peer_id]

    def lookup(self, model_key: str | None, now_s: float) -> list[Lease]:
        """Live leases of one model, or of all models for None, in the order in which the peers first came."""
        self._drop_expired(now_s)
        return [lease for lease in self._leases.values() if model_key is None or lease.record.model_key == model_key]

    def _get_live(self, peer_id: str, now_s: float) -> Lease | None:
        held = self._leases.get(peer_id)
        return held if held is not None and held.expires_at_s > now_s else None

    def _make_room(self, now_s: float) -> None:
        if len(self._leases) < self._max_records:
            return
        self._drop_expired(now_s)
        if len(self._leases) >= self._max_records:
            raise TableFullError(f"tracker is full: {self._max_records} peers; try again later")

    def _drop_expired(self, now_s: float) -> None:
        expired = [peer_id for peer_id, lease in self._leases.items() if lease.expires_at_s <= now_s]
        for peer_id in expired:
            del self._leases[peer_id]


def merge_records(lists: Iterable[Iterable[PeerRecord]]) -> list[PeerRecord]:
    """One record for each peer id: the one with the highest sequence, and of equals the first.

    Records carry no start time, so of two instances the one with the higher sequence counts as newer. That is
    right for sequences that start from a clock; else a dead instance can win for as long as a source still
    holds its lease.
    """
    best: dict[str, PeerRecord] = {}
    for records in lists:
        for record in records:
            held = best.get(record.peer_id)
            if held is None or record.sequence > held.sequence:
                best[record.peer_id] = record
    return list(best.values())


def _check_newer(record: PeerRecord, held: Lease) -> None:
    peer, newest = short_id(record.peer_id), held.record
    if record.instance_id in held.retired:
        raise DiscoveryError(
            f"duplicate identity: peer '{peer}' instance '{_short(record)}' was replaced by a newer instance "
            f"'{_short(newest)}'; give each server its own identity file"
        )
    is_ordered = record.instance_id == newest.instance_id or newest.sequence >= CLOCKED_SEQUENCE
    if is_ordered and record.sequence <= newest.sequence:
        raise DiscoveryError(
            f"stale record: peer '{peer}' sent sequence {record.sequence}, already seen {newest.sequence}"
        )


def _short(record: PeerRecord) -> str:
    return ascii(record.instance_id[:6])[1:-1]  # chosen by a stranger and bound for logs
