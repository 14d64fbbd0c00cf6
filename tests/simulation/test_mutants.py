"""The random simulations find mistakes: each is made on purpose, and some seed must break."""

from __future__ import annotations

import pytest

from .mutants import MUTANTS, Mutant
from .swarms import SWARMS, run_seed

MOST_RUNS = 150
LONGEST_STALL_S = 20.0
FIRST_SEED = 1000


def is_found(mutant: Mutant, swarm: str, seed: int) -> bool:
    try:
        report = run_seed(swarm, seed, mutant.kinds, mutant.most)
    except AssertionError as exc:
        return mutant.finds in str(exc)
    if mutant.finds == "stall":
        return report.longest_pass_s > LONGEST_STALL_S
    return any(mutant.finds in violation for violation in report.violations)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_is_found(name: str) -> None:
    mutant = MUTANTS[name]
    names = mutant.swarms or tuple(SWARMS)
    for number in range(MOST_RUNS):
        swarm, seed = names[number % len(names)], FIRST_SEED + number // len(names)
        with pytest.MonkeyPatch.context() as patch:
            mutant.make(patch)
            is_broken = is_found(mutant, swarm, seed)
        if is_broken and not is_found(mutant, swarm, seed):  # what breaks without the mistake, too, says nothing of it
            return
    pytest.fail(f"{MOST_RUNS} runs with the mistake '{name}' broke nothing")
