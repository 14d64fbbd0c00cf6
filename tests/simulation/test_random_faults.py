"""Two thousand swarms under random faults: tokens and gradients are the local model's, memory returns, deadlines hold.

A failing seed is named first in the failure and reproduces by itself:
``pytest tests/simulation/test_random_faults.py --seed N --seeds 1 -k pairs-0``.
"""

from __future__ import annotations

from collections import Counter

import pytest

from .faults import FAULTS
from .swarms import SWARMS, check, run_seed

NUM_PARTS = 4  # of the seeds of each swarm: 5 x 4 x 100
SEEDS_PER_FAULT = 6

SEEDS_PER_STALL = 25
# Virtual seconds that the longest pass may take when one peer of two fails in this way: 3 s if it is being dialled,
# 2 s if it has work, and the pass itself with all that it has to compute anew.
LONGEST_STALL_S = {"crash": 1.0, "reset": 1.0, "restart at once": 1.0, "power": 3.7, "freeze": 3.7, "cut": 3.7}

# What is counted under another name than the fault's.
COUNTED_AS = {
    "upgrade all": "upgrade",
    "swizzle": "swizzled links",
    "tracker restart": "tracker restart",
}


@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.parametrize("name", SWARMS)
def test_random_faults_change_nothing(name: str, part: int, first_seed: int, num_seeds: int) -> None:
    begun = failovers = 0
    first = first_seed + part * num_seeds
    for seed in range(first, first + num_seeds):
        report = run_seed(name, seed)
        check(name, report)
        begun += len(report.faults)
        failovers += report.num_failovers
    assert begun >= num_seeds
    assert num_seeds < 100 or failovers >= num_seeds // 4, "faults must reach the client"


@pytest.mark.parametrize("kind", FAULTS)
def test_one_kind_of_fault_fires_and_changes_nothing(kind: str) -> None:
    fired: Counter[str] = Counter()
    for number in range(SEEDS_PER_FAULT):
        for name in ("pairs", "single_copies"):
            report = run_seed(name, 5000 + number, [kind])
            check(name, report)
            fired += report.fired
    assert fired[COUNTED_AS.get(kind, kind)] > 0, f"'{kind}' never happened: {fired}"


@pytest.mark.parametrize("kind", LONGEST_STALL_S)
def test_one_fault_stalls_a_replicated_swarm_for_a_moment(kind: str) -> None:
    """Each pass replays or computes at most a few portions of 20 ms, and waits for a fault once."""
    longest_s = 0.0
    for seed in range(6000, 6000 + SEEDS_PER_STALL):
        report = run_seed("pairs", seed, [kind], most=1)
        check("pairs", report)
        longest_s = max(longest_s, report.longest_pass_s)
    assert longest_s <= LONGEST_STALL_S[kind]
    assert longest_s >= 0.2, "no fault met a pass"


def test_seed_decides_the_whole_run() -> None:
    first, second = run_seed("uneven", 11), run_seed("uneven", 11)
    assert first == second
    assert first != run_seed("uneven", 12)
