"""What a simulated swarm is made of: how many peers, how unequal, how they come and go, and their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from remote_modules.plan.throughput import Capacity
from remote_modules.spans import MAX_BLOCKS

if TYPE_CHECKING:
    from random import Random

__all__ = ["MAX_PEERS", "Conditions", "draw_capacity"]

MAX_PEERS = 1_000_000  # a record and a lease each, about 2.5 KB: more would not fit into the memory of one machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """One kind of swarm. The defaults are those of the figures in docs/simulation.md.

    Attributes:
        num_peers: how many there are at a time, on average: they come at ``num_peers / mean_life_s``.
        mean_life_s: of the exponential time from join to leave.
        crash_share: of the leaves; the others withdraw their record first.
        median_tokens_per_s, speed_sigma: of the lognormal speed of a peer through one block.
        median_network_tokens_per_s, network_sigma: of the lognormal speed of its link.
        min_span, max_span: blocks that fit into a peer, uniform.
        fetch_s_per_block: to bring a block into the disk cache of a peer, where it stays.
        read_s_per_block: to bring a block from there into memory.
        announce_jitter: the share of the interval by which each announcement comes earlier or later.
        ramp_s: within so long the first ``num_peers`` join, at uniform times.
        warm_up_s: so long nothing is counted.
        sample_interval_s: between two `Sample` of the report.
        route_interval_s: between two routes that a client looks for; infinite for none.
        fetches_ahead: whether a server that wants to move goes on serving while it fetches blocks into its disk cache,
            and then decides once more; else it stops first.
        view_age_s: the records that a server sees when it checks may be so old; all share that view, and one election.
            0: everyone looks anew.
        max_known: records of which a client chooses its route, drawn from all leases.
    """

    num_blocks: int = 80
    num_peers: int = 100
    mean_life_s: float = 2 * 3600.0
    crash_share: float = 0.5
    median_tokens_per_s: float = 1000.0
    speed_sigma: float = 0.5
    median_network_tokens_per_s: float = 750.0  # 100 Mbit/s at 16 KiB for each token
    network_sigma: float = 0.5
    min_span: int = 3
    max_span: int = 30
    fetch_s_per_block: float = 5.0
    read_s_per_block: float = 0.5
    announce_interval_s: float = 15.0
    announce_jitter: float = 0.1
    lease_s: float = 45.0
    ramp_s: float = 600.0
    warm_up_s: float = 1800.0
    sample_interval_s: float = 30.0
    route_interval_s: float = 60.0
    fetches_ahead: bool = True
    view_age_s: float = 0.0
    max_known: int = 1000

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not value >= 0 or (name in _POSITIVE and value == 0):
                wanted = "more than 0" if name in _POSITIVE else "0 or more"
                raise ValueError(f"{name} must be {wanted}, got {value}")
        if not 1 <= self.num_peers <= MAX_PEERS:
            raise ValueError(f"num_peers must be in 1..{MAX_PEERS}, got {self.num_peers}")
        if not 1 <= self.min_span <= self.max_span <= self.num_blocks <= MAX_BLOCKS:
            raise ValueError(
                f"spans must satisfy 1 <= min_span <= max_span <= num_blocks <= {MAX_BLOCKS}, "
                f"got {self.min_span}, {self.max_span}, {self.num_blocks}"
            )
        if self.crash_share > 1 or self.announce_jitter >= 1:
            raise ValueError(
                f"crash_share may be at most 1 and announce_jitter less than 1, "
                f"got {self.crash_share} and {self.announce_jitter}"
            )
        if self.announce_interval_s * (1 + self.announce_jitter) >= self.lease_s:
            raise ValueError(
                f"a lease of {self.lease_s} s ends before its renewal: announce_interval_s with its jitter must be "
                f"less, got {self.announce_interval_s} s and {self.announce_jitter}"
            )


_POSITIVE = {
    "mean_life_s",
    "median_tokens_per_s",
    "median_network_tokens_per_s",
    "announce_interval_s",
    "sample_interval_s",
    "route_interval_s",
    "max_known",
}


def draw_capacity(conditions: Conditions, rng: Random) -> Capacity:
    """A peer of the swarm that ``conditions`` describe; draws three numbers."""
    return Capacity(
        max_blocks=rng.randint(conditions.min_span, conditions.max_span),
        tokens_per_s=conditions.median_tokens_per_s * math.exp(conditions.speed_sigma * rng.gauss(0.0, 1.0)),
        network_tokens_per_s=conditions.median_network_tokens_per_s
        * math.exp(conditions.network_sigma * rng.gauss(0.0, 1.0)),
    )
