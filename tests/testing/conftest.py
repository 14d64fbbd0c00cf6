from __future__ import annotations

import math

import pytest

from remote_modules.net import connection


@pytest.fixture(autouse=True)
def _no_idle_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links are tested for what they do themselves: their ends do not give each other up."""
    monkeypatch.setattr(connection, "IDLE_DEAD_S", math.inf)
