"""`benchmarks/kills.py` on peers in this process: faults happen, what comes out is right, and what is wrong is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

from remote_modules.testing import LocalSwarm


@pytest.fixture(scope="module")
def kills() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("kills")


@pytest.fixture(scope="module")
def folder(kills: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    kills.build_checkpoint(folder)
    return folder


@pytest.fixture
def swarm(kills: Any, folder: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(folder, spans=kills.SPANS * 2) as swarm:
        yield swarm


@pytest.fixture
def bench(kills: Any, folder: Path, swarm: LocalSwarm) -> Iterator[Any]:
    bench = kills.Bench(swarm, str(folder), rest_s=0.1)
    yield bench
    bench.close()


def test_runs_with_kills_are_equal_and_all_faults_happen(kills: Any, bench: Any) -> None:
    outcome = bench.measure("greedy", kills.greedy(40), "kill", 3)
    assert (outcome.equal, outcome.runs, outcome.faults, outcome.problems) == (3, 3, 9, [])
    assert outcome.failovers > 0
    assert len(outcome.stalls_s) == 3


def test_training_with_kills_gives_the_local_values(kills: Any, bench: Any) -> None:
    outcome = bench.measure("training", kills.MODES["training"], "kill", 1)
    assert (outcome.equal, outcome.faults, outcome.problems) == (1, 3, [])


def test_wrong_tokens_are_counted(kills: Any, bench: Any) -> None:
    def wrong(model: Any) -> list[torch.Tensor]:
        is_remote = model is bench.remote
        return [kills.generate(model, kills.prompt(), 16) + int(is_remote)]

    outcome = bench.measure("wrong", wrong, "kill", 1)
    assert (outcome.equal, outcome.runs) == (0, 1)


def test_rolling_restart_fails_no_request(kills: Any, bench: Any, swarm: LocalSwarm, folder: Path) -> None:
    before = [peer.peer_id for peer in swarm.peers]
    result = kills.roll(swarm, str(folder), bench.local, clients=2, num_tokens=8)
    assert [peer.peer_id for peer in swarm.peers] == before
    assert (result["failed"], result["errors"], result["drain_statuses"]) == (0, [], [0] * 6)
    assert result["requests"] >= 4


def test_near_tie_in_the_reference_is_refused(kills: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kills.check_reference(bench.local, 16) > kills.MIN_GAP
    monkeypatch.setattr(kills, "MIN_GAP", 100.0)
    with pytest.raises(SystemExit, match="near tie"):
        kills.check_reference(bench.local, 16)
