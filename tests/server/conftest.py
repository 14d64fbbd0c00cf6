from __future__ import annotations

from pathlib import Path

import pytest

from remote_modules.server.engine import Engine
from remote_modules.spans import Span

from .tiny import NUM_BLOCKS, LocalModel, load_engine, save_tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def local(checkpoint: Path) -> LocalModel:
    return LocalModel(checkpoint)


@pytest.fixture(scope="session")
def whole_engine(checkpoint: Path) -> Engine:
    """All blocks; engines keep nothing between calls, so that tests may share one."""
    return load_engine(checkpoint, Span(0, NUM_BLOCKS))


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Engine:
    """The two blocks in the middle."""
    return load_engine(checkpoint, Span(1, 3))
