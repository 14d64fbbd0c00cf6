"""Simulated swarms of 10^2 to 10^5 peers under churn: throughput against the bound, moves, gaps, tracker load.

    python benchmarks/swarm_simulation.py [--quick] [--write] [--only churn gaps scale routing]

Prints JSON on stdout and the same as Markdown tables on stderr. With --write the tables replace those of
docs/simulation.md and the plots go to docs/plots/ (needs the extra `plots`). Virtual time, fixed seeds: all but the
columns of wall time and memory are the same on every machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from remote_modules.peers import PeerId
from remote_modules.plan.routing import Candidate, Demand, find_route
from remote_modules.plan.simulation import (
    BalanceAlways,
    BalanceAtJoin,
    Conditions,
    RandomSpans,
    Report,
    Strategy,
    SwarmSimulation,
)
from remote_modules.plan.simulation.conditions import draw_capacity
from remote_modules.plan.throughput import Layout
from remote_modules.spans import Span

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "simulation.md"
PLOTS = ROOT / "docs" / "plots"

HOUR_S = 3600.0
GAINS = (0.01, 0.20)
STRATEGIES: dict[str, tuple[Callable[[], Strategy], float]] = {
    "1 random spans": (RandomSpans, 0.01),
    "2 balance at join": (BalanceAtJoin, 0.01),
    "3 full, gain 1 %": (BalanceAlways, 0.01),
    "3 full, gain 20 %": (BalanceAlways, 0.20),
}
LABEL_FULL = "3 full, gain 1 %"


def simulate(conditions: Conditions, strategy: str, seed: int, hours: float) -> tuple[Report, SwarmSimulation]:
    make, min_gain = STRATEGIES[strategy]
    conditions = dataclasses.replace(conditions, min_gain=min_gain)
    swarm = SwarmSimulation(conditions, make(), world=Random(seed), decisions=Random(1000 + seed))
    return swarm.run(HOUR_S * hours), swarm


def measure_churn(sizes: Sequence[int], seeds: range, hours: float, life_hours: float) -> list[dict[str, Any]]:
    """Every strategy on the same peers; means over the seeds."""
    rows = []
    for num_peers in sizes:
        conditions = Conditions(num_peers=num_peers, mean_life_s=HOUR_S * life_hours)
        for strategy in STRATEGIES:
            reports = [simulate(conditions, strategy, seed, hours)[0] for seed in seeds]
            durations = [duration for report in reports for duration in report.gap_durations_s]
            worst = [share for report in reports for share in (sample.share for sample in report.samples)]
            rows.append(
                {
                    "peers": num_peers,
                    "life_h": life_hours,
                    "strategy": strategy,
                    "share": statistics.fmean(report.mean_share for report in reports),
                    "share_worst_seed": min(report.mean_share for report in reports),
                    "share_p5": sorted(worst)[len(worst) // 20],
                    "moves_per_h": statistics.fmean(report.per_hour(report.num_moves) for report in reports),
                    "moves_per_peer_day": statistics.fmean(
                        24 * report.per_hour(report.num_moves) / num_peers for report in reports
                    ),
                    "gap_s_per_h": statistics.fmean(report.per_hour(report.gap_s) for report in reports),
                    "gaps": len(durations),
                    "gaps_by_moves": sum(gap.is_move for report in reports for gap in report.gaps),
                    "routes_stale": sum(report.route_stale for report in reports),
                    "routes": sum(report.route_ok + report.route_stale + report.route_none for report in reports),
                }
            )
    return rows


def measure_gaps(num_runs: int) -> list[dict[str, Any]]:
    """The only holder of some blocks is killed: time until every block is served again, by strategy.

    14 peers that stay, no spare copies of the blocks that are lost.
    """
    conditions = Conditions(num_peers=14, mean_life_s=1e12, route_interval_s=HOUR_S)
    rows = []
    for strategy in ("2 balance at join", LABEL_FULL):
        times_s, never = [], 0
        for seed in range(num_runs):
            _, swarm = simulate(conditions, strategy, seed, 0.0)
            holders = swarm.serving.num_holders
            victims = [
                peer for peer in swarm.peers.values() if (holders[peer.span.start : peer.span.end] == 1).any()
            ]
            if not victims or swarm.serving.num_missing():
                continue
            swarm.crash(victims[0])
            began_s = swarm.events.now_s
            while swarm.serving.num_missing() and swarm.events.now_s < began_s + HOUR_S:
                swarm.events.run_until(swarm.events.now_s + 1.0)
            if swarm.serving.num_missing():
                never += 1
            else:
                times_s.append(swarm.events.now_s - began_s)
        rows.append(
            {
                "strategy": strategy,
                "runs": len(times_s) + never,
                "never_within_1h": never,
                "median_s": statistics.median(times_s) if times_s else None,
                "worst_s": max(times_s, default=None),
            }
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Scale:
    """A run for size: conditions that differ from the default, and how long."""

    num_peers: int
    hours: float
    warm_up_s: float
    check_interval_s: float


def measure_scale(scale: Scale) -> dict[str, Any]:
    """One run in this process, whose memory it tells."""
    conditions = Conditions(
        num_peers=scale.num_peers,
        warm_up_s=scale.warm_up_s,
        ramp_s=scale.warm_up_s / 2,
        check_interval_s=scale.check_interval_s,
    )
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.perf_counter()
    report, swarm = simulate(conditions, LABEL_FULL, 1, scale.hours)
    wall_s = time.perf_counter() - began_s
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_peers = scale.num_peers
    return {
        "peers": num_peers,
        "virtual_h": scale.hours + scale.warm_up_s / HOUR_S,
        "check_interval_s": scale.check_interval_s,
        "share": report.mean_share,
        "moves_per_h": report.per_hour(report.num_moves),
        "joins_per_s": report.per_s(report.num_joins),
        "announces_per_s": report.per_s(report.num_announces),
        "record_bytes_per_s": report.per_s(report.record_bytes),
        "lookups_per_s": report.per_s(report.num_lookups),
        "lookup_bytes_per_s": report.per_s(report.lookup_bytes),
        "largest_lookup_bytes": report.largest_lookup_bytes,
        "events": swarm.events.num_handled,
        "wall_s": wall_s,
        "peak_mb": (peak_kib - before_kib) / 1024,
        "bytes_per_peer": (peak_kib - before_kib) * 1024 / num_peers,
    }


def measure_scales(scales: Sequence[Scale]) -> list[dict[str, Any]]:
    """Each in a process of its own."""
    rows = []
    for scale in scales:
        command = [sys.executable, __file__, "--scale", json.dumps(dataclasses.asdict(scale))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
    return rows


def measure_routing(num_peers: int, num_blocks: int, repeats: int) -> dict[str, Any]:
    """`find_route` of one decode step through a swarm of random peers."""
    rng = Random(1)
    conditions = Conditions(num_blocks=num_blocks, num_peers=num_peers)
    candidates = []
    for number in range(num_peers):
        capacity = draw_capacity(conditions, rng)
        span = RandomSpans().choose_of(Layout(num_blocks), capacity, rng)
        candidates.append(
            Candidate(
                peer_id=PeerId(str(number).zfill(52)),
                span=span,
                rtt_s=0.01 + 0.19 * rng.random(),
                decode_tokens_per_s=capacity.tokens_per_s,
                prefill_tokens_per_s=10 * capacity.tokens_per_s,
                free_kv_tokens=100_000,
                load=rng.randint(0, 3),
            )
        )
    demand = Demand(num_tokens=1, kv_tokens=2048, bytes_per_token=16384, is_decode=True)
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        find_route(Span(0, num_blocks), candidates, demand, rng=rng)
        times_s.append(time.perf_counter() - began_s)
    times_s.sort()
    return {
        "peers": num_peers,
        "blocks": num_blocks,
        "repeats": repeats,
        "median_ms": 1000 * statistics.median(times_s),
        "best_ms": 1000 * times_s[0],
        "p95_ms": 1000 * times_s[int(0.95 * len(times_s))],
    }
