"""`benchmarks/clients.py` on a peer in this process."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module")
def clients() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("clients")


def test_clients_are_measured_against_a_local_batch(clients: Any) -> None:
    result = clients.measure(64, 3, prefix=8, tokens=3, rounds=1, is_ragged=True, mode="thread")
    assert set(result["tokens_per_s"]) == {clients.ONE_ROW, clients.ALL_ROWS, clients.ONE, clients.ALL}
    assert result["share"] == pytest.approx(result["gain"] / result["local_gain"], rel=1e-2)
    assert 0.0 <= result["output_difference"] <= clients.OUTPUT_BAR
    assert 0.0 < result["fairness"] <= 1.0
    assert "| 64 | 3 | ≤ 8 |" in clients.markdown([result])


def test_texts_of_ragged_clients_differ_in_length(clients: Any) -> None:
    texts = clients.texts_of(8, 4, 128, 2, is_ragged=True)
    assert [text.prefix.shape[1] for text in texts] == [128, 112, 96, 80, 64, 48, 32, 16]
    assert {text.prefix.shape[1] for text in clients.texts_of(3, 4, 128, 2, is_ragged=False)} == {128}
    assert [step.shape for step in texts[0].steps] == [(1, 1, 4)] * 2


def test_bars_are_of_share_fairness_and_outputs(clients: Any) -> None:
    result = {"hidden": 64, "clients": 8, "share": 0.9, "fairness": 0.7, "output_difference": 1e-6}
    assert [bar.is_met for bar in clients.bars_of([result])] == [True, False, True]


@pytest.mark.parametrize("option", ["--clients", "--tokens", "--rounds", "--prefix"])
def test_wrong_numbers_are_refused(clients: Any, option: str) -> None:
    with pytest.raises(SystemExit):
        clients.parse([option, "0"])
