"""Common to all tests: one torch thread (exactness, and two cores), and nothing left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
os.environ["REMOTE_MODULES_PEER_CACHE"] = "off"  # for child processes too: no test writes into anybody's home


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every thread that a test starts must have ended, but for the one event loop of the process."""
    before = set(threading.enumerate())
    yield
    left = []
    for thread in set(threading.enumerate()) - before:
        if thread.name != "remote-modules-io" and not thread.name.startswith(("asyncio_", "ThreadPoolExecutor")):
            thread.join(5.0)
            if thread.is_alive():
                left.append(thread.name)
    assert not left, f"threads left behind: {left}"
