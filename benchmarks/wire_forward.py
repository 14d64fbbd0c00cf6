"""Parallel forwards over links of 100 Mbit/s: coded wires against 16-bit values.

    python benchmarks/wire_forward.py [--quick] [--rows 64] [--tokens 32] [--repeats 5]

Three paced peers (`testing.pace`) of one block each, 1 ms for each token, behind links of their own in a network
laboratory, 5 ms of round trip. Rates are scaled, as bytes and computing are: 16-bit activations of a token travel for
1.76 of the time that a stage computes it, as with BLOOM-176B on three A100 at 100 Mbit/s (see `pipeline.py`). Forwards
of all wires take turns in random order; ratios are of medians. Prints one line of JSON; markdown goes to stderr.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _lab import LabSwarm, Link, Netlab, build_llama, client_host
from _report import Bar, print_report, table
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.testing.pace import Pace

NUM_PEERS = 3
HIDDEN_SIZE = 256
WIRES = ("compute", "int8", "int4")
TOKEN_S = 1e-3
MICROBATCH_TOKENS = 64
WIRE_TO_COMPUTE = 1.76  # of a token in 16 bits at 100 Mbit/s
MBIT, DELAY_MS = 2 * HIDDEN_SIZE * 8 / (WIRE_TO_COMPUTE * TOKEN_S) / 1e6, 2.5  # stands for 100 Mbit/s


def seconds(layers: RemoteSequential, inputs: torch.Tensor) -> float:
    began_s = time.perf_counter()
    with torch.no_grad():
        layers(inputs)
    return time.perf_counter() - began_s


def measure(rows: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of forwards by wire; a first one of each, which meets the peers, is left out."""
    hosts: dict[str, Any] = {"client": None, "tracker": None, **{f"peer{n}": None for n in range(NUM_PEERS)}}
    inputs = torch.randn(rows, tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    found: dict[str, list[float]] = {wire: [] for wire in WIRES}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, Netlab(hosts, default=Link(delay_ms=DELAY_MS)) as lab:
        build_llama(Path(folder), num_blocks=NUM_PEERS, hidden_size=HIDDEN_SIZE)
        with LabSwarm(lab, folder, "tracker", dtype="bfloat16") as swarm, ExitStack() as stack:
            for number in range(NUM_PEERS):
                swarm.begin(f"peer{number}", Pace(block_s=0.0, token_s=TOKEN_S), blocks=f"{number}:{number + 1}")
            swarm.await_online()
            for number in range(NUM_PEERS):
                lab.set_link("client", f"peer{number}", mbit=MBIT, delay_ms=DELAY_MS)
            stack.enter_context(client_host(lab, "client"))
            options: dict[str, Any] = {"trackers": [swarm.url], "mdns": False}
            arms = {
                wire: stack.enter_context(
                    RemoteSequential.from_swarm(
                        folder,
                        config=ClientConfig(wire=wire, hedge=False, microbatch_tokens=MICROBATCH_TOKENS),
                        **options,
                    )
                )
                for wire in WIRES
            }
            for number in range(1 + repeats):
                for wire in order.sample(WIRES, len(WIRES)):
                    took_s = seconds(arms[wire], inputs)
                    if number:
                        found[wire].append(took_s)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="parallel forwards over slow links, plain and coded")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found = measure(options.rows, options.tokens, 1 if options.quick else options.repeats)
    medians = {wire: statistics.median(times) for wire, times in found.items()}
    gains = {wire: medians["compute"] / median for wire, median in medians.items()}
    rows = [
        (w, f"{m:.3f}", f"{min(found[w]):.3f} to {max(found[w]):.3f}", f"{gains[w]:.2f}") for w, m in medians.items()
    ]
    bars = [Bar(f"forward of {options.rows} rows, {wire}: times 16 bits", gains[wire], ">=", 1.4) for wire in WIRES[1:]]
    return print_report({"seconds": found}, bars, table(("wire", "median, s", "range", "times 16 bits"), rows))


if __name__ == "__main__":
    sys.exit(main())
