"""What a tracker tells people: for each model the coverage of its blocks and the peers, without addresses.

Pure. Peers contradict each other at will, so a model's name and size are those that most of its peers
announce, and spans that do not fit are left out of the coverage. Everything is capped: a tracker's table is
filled by strangers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from remote_modules.peers import PeerRecord, PeerState, short_id
from remote_modules.plan.leases import Lease

__all__ = ["ModelSummary", "PeerSummary", "SwarmState", "summarize"]

MAX_MODELS = 64  # shown, those with most peers first; 64 x 4,096 blocks is 0.5 MB of JSON
MAX_PEERS = 256  # shown for each model


class PeerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One row about a peer. ``age_s``: seconds since it last announced."""

    id: str
    span: str
    state: str
    dtype: str
    quantization: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    free_kv_tokens: int
    load: int
    version: str
    age_s: float


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One swarm.

    Attributes:
        coverage: for each block, how many online peers hold it.
        weakest_block: the first block that fewest online peers hold.
        num_peers: all of them; ``peers`` holds at most `MAX_PEERS`, sorted by span.
    """

    model: str
    model_key: str
    num_blocks: int
    coverage: list[int]
    weakest_block: int
    num_peers: int
    peers: list[PeerSummary]


class SwarmState(msgspec.Struct, frozen=True, kw_only=True):
    """All swarms of a tracker; ``models`` holds at most `MAX_MODELS`, largest first."""

    num_peers: int
    num_models: int
    models: list[ModelSummary]


def summarize(leases: Sequence[Lease], now_s: float) -> SwarmState:
    """Condense live leases; ``now_s`` is on the clock of the leases."""
    by_model: dict[str, list[Lease]] = {}
    for lease in leases:
        by_model.setdefault(lease.model_key, []).append(lease)
    largest = sorted(by_model.values(), key=len, reverse=True)[:MAX_MODELS]
    return SwarmState(
        num_peers=len(leases),
        num_models=len(by_model),
        models=[_summarize_model(group, now_s) for group in largest],
    )


def _summarize_model(leases: list[Lease], now_s: float) -> ModelSummary:
    seen = [(lease.record, now_s - lease.announced_at_s) for lease in leases]
    records = [record for record, _ in seen]
    num_blocks = Counter(record.num_blocks for record in records).most_common(1)[0][0]
    coverage = _coverage(records, num_blocks)
    by_span = sorted(seen, key=lambda one: (one[0].start, one[0].end, one[0].peer_id))
    return ModelSummary(
        model=Counter(record.model for record in records).most_common(1)[0][0],
        model_key=records[0].model_key,
        num_blocks=num_blocks,
        coverage=coverage,
        weakest_block=coverage.index(min(coverage)),
        num_peers=len(leases),
        peers=[_summarize_peer(record, age_s) for record, age_s in by_span[:MAX_PEERS]],
    )


def _coverage(records: list[PeerRecord], num_blocks: int) -> list[int]:
    changes = [0] * (num_blocks + 1)
    for record in records:
        if record.state is PeerState.ONLINE and record.num_blocks == num_blocks:
            changes[record.start] += 1
            changes[record.end] -= 1
    return list(accumulate(changes[:num_blocks]))


def _summarize_peer(record: PeerRecord, age_s: float) -> PeerSummary:
    return PeerSummary(
        id=short_id(record.peer_id),
        span=str(record.span),
        state=record.state.value,
        dtype=record.dtype,
        quantization=record.quantization,
        prefill_tokens_per_s=record.prefill_tokens_per_s,
        decode_tokens_per_s=record.decode_tokens_per_s,
        free_kv_tokens=record.free_kv_tokens,
        load=record.load,
        version=record.version,
        age_s=round(max(0.0, age_s), 1),
    )
