"""In which form hidden states travel along a route: as they are, unless its links are what takes the time.

Pure. Each form loses more than the one before it, so it must save a good part of the whole time, its own work counted.
A peer of which no bandwidth was measured is taken to have a fast link: nothing is lost for a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Hop, seconds_of

__all__ = ["PLAIN", "choose_wire"]

PLAIN = "compute"
LEAST_SAVING = 0.1  # of the time, for the next form
CODEC_S_PER_BYTE = 2.5e-9  # plain bytes coded and decoded: 860 and 3,200 MB/s for 8 bits of bfloat16 (benchmarks.md)
FAST_BYTES_PER_S = 1e12


def choose_wire(
    hops: Sequence[Hop],
    candidates: Mapping[PeerId, Candidate],
    demand: Demand,
    coded_bytes: Mapping[str, int],
    *,
    is_pipelined: bool,
) -> str:
    """`PLAIN`, or a key of ``coded_bytes``.

    Args:
        candidates: those of all hops that are known.
        demand: of the first step or a part of the pass, with the bytes of plain tensors.
        coded_bytes: of a token, by form; the first loses least.
        is_pipelined: whether many such requests are under way at once, so that round trips cost nothing.
    """
    if not all(hop.peer_id in candidates for hop in hops):
        return PLAIN
    codec_s = CODEC_S_PER_BYTE * demand.bytes_per_token * demand.num_tokens * demand.rows

    def seconds(bytes_per_token: int) -> float:
        asked = replace(demand, bytes_per_token=bytes_per_token, bandwidth_bytes_per_s=FAST_BYTES_PER_S)
        costs = []
        for hop in hops:
            candidate = candidates[hop.peer_id]
            if is_pipelined:
                candidate = replace(candidate, rtt_s=0.0, load=0)
            cost = seconds_of(hop, candidate, asked)
            costs.append(cost if bytes_per_token == demand.bytes_per_token else cost + 2 * codec_s)
        return math.fsum(costs)

    best, best_s = PLAIN, seconds(demand.bytes_per_token)
    for form, num_bytes in coded_bytes.items():
        form_s = seconds(num_bytes)
        if form_s <= (1.0 - LEAST_SAVING) * best_s:
            best, best_s = form, form_s
    return best
