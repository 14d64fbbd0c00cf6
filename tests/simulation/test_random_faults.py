"""Hundreds of swarms under random faults: tokens and gradients are the local model's, memory returns, deadlines hold.

``REMOTE_MODULES_SIMULATION_SEED`` moves the first seed; a failing seed is named in the failure and reproduces by
itself: ``pytest tests/simulation/test_random_faults.py --seed N``.
"""

from __future__ import annotations

import pytest

from remote_modules.testing.virtual_time import run_virtual

from .scenario import Report, random_run
from .tiny import tiny_model

SWARMS = {
    "pairs": ("0:2", "0:2", "2:4", "2:4"),
    "uneven": ("0:1", "0:3", "1:4", "2:4", "3:4"),
    "one_holds_all": ("0:4", "0:2", "2:4"),
    "single_copies": ("0:2", "2:4"),
    "triples": ("0:1", "0:1", "1:3", "1:3", "3:4", "3:4"),
}
SEEDS_PER_SWARM = 110
ALL_SPANS = tuple(sorted({span for spans in SWARMS.values() for span in spans}))


def run(name: str, seed: int) -> Report:
    return run_virtual(random_run(tiny_model(4, ALL_SPANS), SWARMS[name], seed))


@pytest.mark.parametrize("name", SWARMS)
def test_random_faults_change_nothing(name: str, first_seed: int) -> None:
    reports = [run(name, seed) for seed in range(first_seed, first_seed + SEEDS_PER_SWARM)]
    broken = [(report.seed, report.violations, report.faults) for report in reports if report.violations]
    assert not broken, f"{len(broken)} of {len(reports)} seeds of '{name}' broke, first: {broken[0]}"
    assert sum(len(report.faults) for report in reports) >= SEEDS_PER_SWARM
    assert sum(report.num_failovers for report in reports) >= SEEDS_PER_SWARM // 4, "faults must reach the client"


def test_seed_decides_the_whole_run() -> None:
    first, second = run("uneven", 11), run("uneven", 11)
    assert first == second
    assert first != run("uneven", 12)
