"""`benchmarks/overhead.py` on peers in this process."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def overhead() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("overhead")


def test_peers_are_measured_hop_by_hop(overhead: Any) -> None:
    result = overhead.measure(64, [3], prefix=4, tokens=2, rounds=1, mode="thread")
    assert result["local_ms_per_token"] > 0
    assert list(result["peers"]) == ["3"]
    found = result["peers"]["3"]
    assert [row["hop"] for row in found["waterfall"]] == ["0:3", "3:5", "5:8", "client"]
    assert found["least_ratio"] == found["ratio"] == found["most_ratio"]
    assert all(row["compute_us"] > 0 for row in found["waterfall"][:-1])
    assert "| 64 | 3 | 3:5 |" in overhead.markdown([result])


def test_bars_are_those_of_the_hidden_size_and_number_of_peers(overhead: Any) -> None:
    found = {"ratio": 1.2}
    results = [{"hidden": hidden, "peers": {"1": found, "4": found}} for hidden in (64, 256, 1024)]
    assert [(bar.bar, bar.is_met) for bar in overhead.bars_of(results)] == [(1.25, True), (1.08, False)]


@pytest.mark.parametrize("peers", [["0"], ["9"], ["2", "2"]])
def test_wrong_numbers_of_peers_are_refused(overhead: Any, peers: list[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.parse(["--peers", *peers])
