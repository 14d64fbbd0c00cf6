from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from remote_modules.cli import output
from remote_modules.testing import LocalSwarm

from .program import NAMES


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings from outside, a known width, and logging as it was."""
    for name in [name for name in os.environ if name.startswith("REMOTE_MODULES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("REMOTE_MODULES_PEER_CACHE", "off")
    monkeypatch.setenv("COLUMNS", "100")
    for console in (output.out, output.err):  # a console may have taken its width from the environment already
        monkeypatch.setattr(console, "width", 100)
    loggers = [logging.getLogger(name) for name in ("remote_modules", "remote_modules.client", "asyncio")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def swarm() -> Iterator[LocalSwarm]:
    """The built-in model on two peers and a tracker, in this process."""
    with LocalSwarm(NAMES.model, spans=["0:3", "3:8"], num_threads=1, dtype="float32") as swarm:
        yield swarm
