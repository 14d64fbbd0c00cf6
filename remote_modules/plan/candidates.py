"""What a client knows of the peers that it may use, what a pass asks of them, and what each would cost.

The cost of a hop, in seconds, is::

    round trip   rtt_s, or DEFAULT_RTT_S while unmeasured
    + transfer   2 x payload / bandwidth: every hop answers to the client, so each pays both ways
    + queue      load x this request over the peer's whole span: the others are taken to ask for as much
    + KV room    KV_PENALTY_S if the session does not fit into free_kv_tokens
    + compute    tokens x blocks of the hop / speed (decode or prefill; a default one while unmeasured)

Only the last term grows with the hop; the others are paid once by each hop.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from remote_modules.peers import PeerId
from remote_modules.spans import Span

__all__ = ["Candidate", "Demand", "Hop", "Prices", "prices", "seconds_of"]

DEFAULT_RTT_S = 0.05
DEFAULT_DECODE_TOKENS_PER_S = 300.0  # the value Petals assumes for a server that announced none
DEFAULT_PREFILL_TOKENS_PER_S = 3000.0
DEFAULT_BANDWIDTH_BYTES_PER_S = 12.5e6  # 100 Mbit/s
KV_PENALTY_S = 300.0  # beyond what a pass may take: such a peer is asked only where no other has room

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the client knows of one peer, right now.

    Attributes:
        span: all the blocks that the peer holds; hops are cut from it.
        rtt_s: measured, finite; None while unknown.
        decode_tokens_per_s, prefill_tokens_per_s: through one block; 0 while unknown.
        free_kv_tokens: tokens of one sequence that the peer still admits.
        load: requests queued or running, from its latest reply or announcement.
        group: peers of one route must share it (model weights and dtype policy).
        bandwidth_bytes_per_s: measured; None while unknown.
    """

    peer_id: PeerId
    span: Span
    rtt_s: float | None
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    free_kv_tokens: int
    load: int
    group: str = ""
    bandwidth_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """One peer and the blocks that it will run."""

    peer_id: PeerId
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one pass asks of every hop.

    Attributes:
        num_tokens: tokens of each row that this pass will process.
        kv_tokens: tokens of each row that the session may come to hold; 0 for a stateless pass.
        bytes_per_token: hidden states on the wire.
        is_decode: whether the peers' decode speed applies, not their prefill speed.
        bandwidth_bytes_per_s: of peers whose own is not measured.
        adapter: that peers must offer, as in their records; "" for any peer.
        has_adapter_rows: whether rows have different adapters, which older peers do not know.
    """

    num_tokens: int
    kv_tokens: int
    bytes_per_token: int
    is_decode: bool
    rows: int = 1
    bandwidth_bytes_per_s: float = DEFAULT_BANDWIDTH_BYTES_PER_S
    adapter: str = ""
    has_adapter_rows: bool = False


@dataclass(frozen=True, slots=True)
class Prices:
    """The costs of all candidates that can serve anything, in the order of their ids; arrays ``[candidates]``.

    Attributes:
        groups: index of each candidate's group among the sorted names.
        starts, ends: the part of each span between the outermost cuts in it.
        hop_s: paid once by each hop, without the queue.
        queue_s: what the requests ahead will take.
        block_s: paid for each block of a hop.
    """

    peer_ids: list[PeerId]
    groups: Ints
    starts: Ints
    ends: Ints
    hop_s: Floats
    queue_s: Floats
    block_s: Floats


def prices(candidates: Sequence[Candidate], demand: Demand, cuts: Collection[int] = ()) -> Prices:
    """Price ``candidates``; those without two cuts in their span are left out.

    Args:
        cuts: where hops may begin and end; empty for everywhere.
    """
    ordered = sorted(candidates, key=attrgetter("peer_id"))
    starts = np.array([candidate.span.start for candidate in ordered], np.int64)
    ends = np.array([candidate.span.end for candidate in ordered], np.int64)
    if cuts:
        legal = np.array(sorted(cuts), np.int64)
        first, last = np.searchsorted(legal, starts), np.searchsorted(legal, ends, "right") - 1
        useful = np.flatnonzero(first < last)
        ordered = [ordered[index] for index in useful]
        starts, ends = legal[first[useful]], legal[last[useful]]
    names = {name: number for number, name in enumerate(sorted({candidate.group for candidate in ordered}))}
    if demand.is_decode:
        speeds, default_speed = [c.decode_tokens_per_s for c in ordered], DEFAULT_DECODE_TOKENS_PER_S
    else:
        speeds, default_speed = [c.prefill_tokens_per_s for c in ordered], DEFAULT_PREFILL_TOKENS_PER_S
    num_tokens = demand.num_tokens * demand.rows
    block_s = num_tokens / _or_default(speeds, default_speed)
    hop_s = np.array([DEFAULT_RTT_S if c.rtt_s is None else c.rtt_s for c in ordered], np.float64)
    bandwidths = _or_default([c.bandwidth_bytes_per_s or 0.0 for c in ordered], demand.bandwidth_bytes_per_s)
    hop_s += 2 * num_tokens * demand.bytes_per_token / bandwidths
    free = np.array([c.free_kv_tokens for c in ordered], np.float64)
    hop_s += np.where(demand.kv_tokens * demand.rows > free, KV_PENALTY_S, 0.0)
    load = np.array([max(0, c.load) for c in ordered], np.float64)  # peers may announce any number
    return Prices(
        peer_ids=[candidate.peer_id for candidate in ordered],
        groups=np.array([names[candidate.group] for candidate in ordered], np.int64),
        starts=starts,
        ends=ends,
        hop_s=hop_s,
        queue_s=load * block_s * (ends - starts),
        block_s=block_s,
    )


def _or_default(values: Sequence[float], default: float) -> Floats:
    """Where a peer announced nothing, or no positive number, the default."""
    array = np.array(values, np.float64)
    return np.where(array > 0, array, default)


def seconds_of(hop: Hop, candidate: Candidate, demand: Demand) -> float:
    """The cost of one hop; infinite if the candidate does not hold its blocks."""
    if not candidate.span.covers(hop.span):
        return math.inf
    priced = prices([candidate], demand)
    return float(priced.hop_s[0] + priced.queue_s[0] + priced.block_s[0] * len(hop.span))
