"""`benchmarks/failures.py` on a tiny stack: every arm runs, failures fall, and the arithmetic is right."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def failures() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("failures")


@pytest.fixture(scope="module")
def length(failures: Any) -> Any:
    """12 tokens through 2 stages, where one send of eight fails."""
    setup = failures.Setup(
        lengths={12: 1}, ps=(0.0, 0.125), attempts=2, samples=2, hidden_size=64, stages=(1, 1), mode="thread"
    )
    return failures.run(setup)[12]


def test_every_arm_is_measured_and_failures_fall(length: Any) -> None:
    assert length.ours[0.0].losses == []
    assert length.ours[0.125].losses
    assert len(length.ours[0.125].excess_s) == len({loss.token for loss in length.ours[0.125].losses})
    for arm in ("ours", "no cache", "restart"):
        assert length.normalized(arm, 0.125) > 0
    assert length.profile()["failures"] == len(length.ours[0.125].losses)
    assert length.profile()["replayed_tokens"] > 0
    assert length.restart[0.125].sends > 0


def test_restart_by_the_formula_is_the_paper_s(failures: Any) -> None:
    length = failures.Length(None, failures.Setup(lengths={}), 1024)
    assert 15.5 / length.slowdown(1e-3) == pytest.approx(0.476, abs=0.003)
    assert 15.5 / length.slowdown(1e-4) == pytest.approx(11.9, abs=0.05)
    assert length.is_hopeless(1e-2)
    length.plain = [[1.0] * 1024]
    assert length.slowdown_by_steps(1e-3) == pytest.approx(length.slowdown(1e-3), rel=0.005)


def test_no_cache_is_integrated_over_the_sequence(failures: Any) -> None:
    length = failures.Length(None, failures.Setup(lengths={}), 9)
    length.uncached = {1: (1.0, 0.5), 5: (5.0, 0.5), 9: (9.0, 0.5)}
    assert length.uncached_s(0.0) == sum(range(1, 10))
    assert length.uncached_s(0.1) == pytest.approx(sum(range(1, 10)) + 9 * 5 * 0.1 * 0.5)


def test_draws_are_the_same_for_every_arm_and_fall_as_often_as_asked(failures: Any) -> None:
    arms = load_benchmark("_failure_arms")

    def draws(seed: int) -> list[bool]:
        injector = arms.Injector(2)
        injector.begin(0.1, seed)
        found = []
        for injector.token in range(1000):
            found += [injector._fails(stage, is_reply=False) for stage in range(4)]
        return found

    assert draws(1) == draws(1) != draws(2)
    assert 320 < sum(draws(1)) < 480
