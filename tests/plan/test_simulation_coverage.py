"""Coverage that is kept up to date against coverage that is summed anew."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from remote_modules.plan.simulation.coverage import UNIT_TOKENS_PER_S, Coverage
from remote_modules.plan.throughput import Holder, coverage
from remote_modules.spans import Span

NUM_BLOCKS = 12


def random_holder(rng: Random) -> Holder:
    start = rng.randrange(NUM_BLOCKS)
    return Holder(Span(start, rng.randint(start + 1, NUM_BLOCKS)), rng.lognormvariate(7, 1), rng.lognormvariate(6, 1))


@pytest.mark.parametrize("seed", range(5))
def test_changes_in_any_order_give_what_summing_anew_gives(seed: int) -> None:
    rng = Random(seed)
    kept: list[Holder] = []
    changed = Coverage(NUM_BLOCKS)
    for _ in range(300):
        if kept and rng.random() < 0.45:
            changed.remove(kept.pop(rng.randrange(len(kept))))
        else:
            kept.append(random_holder(rng))
            changed.add(kept[-1])
    rng.shuffle(kept)
    assert changed == Coverage(NUM_BLOCKS, kept)
    exact = coverage(NUM_BLOCKS, kept)
    assert changed.tokens_per_s == pytest.approx(exact, abs=len(kept) * UNIT_TOKENS_PER_S)
    assert changed.minimum() == changed.tokens_per_s.min()


def test_all_removed_is_exactly_empty() -> None:
    rng = Random(0)
    holders = [random_holder(rng) for _ in range(100)]
    changed = Coverage(NUM_BLOCKS, holders)
    for holder in holders:
        changed.remove(holder)
    assert changed == Coverage(NUM_BLOCKS)
    assert changed.minimum() == 0.0
    assert changed.num_missing() == NUM_BLOCKS


def test_missing_blocks_are_those_without_a_holder() -> None:
    changed = Coverage(4, [Holder(Span(0, 2), 8.0), Holder(Span(1, 3), 3.0, 1.0)])
    assert changed.num_holders.tolist() == [1, 2, 1, 0]
    assert changed.tokens_per_s.tolist() == [4.0, 5.0, 1.0, 0.0]
    assert changed.tokens_per_s.dtype == np.float64
    assert changed.num_missing() == 1


def test_coverages_differ_by_holders_alone_and_from_other_things() -> None:
    slow = Holder(Span(0, 1), UNIT_TOKENS_PER_S / 4)
    assert Coverage(2, [slow]) != Coverage(2)
    assert Coverage(2) != "coverage"
