"""What no strategy can exceed, for any number of peers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from remote_modules.plan.throughput import Capacity

__all__ = ["relaxation_bound"]


def relaxation_bound(num_blocks: int, capacities: Collection[Capacity]) -> float:
    """The largest ``F`` with ``num_blocks * F <= sum of min(rate, longest * min(network, F))``, in tokens per second.

    No choice of spans gives every block more (the proof is at `solver.bottleneck_bound`). The sum is the least, over
    all sets of peers, of what the peers in the set could do at most and what the others do at ``F``; so ``F`` is the
    least of what each such set allows, and only the sets of those that are saturated first matter. Takes O(peers x log
    peers) time; legal cuts and bytes do not count here.
    """
    longest = np.array([min(capacity.max_blocks, num_blocks) for capacity in capacities], dtype=np.float64)
    rates = np.array([capacity.tokens_per_s for capacity in capacities])
    networks = np.array([capacity.network_tokens_per_s for capacity in capacities])
    most = np.minimum(rates, longest * networks)
    order = np.argsort(most / longest)
    saturated = np.concatenate(([0.0], np.cumsum(most[order])))
    slopes = np.concatenate((np.cumsum(longest[order][::-1])[::-1], [0.0]))
    is_limit = slopes < num_blocks
    return float((saturated[is_limit] / (num_blocks - slopes[is_limit])).min())
