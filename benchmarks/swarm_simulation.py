"""Simulated swarms of 10^2 to 10^5 peers under churn: throughput against the bound, moves, gaps, tracker load.

    python benchmarks/swarm_simulation.py [--quick] [--write] [--only churn gaps scale routing] [--seeds N]

Prints JSON on stdout and the same as Markdown tables on stderr. With --write the tables replace those of
docs/simulation.md and the plots go to docs/plots/ (needs the extra `plots`). Virtual time, fixed seeds: all but the
columns of wall time, CPU time and memory are the same on every machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from remote_modules.peers import PeerId
from remote_modules.plan.election import Rule
from remote_modules.plan.routing import Candidate, Demand, find_route
from remote_modules.plan.simulation import (
    BalanceAlways,
    BalanceAtJoin,
    Conditions,
    RandomSpans,
    Report,
    Sample,
    Strategy,
    SwarmSimulation,
)
from remote_modules.plan.simulation.conditions import draw_capacity
from remote_modules.spans import Span

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "simulation.md"
PLOTS = ROOT / "docs" / "plots"

HOUR_S = 3600.0
ALL_STRATEGIES = (
    "1 random spans",
    "2 balance at join",
    "3 full",
    "3 full, gain 1 %",
    "3 full, gain 20 %",
    "3 full, stops to fetch",
    "3 full, long leases",
    "3 full, one mover",
    "3 full, slow",
)
AT_JOIN, FULL = ALL_STRATEGIES[1:3]
LONG_LEASES, ONE_MOVER, SLOW = ALL_STRATEGIES[-3:]
RULES = {
    "3 full, gain 1 %": Rule(min_gain=0.01),
    "3 full, gain 20 %": Rule(min_gain=0.2),
    ONE_MOVER: Rule(servers_per_mover=1_000_000),
    SLOW: Rule(check_interval_s=60.0, turn_s=120.0),
}
COMPARED = (AT_JOIN, FULL, LONG_LEASES, SLOW)
SECTIONS = ("churn", "gaps", "scale", "routing")


def make_strategy(name: str, seed: int) -> Strategy:
    if name == ALL_STRATEGIES[0]:
        return RandomSpans()
    if name == AT_JOIN:
        return BalanceAtJoin()
    return BalanceAlways(RULES.get(name, Rule()), Random(2000 + seed))


def simulate(conditions: Conditions, strategy: str, seed: int, hours: float) -> tuple[Report, SwarmSimulation]:
    conditions = dataclasses.replace(conditions, fetches_ahead=strategy != "3 full, stops to fetch")
    if strategy == LONG_LEASES:
        conditions = dataclasses.replace(conditions, lease_s=90.0, announce_interval_s=30.0)
    swarm = SwarmSimulation(
        conditions, make_strategy(strategy, seed), world=Random(seed), decisions=Random(1000 + seed)
    )
    return swarm.run(HOUR_S * hours), swarm


@dataclasses.dataclass(frozen=True)
class Churn:
    """Swarms that every strategy meets: how many peers, how long they stay, how long they are watched."""

    num_peers: int
    life_hours: float
    strategies: tuple[str, ...]
    hours: float


def measure_churn(churn: Churn, num_seeds: int) -> tuple[list[dict[str, Any]], dict[str, list[Sample]]]:
    """A row for each strategy, of means over the seeds; and the samples of the first seed, by strategy."""
    conditions = Conditions(num_peers=churn.num_peers, mean_life_s=HOUR_S * churn.life_hours)
    rows, samples = [], {}
    for strategy in churn.strategies:
        print(f"churn: {churn.num_peers} peers, {strategy}", file=sys.stderr)
        reports = [simulate(conditions, strategy, seed, churn.hours)[0] for seed in range(num_seeds)]
        samples[strategy] = reports[0].samples
        shares = sorted(sample.share for report in reports for sample in report.samples)
        planned = [sample.announced / sample.bound for report in reports for sample in report.samples if sample.bound]
        routes = sum(report.route_ok + report.route_stale + report.route_none for report in reports)
        rows.append(
            {
                "peers": churn.num_peers,
                "mean life h": churn.life_hours,
                "strategy": strategy,
                "share of bound": statistics.fmean(report.mean_share for report in reports),
                "worst seed": min(report.mean_share for report in reports),
                "worst 5 %": shares[len(shares) // 20],
                "announced": statistics.fmean(planned),
                "moves/h": statistics.fmean(report.per_hour(report.num_moves) for report in reports),
                "no coverage s/h": statistics.fmean(report.per_hour(report.gap_s) for report in reports),
                "gaps": sum(len(report.gaps) for report in reports),
                "by moves": sum(gap.is_move for report in reports for gap in report.gaps),
                "stale routes %": 100 * sum(report.route_stale for report in reports) / routes,
            }
        )
    return rows, samples


def measure_gaps(num_runs: int) -> list[dict[str, Any]]:
    """The only holder of some block is killed in a swarm of 14 that is still otherwise: time until all is served again.

    Swarms without such a holder are passed over.
    """
    conditions = Conditions(num_peers=14, mean_life_s=1e12, route_interval_s=HOUR_S)
    rows = []
    for strategy in (AT_JOIN, FULL, SLOW):
        print(f"gaps: {strategy}", file=sys.stderr)
        times_s, num_never = [], 0
        for seed in range(num_runs):
            _, swarm = simulate(conditions, strategy, seed, 0.0)
            recovered_s = recovery_s(swarm)
            if recovered_s is None:
                continue
            num_never += recovered_s == math.inf
            times_s.append(recovered_s)
        rows.append(
            {
                "strategy": strategy,
                "kills": len(times_s),
                "never within 1 h": num_never,
                "median s": finite(statistics.median(times_s)),
                "worst s": finite(max(times_s)),
            }
        )
    return rows


def finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def recovery_s(swarm: SwarmSimulation) -> float | None:
    """Seconds from the crash of a sole holder to full coverage, infinite beyond an hour; None without such a holder."""
    holders = swarm.serving.num_holders
    victims = [peer for peer in swarm.peers.values() if (holders[peer.span.start : peer.span.end] == 1).any()]
    if not victims or swarm.serving.num_missing():
        return None
    began_s = swarm.events.now_s
    swarm.crash(victims[0])
    while swarm.serving.num_missing():
        if swarm.events.now_s >= began_s + HOUR_S:
            return math.inf
        swarm.events.run_until(swarm.events.now_s + 1.0)
    return swarm.events.now_s - began_s


@dataclasses.dataclass(frozen=True)
class Scale:
    """A run for size: how many peers, how long, the intervals of announcing, and how old a view may be."""

    num_peers: int
    hours: float
    warm_up_s: float
    announce_interval_s: float
    view_age_s: float


def measure_scale(scale: Scale) -> dict[str, Any]:
    """One run in this process, whose memory it tells."""
    conditions = Conditions(
        num_peers=scale.num_peers,
        warm_up_s=scale.warm_up_s,
        ramp_s=scale.warm_up_s / 2,
        announce_interval_s=scale.announce_interval_s,
        lease_s=3 * scale.announce_interval_s,
        view_age_s=scale.view_age_s,
    )
    before_kib = peak_kib()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    report, swarm = simulate(conditions, FULL, 1, scale.hours)
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    grown_kib = peak_kib() - before_kib
    return {
        "peers": scale.num_peers,
        "view s": scale.view_age_s,
        "announce s": scale.announce_interval_s,
        "virtual min": 60 * scale.hours + scale.warm_up_s / 60,
        "share of bound": report.mean_share,
        "moves/h": report.per_hour(report.num_moves),
        "joins/s": report.per_s(report.num_joins),
        "announces/s": report.per_s(report.num_announces),
        "record KB/s": report.per_s(report.record_bytes) / 1e3,
        "lookups/s": report.per_s(report.num_lookups),
        "one lookup MB": report.largest_lookup_bytes / 1e6,
        "lookup MB/s": report.per_s(report.lookup_bytes) / 1e6,
        "events": swarm.events.num_handled,
        "wall s": wall_s,
        "cpu s": cpu_s,
        "peak MB": grown_kib / 1024,
        "KB/peer": grown_kib / scale.num_peers,
    }


def peak_kib() -> int:
    """Largest resident memory of this process so far; what `getrusage` says may be that of the one that started it."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


