"""`benchmarks/wire_quality.py` on little text: the codec is in use, and its cost and gain are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def quality() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("wire_quality")


def test_int8_is_near_plain_tensors_and_moves_a_third(quality: Any) -> None:
    runs = quality.Runs(windows=1, batches=1)
    plain, again, coded = (runs.quality(("0:4", "4:8"), wire) for wire in ("compute", "compute", "int8"))
    for name in ("adapter", "embeddings"):
        assert quality.gradient_errors(again, plain, name) == [0.0]
        assert 0.0 < quality.gradient_errors(coded, plain, name)[0] < 0.05
    assert again.perplexity == plain.perplexity
    assert 0.0 < abs(coded.perplexity / plain.perplexity - 1) < 0.01
    values = 2 * 2 * 160  # two hops, in and out
    assert plain.forward_bytes > 4 * values
    assert coded.forward_bytes - plain.forward_bytes == pytest.approx((1 + 21 / 160 - 4) * values, rel=0.01)
    assert coded.backward_bytes < plain.backward_bytes


def test_speed_of_the_codec_is_measured(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SPEED_SHAPE", (4, 64))
    assert all(speed > 0 for speed in quality.megabytes_per_s("int8o", torch.bfloat16, 2))
