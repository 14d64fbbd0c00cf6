"""Run many seeds and say what happened, as JSON: ``python -m tests.simulation.report --seeds 2000``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter

import torch

from .swarms import SWARMS, run_seed, swarm_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1000, help="the first")
    parser.add_argument("--seeds", type=int, default=2000, help="over all swarms together")
    parser.add_argument("--quick", action="store_true", help="100 seeds")
    parser.add_argument("--most", type=int, default=5, help="faults of one run")
    parser.add_argument("--swarm", choices=sorted(SWARMS), action="append", help="only this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    swarm_model()
    names = options.swarm or list(SWARMS)
    fired: Counter[str] = Counter()
    broken: list[dict[str, object]] = []
    count = failovers = steps = 0
    began_s = time.process_time()
    for number in range((100 if options.quick else options.seeds) // len(names)):
        for name in names:
            seed = options.seed + number
            count += 1
            try:
                report = run_seed(name, seed, most=options.most)
            except AssertionError as exc:
                broken.append({"swarm": name, "seed": seed, "error": str(exc)})
                print(broken[-1], file=sys.stderr, flush=True)  # noqa: T201
                continue
            fired += report.fired
            failovers += report.num_failovers
            steps += report.num_steps
            if report.violations:
                broken.append({"swarm": name, "seed": seed, "violations": report.violations, "faults": report.faults})
                print(broken[-1], file=sys.stderr, flush=True)  # noqa: T201
    cpu_s = time.process_time() - began_s
    result = {
        "seeds": count,
        "violations": len(broken),
        "cpu_s": round(cpu_s, 1),
        "cpu_s_per_run": round(cpu_s / max(count, 1), 4),
        "steps": steps,
        "failovers": failovers,
        "fired": dict(sorted(fired.items())),
        "broken": broken,
    }
    json.dump(result, sys.stdout, indent=2)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
