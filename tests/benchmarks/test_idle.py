"""`benchmarks/idle.py` on small processes: what they cost is counted, and too much is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

WITH_CHILD_AND_THREADS = """
import subprocess, sys, threading
other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
stop = threading.Event()
threads = [threading.Thread(target=stop.wait) for _ in range(2)]
for thread in threads:
    thread.start()
print("up", flush=True)
try:
    sys.stdin.read()
finally:
    other.communicate(b"\\n")
    stop.set()
"""


@pytest.fixture(scope="module")
def idle() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("idle")


def test_processes_threads_and_memory_are_counted(idle: Any) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WITH_CHILD_AND_THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        cost = idle.cost_of(process.pid)
        process.communicate("")
    assert (cost["processes"], cost["threads"]) == (2, 4)
    assert cost["rss_bytes"] > 1e6


def test_process_that_says_nothing_is_refused(idle: Any) -> None:
    with pytest.raises(SystemExit, match="did not start"), idle.child(["-c", "pass"]):
        pass


def test_span_is_the_weights_of_the_blocks(idle: Any, tmp_path: Path) -> None:
    idle.build_checkpoint(tmp_path, 64)
    mlp = 3 * 64 * (64 * 11 // 4)
    assert idle.span_bytes(tmp_path) == 4 * 8 * (4 * 64 * 64 + mlp + 2 * 64)


@pytest.mark.parametrize(("threads", "extra_mb", "status"), [(12, 150, 0), (13, 150, 1), (12, 151, 1)])
def test_more_than_the_bars_is_seen(idle: Any, threads: int, extra_mb: int, status: int) -> None:
    torch_cost = {"processes": 1, "threads": 1, "rss_bytes": 200_000_000}
    cost = {"processes": 1, "threads": threads, "rss_bytes": 300_000_000 + extra_mb * 1_000_000}
    found = {"torch": torch_cost, "fresh": cost, "used": cost, "span_bytes": 100_000_000}
    assert idle.report(found) == status
