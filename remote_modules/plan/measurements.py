"""What a client measured of each peer it works with, and what it therefore expects of it.

Answers override announcements: round trip and bandwidth from the time that a request took beyond queue and compute,
speed from the seconds that the peer says it computed. All times are the client's own in sum, so that a peer that
reports wrong shares of them gains nothing. What was measured long ago counts less and less against the best that was
ever measured, so that a peer which was slow for a while is tried again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from remote_modules.peers import PeerId, PeerRecord
from remote_modules.plan.candidates import Candidate

__all__ = ["Measurements", "Sample"]

GAIN = 0.25  # of each sample in the smoothed value
HALF_LIFE_S = 15.0  # after which half of a (logarithmic) difference from the best is forgotten
LARGE_BYTES = 64 * 1024  # from here on the time tells of the bandwidth, below of the round trip
MIN_S_PER_BYTE = 1e-11  # nobody is faster than 100 GB/s
LOAD_FRESH_S = 10.0  # for so long a reply tells more about the load than an announcement
MAX_PEERS = 4096  # remembered; about 600 bytes each
MIN_S = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answered request.

    Attributes:
        kind: ``"decode"``, ``"prefill"``, ``"forward"``, ``"backward"`` or ``"kept_backward"`` (without recomputation).
        work: tokens (of all rows) times blocks.
        num_bytes: of request and answer.
        total_s: from sending to the answer, by our clock.
        queue_s, compute_s: as the peer tells.
        load, free_kv_tokens: of the peer, when it answered.
        is_alone: whether no request of ours was on its way before it: else its time says nothing of the link.
    """

    kind: str
    work: float
    num_bytes: int
    total_s: float
    queue_s: float
    compute_s: float
    load: int
    free_kv_tokens: int
    is_alone: bool = True


@dataclass(slots=True)
class _Value:
    """A smoothed positive quantity of which less is better."""

    smooth: float
    best: float
    seen_s: float

    def add(self, sample: float, now_s: float) -> None:
        before = self.now(now_s)
        self.smooth = before + GAIN * (sample - before)
        self.best = min(self.best, sample)
        self.seen_s = now_s

    def now(self, now_s: float) -> float:
        weight: float = 0.5 ** ((now_s - self.seen_s) / HALF_LIFE_S)
        return self.best * math.pow(self.smooth / self.best, weight)


@dataclass(slots=True)
class _Peer:
    values: dict[str, _Value] = field(default_factory=dict)  # "rtt", "byte", "decode", "prefill": seconds
    load: int = 0
    free_kv_tokens: int = 0
    answered_s: float = float("-inf")

    def add(self, name: str, sample: float, now_s: float) -> None:
        sample = max(MIN_S_PER_BYTE if name == "byte" else MIN_S, sample)
        if (value := self.values.get(name)) is None:
            self.values[name] = _Value(sample, sample, now_s)
        else:
            value.add(sample, now_s)

    def now(self, name: str, now_s: float) -> float | None:
        value = self.values.get(name)
        return None if value is None else value.now(now_s)


class Measurements:
    """All peers of one client."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, _Peer] = {}

    def observe(self, peer_id: PeerId, sample: Sample, *, rtt_s: float | None, now_s: float) -> None:
        """Learn from an answer.

        Args:
            rtt_s: of the connection, for a peer of which no small request was measured.
        """
        peer = self._of(peer_id)
        compute_s = min(sample.compute_s, sample.total_s)
        wire_s = max(0.0, sample.total_s - sample.queue_s - compute_s)
        if sample.is_alone and sample.num_bytes < LARGE_BYTES:
            peer.add("rtt", wire_s, now_s)
        elif sample.is_alone:
            peer.add("byte", (wire_s - (peer.now("rtt", now_s) or rtt_s or 0.0)) / sample.num_bytes, now_s)
        if not sample.kind.endswith("backward"):  # which is slower than what routes are chosen by
            peer.add("decode" if sample.kind == "decode" else "prefill", compute_s / max(1.0, sample.work), now_s)
        peer.load, peer.free_kv_tokens, peer.answered_s = sample.load, sample.free_kv_tokens, now_s

    def observe_lag(self, peer_id: PeerId, waited_s: float, *, now_s: float) -> None:
        """Learn that an answer took at least so long, and was awaited no longer."""
        self._of(peer_id).add("rtt", waited_s, now_s)

    def bandwidth_bytes_per_s(self, peer_id: PeerId, *, now_s: float) -> float | None:
        """Measured; None while unknown."""
        peer = self._peers.get(peer_id)
        s_per_byte = None if peer is None else peer.now("byte", now_s)
        return None if s_per_byte is None else 1.0 / s_per_byte

    def candidate(self, record: PeerRecord, *, rtt_s: float | None, group: str, now_s: float) -> Candidate:
        """What is known of a peer: measured where it was, else announced.

        Args:
            rtt_s: of the connection; None where there is none.
        """
        peer_id = PeerId(record.peer_id)
        peer = self._peers.get(peer_id)
        if peer is None:
            peer = _Peer()
        measured_rtt_s = peer.now("rtt", now_s)
        is_fresh = now_s - peer.answered_s < LOAD_FRESH_S
        decode_s, prefill_s = peer.now("decode", now_s), peer.now("prefill", now_s)
        return Candidate(
            peer_id=peer_id,
            span=record.span,
            rtt_s=rtt_s if measured_rtt_s is None else measured_rtt_s,
            decode_tokens_per_s=record.decode_tokens_per_s if decode_s is None else 1.0 / decode_s,
            prefill_tokens_per_s=record.prefill_tokens_per_s if prefill_s is None else 1.0 / prefill_s,
            free_kv_tokens=peer.free_kv_tokens if is_fresh else record.free_kv_tokens,
            load=peer.load if is_fresh else record.load,
            group=group,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s(peer_id, now_s=now_s),
        )

    def _of(self, peer_id: PeerId) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                del self._peers[next(iter(self._peers))]
            peer = self._peers[peer_id] = _Peer()
        return peer
