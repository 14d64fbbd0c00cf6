"""Random swarms for the tests of placement."""

from __future__ import annotations

import math
from random import Random

from remote_modules.plan.throughput import Capacity, Layout

__all__ = ["random_capacity", "small_swarm"]


def random_capacity(rng: Random, most: int, *, has_links: bool = False) -> Capacity:
    network = rng.lognormvariate(5.0, 1.0) if has_links and rng.random() < 0.5 else math.inf
    return Capacity(
        tokens_per_s=rng.lognormvariate(6.0, 1.0), max_blocks=rng.randint(1, most), network_tokens_per_s=network
    )


def small_swarm(seed: int, *, max_servers: int = 8, max_blocks: int = 8) -> tuple[Layout, list[Capacity]]:
    """At most ``max_servers`` servers; with cuts, slow links and twins in some."""
    rng = Random(seed)
    num_blocks = rng.randint(1, max_blocks)
    inner = [cut for cut in range(1, num_blocks) if rng.random() < 0.6]
    layout = Layout.of(num_blocks, {0, num_blocks, *inner} if rng.random() < 0.3 else ())
    capacities = [random_capacity(rng, num_blocks, has_links=True) for _ in range(rng.randint(1, max_servers))]
    if rng.random() < 0.3:
        capacities[-1] = capacities[0]
    return layout, capacities
