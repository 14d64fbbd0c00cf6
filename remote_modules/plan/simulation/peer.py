"""One simulated server: what it is, what it holds, and the record that it announces."""

from __future__ import annotations

import enum

import msgspec

from remote_modules.peers import PeerId, PeerRecord, PeerState, SignedRecord
from remote_modules.plan.election import Member
from remote_modules.plan.rebalance import MoveCost, Turns
from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.throughput import Capacity, Holder
from remote_modules.spans import Span

__all__ = ["ID_CHARACTERS", "MODEL_KEY", "PROOF_BYTES", "TOKEN_BYTES", "Peer", "Phase"]

MODEL_KEY = "simulated-model-of-the-swarm"  # as long as a real one
PROOF_BYTES = 32 + 64  # key and signature, which are not simulated but travel with each record
DIGEST_CHARACTERS = 12  # of one block
ID_CHARACTERS = 52
TOKEN_BYTES = 16384  # of one token between blocks: 8192 numbers in 16 bits


class Phase(enum.Enum):
    """Where a server is in its life."""

    LOADING = "loading"  # after the join, or after a move: announced, serves nobody
    SERVING = "serving"
    GONE = "gone"  # crashed or withdrawn


class Peer:
    """A server. The swarm changes it; whoever gets one from the swarm only reads it.

    Attributes:
        span: what it holds, or loads.
        cached: bit for each block that is in its disk cache.
        is_fetching: whether it serves, and fetches what it wants to serve next.
        expires_at_s: of its lease.
        record_bytes: of its announcement, proof included.
        turns: whom it waits for, by its own checks.
    """

    __slots__ = (
        "cached",
        "capacity",
        "expires_at_s",
        "is_fetching",
        "phase",
        "record",
        "record_bytes",
        "span",
        "turns",
    )

    def __init__(self, number: int, capacity: Capacity, span: Span, conditions: Conditions) -> None:
        self.capacity = capacity
        self.span = span
        self.phase = Phase.LOADING
        self.is_fetching = False
        self.cached = 0
        self.turns = Turns()
        self.expires_at_s = 0.0
        self.record_bytes = 0
        self.record = PeerRecord(
            peer_id=str(number).zfill(ID_CHARACTERS),
            instance_id="0123456789abcdef",
            sequence=0,
            model="simulated/model",
            model_key=MODEL_KEY,
            num_blocks=conditions.num_blocks,
            start=span.start,
            end=span.end,
            addresses=("198.51.100.100:31330",),
            state=PeerState.JOINING,
            block_digests=_digests(span),
            certificate_sha256="0" * 64,
            dtype="bfloat16",
            decode_tokens_per_s=capacity.tokens_per_s,
            prefill_tokens_per_s=10 * capacity.tokens_per_s,
            max_blocks=capacity.max_blocks,
            bandwidth_bytes_per_s=capacity.network_tokens_per_s * TOKEN_BYTES,
            free_kv_tokens=100_000,
            version="0.1.0",
        )

    @property
    def peer_id(self) -> PeerId:
        return PeerId(self.record.peer_id)

    @property
    def holder(self) -> Holder:
        """What it gives to the swarm once it serves."""
        return Holder(self.span, self.capacity.tokens_per_s, self.capacity.network_tokens_per_s)

    @property
    def member(self) -> Member:
        """It as others see it: as its last record says."""
        record = self.record
        return Member(peer_id=self.peer_id, span=record.span, capacity=self.capacity, state=record.state)

    def cost(self, conditions: Conditions, *, is_fetched: bool) -> MoveCost:
        """Of a move, with the time to fetch blocks unless that is done before."""
        cached = [block for block in range(conditions.num_blocks) if self.cached >> block & 1]
        fetch_s = 0.0 if is_fetched else conditions.fetch_s_per_block
        return MoveCost(load_s=conditions.read_s_per_block, fetch_s=fetch_s, cached=cached)

    def fetch_s(self, span: Span, conditions: Conditions) -> float:
        """Time to bring the blocks of ``span`` that are not there into the disk cache."""
        return (_bits(span) & ~self.cached).bit_count() * conditions.fetch_s_per_block

    def keep(self, span: Span) -> None:
        """The blocks of ``span`` are in the disk cache from now on."""
        self.cached |= _bits(span)

    def start_load(self, span: Span, conditions: Conditions) -> float:
        """Let go of what it holds and load ``span``; how long that takes, in seconds.

        Whatever it ever loaded is in its disk cache and is read from there.
        """
        self.phase = Phase.LOADING
        self.span = span
        load_s = self.cost(conditions, is_fetched=False).seconds(span)
        self.keep(span)
        return load_s

    def sign(self) -> SignedRecord:
        """The next announcement; the proof is empty, as nobody checks it here."""
        self.record = msgspec.structs.replace(self.record, sequence=self.record.sequence + 1)
        payload = msgspec.msgpack.encode(self.record)
        self.record_bytes = len(payload) + PROOF_BYTES
        return SignedRecord(payload=payload, public_key=b"", signature=b"")

    def describe(self) -> None:
        """Bring the record up to date with phase and span."""
        self.record = msgspec.structs.replace(
            self.record,
            start=self.span.start,
            end=self.span.end,
            block_digests=_digests(self.span),
            state=PeerState.ONLINE if self.phase is Phase.SERVING else PeerState.JOINING,
        )


def _bits(span: Span) -> int:
    return ((1 << len(span)) - 1) << span.start


def _digests(span: Span) -> tuple[str, ...]:
    return tuple(str(block).zfill(DIGEST_CHARACTERS) for block in span)
