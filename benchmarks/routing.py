"""How long a client takes to find a route, on made-up swarms of many peers.

    python benchmarks/routing.py [--quick] [--peers 1000] [--blocks 80]

Peers of unequal spans, speeds, round trips and loads; everything is timed as a client does it for one pass, with what
it knows of each peer at hand. Prints one line of JSON for each kind of decision: median and 99th percentile of all
rounds, in milliseconds. A figure is of one core, and of pure decisions: no network is touched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from random import Random

from remote_modules.peers import PeerId
from remote_modules.plan.moves import find_better
from remote_modules.plan.routing import Candidate, Demand, find_route
from remote_modules.plan.spread import spread
from remote_modules.spans import Span


def made_up(num_peers: int, num_blocks: int, rng: Random) -> list[Candidate]:
    """Peers of spans between a twentieth and a third of the model, those at its ends among them."""
    candidates = []
    for number in range(num_peers):
        length = rng.randint(max(1, num_blocks // 20), max(1, num_blocks // 3))
        start = rng.randint(-length // 2, num_blocks - length // 2)
        span = Span(min(max(0, start), num_blocks - 1), min(num_blocks, max(0, start) + length))
        candidates.append(
            Candidate(
                peer_id=PeerId(f"{rng.getrandbits(64):016x}{number:06}"),
                span=span,
                rtt_s=rng.uniform(0.005, 0.25),
                decode_tokens_per_s=rng.uniform(50.0, 3000.0),
                prefill_tokens_per_s=rng.uniform(500.0, 30_000.0),
                free_kv_tokens=rng.choice([0, 4096, 65_536]),
                load=rng.choice([0, 0, 1, 4]),
                group="bfloat16/none",
                bandwidth_bytes_per_s=rng.choice([None, 1e6, 1e8]),
            )
        )
    return candidates


def main() -> None:
    parser = argparse.ArgumentParser(description="time to find a route")
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args()
    rng = Random(0)
    blocks = Span(0, options.blocks)
    candidates = made_up(options.peers, options.blocks, rng)
    cuts = frozenset(range(0, options.blocks + 1, 2)) | {options.blocks}
    decode = Demand(num_tokens=1, kv_tokens=2048, bytes_per_token=16_384, is_decode=True)
    bulk = Demand(num_tokens=512, kv_tokens=0, bytes_per_token=16_384, is_decode=False, rows=4)
    route = find_route(blocks, candidates, decode, rng=rng)
    decisions: dict[str, Callable[[], object]] = {
        "route": lambda: find_route(blocks, candidates, decode, rng=rng),
        "route with cuts": lambda: find_route(blocks, candidates, decode, rng=rng, cuts=cuts),
        "better route in mid-session": lambda: find_better(route, candidates, decode, 1000, rng=rng),
        "share of one pass": lambda: spread(blocks, candidates, bulk, rng=rng),
        "shares of 16 microbatches": lambda: spread(blocks, candidates, bulk, rng=rng, count=16),
    }
    for name, decide in decisions.items():
        times_ms = []
        for _ in range(20 if options.quick else options.rounds):
            began_s = time.perf_counter()
            decide()
            times_ms.append(1e3 * (time.perf_counter() - began_s))
        print(
            json.dumps(
                {
                    "decision": name,
                    "peers": options.peers,
                    "blocks": options.blocks,
                    "median_ms": round(statistics.median(times_ms), 3),
                    "p99_ms": round(statistics.quantiles(times_ms, n=100)[98], 3),
                    "rounds": len(times_ms),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
