"""The random simulations find mistakes: each is made on purpose, and some seed must break."""

from __future__ import annotations

import pytest

from .mutants import MUTANTS
from .swarms import SWARMS, run_seed

MOST_RUNS = 150
LONGEST_STALL_S = 20.0
FIRST_SEED = 1000


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    mutant.make(monkeypatch)
    names = list(SWARMS)
    for number in range(MOST_RUNS):
        swarm, seed = names[number % len(names)], FIRST_SEED + number // len(names)
        try:
            report = run_seed(swarm, seed, mutant.kinds)
            found = report.violations
            if report.longest_pass_s > LONGEST_STALL_S:
                found = [*found, "stall"]
        except AssertionError as exc:
            found = [str(exc)]
        if any(mutant.finds in violation for violation in found):
            return
    pytest.fail(f"{MOST_RUNS} runs with the mistake '{name}' broke nothing")