def measure_scales(scales: Sequence[Scale]) -> list[dict[str, Any]]:
    """Each in a process of its own."""
    rows = []
    for scale in scales:
        print(f"scale: {scale.num_peers} peers", file=sys.stderr)
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
        start = rng.randint(0, num_blocks - capacity.max_blocks)
        candidates.append(
            Candidate(
                peer_id=PeerId(str(number).zfill(52)),
                span=Span(start, start + capacity.max_blocks),
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
        "best ms": 1000 * times_s[0],
        "median ms": 1000 * statistics.median(times_s),
        "p95 ms": 1000 * times_s[int(0.95 * len(times_s))],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [[show(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def write_document(tables: dict[str, str]) -> None:
    """Replace what is between the marks of each table."""
    text = DOCUMENT.read_text("utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    DOCUMENT.write_text(text, "utf-8")


def plans(*, is_quick: bool) -> tuple[list[Churn], int, list[Scale], int]:
    if is_quick:
        return [Churn(20, 2.0, ALL_STRATEGIES, 0.5)], 8, [Scale(100, 0.1, 300.0, 30.0, 0.0)], 5
    churns = [
        Churn(20, 2.0, COMPARED, 2.0),
        Churn(50, 2.0, COMPARED, 1.0),
        Churn(100, 2.0, ALL_STRATEGIES, 1.0),
        Churn(100, 8.0, COMPARED, 1.0),
    ]
    scales = [
        Scale(100, 0.5, 1800.0, 30.0, 0.0),
        Scale(1_000, 0.25, 900.0, 30.0, 60.0),
        Scale(10_000, 0.25, 600.0, 30.0, 60.0),
        Scale(100_000, 0.2, 600.0, 120.0, 300.0),
    ]
    return churns, 20, scales, 50


def measure(
    only: Sequence[str], *, num_seeds: int, is_quick: bool
) -> tuple[dict[str, Any], list[dict[str, list[Sample]]]]:
    churns, num_kills, scales, num_routes = plans(is_quick=is_quick)
    results: dict[str, Any] = {}
    curves = []
    if "churn" in only:
        results["churn"] = []
        for churn in churns:
            rows, samples = measure_churn(churn, num_seeds)
            results["churn"] += rows
            curves.append(samples)
    if "gaps" in only:
        results["gaps"] = measure_gaps(num_kills)
    if "scale" in only:
        results["scale"] = measure_scales(scales)
    if "routing" in only:
        results["routing"] = [measure_routing(1000, 80, num_routes)]
    return results, curves


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small swarms and short times: seconds, not an hour")
    parser.add_argument("--write", action="store_true", help="write docs/simulation.md and docs/plots")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts to measure")
    parser.add_argument("--seeds", type=int, default=2, help="swarms of each kind under churn")
    parser.add_argument("--scale", help=argparse.SUPPRESS)  # one run for size, as JSON
    options = parser.parse_args(None if arguments is None else [*arguments])
    if options.scale:
        print(json.dumps(measure_scale(Scale(**json.loads(options.scale)))))
        return
    results, curves = measure(options.only, num_seeds=options.seeds, is_quick=options.quick)
    tables = {name: markdown(rows) for name, rows in results.items()}
    for name, table in tables.items():
        print(f"\n{name}\n\n{table}", file=sys.stderr)
    print(json.dumps(results))
    if options.write:
        from _swarm_plots import plot_all  # matplotlib is an extra

        write_document(tables)
        plot_all(PLOTS, results, curves)


if __name__ == "__main__":
    main()
