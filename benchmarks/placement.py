"""How good placements are: against the optimum in small swarms, against a bound in large ones, and how fast.

    python benchmarks/placement.py [--quick] [--part small|large|time]

Three parts, one line of JSON for each row, and markdown rows of the same on stderr::

    small   random swarms of at most 8 servers and 10 blocks, with cuts, slow links and twins in some: the solver's
            bottleneck over the best that any spans give, found by trying all of them
    large   70 blocks, 20 to 100 servers of lognormal speed (sigma 1) that hold 3 to 30 blocks each: the solver's
            bottleneck, and that of servers which join one after the other, over the relaxation bound
    time    32 servers, 80 blocks: CPU seconds for one plan with `QUICK` kicks, and what that plan is worth

A ratio is of tokens per second at the weakest block. The bound is one that no placement reaches in general.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from random import Random

from remote_modules.plan.exhaustive import better_spans
from remote_modules.plan.placement import choose_span
from remote_modules.plan.solver import QUICK, THOROUGH, assign_spans, bottleneck_bound, bottleneck_of
from remote_modules.plan.throughput import Capacity, Holder, Layout, coverage

Row = dict[str, object]


def small_swarm(seed: int) -> tuple[Layout, list[Capacity]]:
    rng = Random(seed)
    num_servers = rng.randint(1, 8)
    num_blocks = rng.randint(1, 10 if num_servers < 7 else 8)
    inner = [cut for cut in range(1, num_blocks) if rng.random() < 0.6]
    layout = Layout.of(num_blocks, {0, num_blocks, *inner} if rng.random() < 0.3 else ())
    capacities = [
        Capacity(
            tokens_per_s=rng.lognormvariate(6.0, 1.0),
            max_blocks=rng.randint(1, num_blocks),
            network_tokens_per_s=rng.lognormvariate(5.0, 1.0) if rng.random() < 0.3 else float("inf"),
        )
        for _ in range(num_servers)
    ]
    if rng.random() < 0.2:
        capacities[-1] = capacities[0]
    return layout, capacities


def large_swarm(seed: int, num_servers: int, num_blocks: int) -> tuple[Layout, list[Capacity]]:
    rng = Random(seed)
    capacities = [
        Capacity(tokens_per_s=rng.lognormvariate(6.0, 1.0), max_blocks=rng.randint(3, 30)) for _ in range(num_servers)
    ]
    return Layout(num_blocks), capacities


def small(num_cases: int) -> Iterator[Row]:
    ratios: list[float] = []
    num_impossible = seed = 0
    while len(ratios) < num_cases:
        layout, capacities = small_swarm(seed)
        seed += 1
        found = bottleneck_of(layout, capacities, assign_spans(layout, capacities, rng=Random(0)))
        better, is_complete = better_spans(layout, capacities, than=found)
        assert is_complete
        best = found if better is None else bottleneck_of(layout, capacities, better)
        if best == 0.0:
            num_impossible += 1
            continue
        ratios.append(found / best)
    yield {
        "part": "small",
        "cases": len(ratios),
        "cases_that_nobody_can_cover": num_impossible,
        "least_ratio": round(min(ratios), 4),
        "mean_ratio": round(statistics.fmean(ratios), 5),
        "share_exact": round(sum(ratio > 1 - 1e-8 for ratio in ratios) / len(ratios), 4),
        "bar": 0.95,
    }


def large(num_cases: int) -> Iterator[Row]:
    for num_servers in (20, 30, 50, 70, 100):
        ratios, joined = [], []
        for seed in range(num_cases):
            layout, capacities = large_swarm(seed, num_servers, 70)
            bound = bottleneck_bound(layout, capacities)
            ratios.append(bottleneck_of(layout, capacities, assign_spans(layout, capacities, rng=Random(0))) / bound)
            holders: list[Holder] = []
            for capacity in capacities:
                holders.append(Holder(choose_span(layout, capacity, holders), capacity.tokens_per_s))
            joined.append(min(coverage(70, holders)) / bound)
        yield {
            "part": "large",
            "servers": num_servers,
            "blocks": 70,
            "kicks": THOROUGH,
            "cases": num_cases,
            "least_ratio": round(min(ratios), 4),
            "mean_ratio": round(statistics.fmean(ratios), 4),
            "mean_ratio_of_joining_alone": round(statistics.fmean(joined), 4),
            "bar": 0.95,
        }


def planning_time(num_cases: int) -> Iterator[Row]:
    times, ratios = [], []
    for seed in range(num_cases):
        layout, capacities = large_swarm(seed, 32, 80)
        began_s = time.process_time()
        spans = assign_spans(layout, capacities, rng=Random(0), num_kicks=QUICK)
        times.append(time.process_time() - began_s)
        ratios.append(bottleneck_of(layout, capacities, spans) / bottleneck_bound(layout, capacities))
    yield {
        "part": "time",
        "servers": 32,
        "blocks": 80,
        "kicks": QUICK,
        "cases": num_cases,
        "median_s": round(statistics.median(times), 4),
        "longest_s": round(max(times), 4),
        "least_ratio": round(min(ratios), 4),
        "mean_ratio": round(statistics.fmean(ratios), 4),
        "bar_s": 0.02,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="placements against the optimum and the bound")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--part", choices=("small", "large", "time"), action="append", help="only this part")
    options = parser.parse_args()
    parts = {
        "small": lambda: small(60 if options.quick else 600),
        "large": lambda: large(3 if options.quick else 30),
        "time": lambda: planning_time(5 if options.quick else 50),
    }
    for name in options.part or parts:
        for row in parts[name]():
            print(json.dumps(row), flush=True)
            print("| " + " | ".join(f"{key} {value}" for key, value in row.items()) + " |", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
