"""What an idle peer costs: processes, threads, and memory beyond importing torch and its own span.

    python benchmarks/idle.py [--hidden 1024] [--settle 5]

``remote-modules serve`` holds all eight blocks of a random fp32 llama. It is looked at when it is up, and again after a
client has decoded and gone. Resident memory is compared with that of a process that imports torch and does nothing
else, started in the same run. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _report import Bar, print_report, table
from overhead import NUM_BLOCKS, build_checkpoint
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from remote_modules import load

MAX_THREADS = 12
MAX_EXTRA_BYTES = 150e6
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
ONLY_TORCH = "import sys, torch; print('up', flush=True); sys.stdin.read()"


@contextmanager
def child(command: list[str]) -> Iterator[tuple[int, str]]:
    """Process id and first line of a process that is ended at the end."""
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        line = process.stdout.readline() if ready else ""
        if not line:
            raise SystemExit(f"{command[:2]} did not start within {START_TIMEOUT_S:.0f} s")
        yield process.pid, line
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def cost_of(pid: int) -> dict[str, int]:
    """Of a process and all that it started."""
    pids = [pid, *descendants(pid)]
    statuses = [Path(f"/proc/{one}/status").read_text("ascii") for one in pids]
    fields = [dict(line.split(":", 1) for line in status.splitlines() if ":" in line) for status in statuses]
    return {
        "processes": len(pids),
        "threads": sum(int(found["Threads"]) for found in fields),
        "rss_bytes": sum(int(found["VmRSS"].split()[0]) * 1024 for found in fields),
    }


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for one in map(int, path.read_text("ascii").split()):
            found += [one, *descendants(one)]
    return found


def span_bytes(folder: Path) -> int:
    """Of the weights of all blocks."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys() if ".layers." in name)
    return total


def use(folder: Path, address: str) -> None:
    """A client that decodes a little, and goes."""
    model: Any = load(folder, peers=[address], mdns=False)
    with model.model.layers:
        tokens = torch.arange(1, 17)[None]
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)


def measure(folder: Path, settle_s: float) -> dict[str, Any]:
    serve = ["-m", "remote_modules", "serve", str(folder), "--blocks", f"0:{NUM_BLOCKS}", "--port", "0", "--json"]
    with child(["-c", ONLY_TORCH]) as (pid, _):
        torch_cost = cost_of(pid)
    with child([*serve, "--session-idle-s", "1"]) as (pid, line):
        time.sleep(settle_s)
        fresh = cost_of(pid)
        use(folder, json.loads(line)["address"])
        time.sleep(settle_s)
        used = cost_of(pid)
    return {"torch": torch_cost, "fresh": fresh, "used": used, "span_bytes": span_bytes(folder)}


def report(found: dict[str, Any]) -> int:
    bars, rows = [], [("only torch imported", *found["torch"].values(), "")]
    for name, label in (("fresh", "peer, started"), ("used", "peer, used and idle again")):
        cost = found[name]
        extra = cost["rss_bytes"] - found["torch"]["rss_bytes"] - found["span_bytes"]
        rows.append((label, *cost.values(), extra))
        bars += [
            Bar(f"{label}: processes", cost["processes"], "<=", 1),
            Bar(f"{label}: threads", cost["threads"], "<=", MAX_THREADS),
            Bar(f"{label}: MB beyond torch and span", extra / 1e6, "<=", MAX_EXTRA_BYTES / 1e6),
        ]
    head = ["", "processes", "threads", "resident bytes", "beyond torch and span"]
    return print_report(found, bars, table(head, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="what an idle peer costs")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--settle", type=float, default=5.0, metavar="SECONDS", help="before a look")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="idle-benchmark-") as name:
        build_checkpoint(Path(name), options.hidden)
        return report(measure(Path(name), options.settle))


if __name__ == "__main__":
    sys.exit(main())
