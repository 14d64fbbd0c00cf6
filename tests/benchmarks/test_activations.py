"""`benchmarks/activations.py` on few tokens: graphs are kept, used and gone, and gradients are equal."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def activations() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("activations")


def test_rounds_keep_use_and_free_graphs(activations: Any) -> None:
    outcome = activations.measure(activations.Load(rows=1, num_tokens=8, token_s=1e-4), 1.0, 2)
    assert (outcome.num_equal, outcome.kept_backwards, outcome.recomputed_backwards) == (3, 6, 6)
    assert outcome.held_bytes > 0
    assert outcome.left_bytes == 0
    assert len(outcome.kept_s) == len(outcome.recomputed_s) == 2
    assert outcome.ratio > 0
