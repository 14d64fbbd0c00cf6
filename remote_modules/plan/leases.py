"""The lease table of a tracker, and the rule that merges the answers of several sources.

Pure: verified records and the monotonic time go in; nothing here waits, sends or reads a clock.

One lease for each peer id. Who may change it:

    same instance, higher sequence      renews it
    same instance, same or lower        refused as stale
    instance not seen before            replaces it; the older instance is retired
    retired instance                    refused as a duplicate identity, until the newer lease ends
    withdrawal                          ends it; must be newer than what the tracker hands out to everybody
    hearsay (`LeaseTable.hear`)         the same rules, but never refused aloud, and never younger than it says it is

A signed record is public and can be repeated by anyone, so what counts is never "signed" alone but "newer
than before". Instances of one peer are ordered by sequence too once a peer starts its sequences from a clock
(`CLOCKED_SEQUENCE`). A refusal carries the record that stands against it: whoever is refused can check it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, PeerState, SignedRecord, decode_record, short_id

__all__ = [
    "CLOCKED_SEQUENCE",
    "DuplicateIdentityError",
    "Lease",
    "LeaseTable",
    "StaleRecordError",
    "TableFullError",
    "check_announced",
    "check_withdrawn",
    "lease_of",
    "merge_records",
    "reannounce_after",
]

# Sequences from here on can only come from a clock (2**40 ms is the year 2004): an identity that uses one
# never goes back, so an old record of a dead instance cannot be repeated to oust the live one. Smaller
# sequences start from zero in each process and say nothing about other instances.
CLOCKED_SEQUENCE = 2**40

MAX_RETIRED = 8  # instances remembered for each lease; a peer that restarts more often only fools itself
MAX_STRETCH = 10.0  # an interval is never stretched further: a ghost must not live for ever because a tracker is busy


class TableFullError(DiscoveryError):
    """No room for another peer; a later announcement may succeed."""


class StaleRecordError(DiscoveryError):
    """Something newer of the same peer is known.

    Attributes:
        newest: the proof, as its peer signed it.
    """

    def __init__(self, message: str, *, newest: SignedRecord) -> None:
        super().__init__(message)
        self.newest = newest


class DuplicateIdentityError(StaleRecordError):
    """A newer instance has taken the identity over: the refused one must stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One accepted announcement. Times are on the clock of whoever holds it, in seconds.

    Attributes:
        instance_id, sequence, model_key: as in the record.
        announced_at_s: when its peer was last known to live.
        retired: ids of the instances that this peer's present instance replaced, oldest first.
        via: the IP address of whoever told, if the holder keeps it.
    """

    signed: SignedRecord
    instance_id: str
    sequence: int
    model_key: str
    announced_at_s: float
    expires_at_s: float
    retired: tuple[str, ...] = ()
    via: str = ""

    @property
    def record(self) -> PeerRecord:
        """Decoded anew each time, in 4 us: a table of decoded records takes three times the memory."""
        return decode_record(self.signed.payload)


class LeaseTable:
    """At most ``max_records`` leases, one for each peer; each takes about 1 KiB and what its peer signed."""

    def __init__(self, *, max_records: int) -> None:
        self._max_records = max_records
        self._leases: dict[str, Lease] = {}
        self._by_model: dict[str, dict[str, None]] = {}  # peer ids; the values say nothing
        self._expiries: list[
            tuple[float, str]
        ] = []  # a heap; each peer has an entry that is due when its lease ends, or before

    def __len__(self) -> int:
        """Leases held, with those that have expired since the last call with a time."""
        return len(self._leases)

    def announce(
        self, signed: SignedRecord, record: PeerRecord, now_s: float, lease_s: float, *, via: str = ""
    ) -> None:
        """Grant or renew the lease of ``record``, which must be what `verify_record(signed)` returned.

        Raises:
            TableFullError: the table holds ``max_records`` other live leases.
            StaleRecordError: the record is stale, or its instance was replaced by a newer one.
        """
        held = self.get(record.peer_id, now_s)
        retired: tuple[str, ...] = ()
        if held is None:
            self._make_room(now_s)
        else:
            retired = check_announced(record, held)
        self._put(lease_of(signed, record, now_s, lease_s, retired=retired, via=via), record.peer_id)

    def hear(
        self, signed: SignedRecord, record: PeerRecord, *, at_s: float, now_s: float, lease_s: float, via: str = ""
    ) -> bool:
        """Take a verified record that somebody passed on, whose peer was known to live at ``at_s``.

        The same record heard again counts from the later ``at_s``; the lease ends ``lease_s`` after it, so that what
        goes round among the living says no longer than that that a dead peer lives.

        Returns:
            Whether it is new here: an unknown peer, or a newer record of one.
        """
        if at_s + lease_s <= now_s:
            return False
        held = self.get(record.peer_id, now_s)
        retired: tuple[str, ...] = ()
        if held is None:
            self._drop_expired(now_s)
            if len(self._leases) >= self._max_records:
                return False
        elif (record.instance_id, record.sequence) == (held.instance_id, held.sequence):
            if at_s > held.announced_at_s:
                self._put(replace(held, announced_at_s=at_s, expires_at_s=at_s + lease_s), record.peer_id)
            return False
        else:
            try:
                retired = check_announced(record, held)
            except StaleRecordError:
                return False
        self._put(lease_of(signed, record, at_s, lease_s, retired=retired, via=via), record.peer_id)
        return True

    def withdraw(self, record: PeerRecord, now_s: float) -> None:
        """End the lease of a peer; an unknown peer is no error.

        The sequence must be higher than the announced one, or equal if the peer announced that it is
        draining: everybody can look up the announced record and send it here.

        Raises:
            DiscoveryError: the record does not prove that its peer is leaving, or comes from another
            instance.
        """
        held = self.get(record.peer_id, now_s)
        if held is not None:
            check_withdrawn(record, held)
            self._drop(record.peer_id)

    def get(self, peer_id: str, now_s: float) -> Lease | None:
        """The live lease of one peer."""
        held = self._leases.get(peer_id)
        return held if held is not None and held.expires_at_s > now_s else None

    def lookup(self, model_key: str | None, now_s: float) -> list[Lease]:
        """Live leases of one model, or of all models for None, in the order in which the peers first came."""
        self._drop_expired(now_s)
        peer_ids = self._leases if model_key is None else self._by_model.get(model_key, {})
        return [lease for peer_id in peer_ids if (lease := self._leases[peer_id]).expires_at_s > now_s]

    def count(self, now_s: float) -> int:
        """Live leases, of all models."""
        self._drop_expired(now_s)
        return len(self._leases)

    def _put(self, lease: Lease, peer_id: str) -> None:
        held = self._leases.get(peer_id)
        self._leases[peer_id] = lease
        if held is not None and held.model_key != lease.model_key:
            self._leave_model(held.model_key, peer_id)
        self._by_model.setdefault(lease.model_key, {})[peer_id] = None
        if held is None or lease.expires_at_s < held.expires_at_s:
            heapq.heappush(self._expiries, (lease.expires_at_s, peer_id))
            if len(self._expiries) > 2 * len(self._leases) + 64:  # peers that came and went leave entries behind
                self._expiries = [(other.expires_at_s, other_id) for other_id, other in self._leases.items()]
                heapq.heapify(self._expiries)

    def _drop(self, peer_id: str) -> None:
        self._leave_model(self._leases.pop(peer_id).model_key, peer_id)
        if not self._leases:
            self._leases = {}  # a dict keeps the room of the most that it ever held

    def _leave_model(self, model_key: str, peer_id: str) -> None:
        peer_ids = self._by_model[model_key]
        del peer_ids[peer_id]
        if not peer_ids:
            del self._by_model[model_key]

    def _make_room(self, now_s: float) -> None:
        if len(self._leases) < self._max_records:
            return
        self._drop_expired(now_s)
        if len(self._leases) >= self._max_records:
            raise TableFullError(f"tracker is full: {self._max_records} peers; try again later")

    def _drop_expired(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            _, peer_id = heapq.heappop(self._expiries)
            lease = self._leases.get(peer_id)
            if lease is None:
                continue  # withdrawn
            if lease.expires_at_s <= now_s:
                self._drop(peer_id)
            else:  # renewed since
                heapq.heappush(self._expiries, (lease.expires_at_s, peer_id))


def check_announced(record: PeerRecord, held: Lease) -> tuple[str, ...]:
    """Whether ``record`` may take the place of ``held``, a live lease of the same peer.

    Returns:
        What `Lease.retired` becomes.

    Raises:
        DuplicateIdentityError: a newer instance has replaced the record's.
        StaleRecordError: the record is no newer than what is held.
    """
    peer = short_id(record.peer_id)
    if record.instance_id in held.retired:
        raise DuplicateIdentityError(
            f"duplicate identity: peer '{peer}' instance '{_short(record.instance_id)}' was replaced by a newer "
            f"instance '{_short(held.instance_id)}'; give each server its own identity file",
            newest=held.signed,
        )
    is_other = record.instance_id != held.instance_id
    if (not is_other or held.sequence >= CLOCKED_SEQUENCE) and record.sequence <= held.sequence:
        raise StaleRecordError(
            f"stale record: peer '{peer}' sent sequence {record.sequence}, already seen {held.sequence}",
            newest=held.signed,
        )
    return (*held.retired, held.instance_id)[-MAX_RETIRED:] if is_other else held.retired


def check_withdrawn(record: PeerRecord, held: Lease) -> None:
    """Whether ``record`` proves that its peer leaves; see `LeaseTable.withdraw`.

    Raises:
        DiscoveryError: it does not.
    """
    if record.instance_id != held.instance_id:
        raise DiscoveryError(f"peer '{short_id(record.peer_id)}' runs as another instance: nothing withdrawn")
    is_goodbye = record.state is PeerState.DRAINING and record == held.record
    if not is_goodbye:
        check_announced(record, held)


def reannounce_after(num_peers: int, *, interval_s: float, max_announces_per_s: float) -> float:
    """Shortest pause of a peer between announcements, in seconds, with which so many peers take half of what a tracker
    takes; at most `MAX_STRETCH` times the usual ``interval_s``.
    """
    return min(2 * num_peers / max_announces_per_s, MAX_STRETCH * interval_s)


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


def lease_of(
    signed: SignedRecord,
    record: PeerRecord,
    at_s: float,
    lease_s: float,
    *,
    retired: tuple[str, ...] = (),
    via: str = "",
) -> Lease:
    """The lease of a verified record, for ``lease_s`` from ``at_s``."""
    return Lease(
        signed=signed,
        instance_id=record.instance_id,
        sequence=record.sequence,
        model_key=record.model_key,
        announced_at_s=at_s,
        expires_at_s=at_s + lease_s,
        retired=retired,
        via=via,
    )


def _short(instance_id: str) -> str:
    return ascii(instance_id[:6])[1:-1]  # chosen by a stranger and bound for logs
