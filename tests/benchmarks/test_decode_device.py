"""`benchmarks/decode_device.py` on tiny blocks and a CPU: the peer's outputs are those of the span in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers import LlamaModel
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def bench() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("decode_device")


def test_quick_run_decodes_through_a_peer_process(bench: Any) -> None:
    outcomes = bench.run(bench.options_of(["--quick", "--device", "cpu"]))
    assert [(outcome.rows, outcome.past) for outcome in outcomes] == [(1, 0), (2, 160)]
    for outcome in outcomes:
        assert outcome.difference == 0.0
        lists = (outcome.local, outcome.brought, outcome.remote, outcome.compute, outcome.limit)
        assert [len(seconds) for seconds in lists] == [1] * 5


def test_limit_is_of_weights_keys_and_values(bench: Any) -> None:
    config = bench.config_of("70b", 10, 2048)
    with torch.device("meta"):
        local = LlamaModel(config).bfloat16()
    weights = 10 * 2 * (855_638_016 + 2 * 8192)
    assert bench.bytes_of(local, config, 1, 0) == weights
    assert bench.bytes_of(local, config, 8, 2048) == weights + 10 * 8 * 2048 * 2 * 2 * 8 * 128
