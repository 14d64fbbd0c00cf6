"""`benchmarks/training_device.py` on tiny blocks and a CPU: every backward uses a graph, and gradients are equal."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def bench() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("training_device")


def test_quick_run_trains_through_a_peer_process(bench: Any) -> None:
    options = bench.options_of(["--quick", "--device", "cpu"])
    outcome = bench.run(options)
    assert outcome.largest_difference == 0.0
    assert (outcome.kept_backwards, outcome.recomputed_backwards) == (2 * options.microbatches, 0)
    assert len(outcome.local) == len(outcome.remote) == len(outcome.matrix) == 1


def test_operations_of_a_token_are_those_of_its_products(bench: Any) -> None:
    config = bench.config_of("70b", 10, 2048)
    assert bench.flops_of_token(config, 0) == 10 * 4 * 855_638_016
