from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from model.conftest import llama_folder
from swarm.conftest import checkpoint, local

from .recorder import FaultLog

__all__ = ["checkpoint", "llama_folder", "local"]

ROOT = Path(__file__).parents[2]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(*rows): rows of the fault matrix that the test records")


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[FaultLog]:
    """Where the test writes down what it measured."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "mark the test with its rows"
    test = f"{Path(request.node.path).relative_to(ROOT)}::{request.node.originalname}"
    log = FaultLog(test, marker.args)
    failed_before = request.session.testsfailed
    yield log
    if request.session.testsfailed == failed_before:
        log.write()
