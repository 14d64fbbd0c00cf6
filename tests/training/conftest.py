"""Peers of a tiny llama, as processes, two for the half that tests kill; what one killed is started again after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from huggingface_hub import constants
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers.utils import logging as transformers_logging

from remote_modules.testing import LocalSwarm

from .loops import PeerKill

SPANS = ["0:2", "2:4", "2:4"]
VOCABULARY = 2048  # as the built-in tokenizer has it

transformers_logging.disable_progress_bar()  # else its thread stays


@pytest.fixture(autouse=True)
def _no_background_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of progress bars, and of TRL, which reports its use to the hub."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def swarm(checkpoint: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(checkpoint, spans=SPANS, mode="process", num_threads=1) as swarm:
        yield swarm


@pytest.fixture
def kill(swarm: LocalSwarm) -> Iterator[PeerKill]:
    kill = PeerKill(swarm)
    yield kill
    if kill.peer is not None:
        kill.peer.restart()
