"""Two peers for each half of a tiny llama, as processes; what a test killed is started again after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from transformers.utils import logging as transformers_logging

from remote_modules.testing import LocalSwarm

from .loops import PeerKill

SPANS = ["0:2", "2:4"]
VOCABULARY = 2048  # as the built-in tokenizer has it

transformers_logging.disable_progress_bar()  # else its thread stays
if sys.version_info >= (3, 11):
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def swarm(checkpoint: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(checkpoint, spans=SPANS * 2, mode="process", num_threads=1) as swarm:
        yield swarm


@pytest.fixture
def kill(swarm: LocalSwarm) -> Iterator[PeerKill]:
    kill = PeerKill(swarm)
    yield kill
    if kill.peer is not None:
        kill.peer.restart()
