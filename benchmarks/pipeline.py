"""How busy microbatches keep the hops of a training pass: its rate against that of the slowest stage by itself.

    python benchmarks/pipeline.py [--quick] [--part loopback|network] [--peers 3 8]

Each peer is a process that holds one block and takes a set time for it (`testing.pace`): 1 ms for each token in a
forward, 2 ms in a backward, which recomputes. Two parts, one report::

    loopback  3 and 8 peers: tokens per second of forward and backward through all, over those through the slowest
              peer alone; m microbatches keep p hops busy for m of m + p - 1 turns, which bounds the ratio
    network   3 peers, each behind a link of its own in a network laboratory: 100 Mbit/s against 1 Gbit/s at 5 ms of
              round trip, and 100 ms against 5 ms at 100 Mbit/s

Rates of the links are scaled, as bytes and computing are: at 100 Mbit/s a token's activations travel for 0.88 of the
time that a stage computes it, as with BLOOM-176B on three A100 and an int8 wire (the case of the Petals paper).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _lab import LabSwarm, Link, Netlab, build_llama, client_host
from _report import Bar, print_report, table
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.testing.child_process import ChildProcess
from remote_modules.testing.pace import Pace

HIDDEN_SIZE = 64
ROW_TOKENS = 32
ROWS_AT_ONCE = 2
TOKEN_S = 1e-3
PACE = Pace(block_s=0.0, token_s=TOKEN_S)
CONFIG = ClientConfig(microbatch_tokens=ROWS_AT_ONCE * ROW_TOKENS, hedge=False)
WIRE_TO_COMPUTE = 0.88  # of a token at 100 Mbit/s
MBIT = 4 * HIDDEN_SIZE * 8 / (WIRE_TO_COMPUTE * TOKEN_S) / 1e6  # stands for 100 Mbit/s
LINKS = {"1 Gbit/s, 5 ms": (10 * MBIT, 5.0), "100 Mbit/s, 5 ms": (MBIT, 5.0), "100 Mbit/s, 100 ms": (MBIT, 100.0)}

Rates = list[float]


def tokens_per_s(layers: RemoteSequential, rows: int, repeats: int) -> Rates:
    """Of forwards and backwards; the first, which meets the peers and measures them, is left out."""
    rates = []
    for _ in range(1 + repeats):
        inputs = torch.randn(rows, ROW_TOKENS, HIDDEN_SIZE, requires_grad=True)
        began_s = time.perf_counter()
        layers(inputs).sum().backward()
        rates.append(rows * ROW_TOKENS / (time.perf_counter() - began_s))
    return rates[1:]


@contextmanager
def paced_peers(folder: str, count: int) -> Iterator[list[str]]:
    """Addresses of peers on loopback, one block each."""
    options = {"model": folder, "mdns": False, "num_threads": 1, "peer_cache": None}
    with ExitStack() as stack:
        children = []
        for number in range(count):
            config = {**options, "blocks": f"{number}:{number + 1}"}
            children.append(ChildProcess("peer", config, pace=asdict(PACE)))
            stack.callback(children[-1].end)
        yield [child.first_line()["address"] for child in children]


def on_loopback(num_peers: int, microbatches: int, repeats: int) -> dict[str, Any]:
    rows = microbatches * ROWS_AT_ONCE
    with tempfile.TemporaryDirectory() as folder:
        build_llama(Path(folder), num_blocks=num_peers, hidden_size=HIDDEN_SIZE)
        with (
            paced_peers(folder, num_peers) as addresses,
            RemoteSequential.from_swarm(folder, peers=addresses, mdns=False, config=CONFIG) as layers,
        ):
            alone = tokens_per_s(layers[0:1], rows, 1)
            together = tokens_per_s(layers, rows, repeats)
    return {
        "peers": num_peers,
        "microbatches": microbatches,
        "alone": alone,
        "together": together,
        "bound": microbatches / (microbatches + num_peers - 1),
        "ratio": statistics.median(together) / statistics.median(alone),
    }


def over_networks(num_peers: int, microbatches: int, repeats: int) -> dict[str, Rates]:
    """Rates by kind of link."""
    hosts: dict[str, Any] = {"client": None, "tracker": None, **{f"peer{n}": None for n in range(num_peers)}}
    found = {}
    with tempfile.TemporaryDirectory() as folder, Netlab(hosts, default=Link(delay_ms=2.5)) as lab:
        build_llama(Path(folder), num_blocks=num_peers, hidden_size=HIDDEN_SIZE)
        with LabSwarm(lab, folder, "tracker", announce_interval_s=5.0) as swarm:
            for number in range(num_peers):
                swarm.begin(f"peer{number}", PACE, blocks=f"{number}:{number + 1}")
            swarm.await_online()
            for name, (mbit, rtt_ms) in LINKS.items():
                for number in range(num_peers):
                    lab.set_link("client", f"peer{number}", mbit=mbit, delay_ms=rtt_ms / 2)
                with (
                    client_host(lab, "client"),
                    RemoteSequential.from_swarm(folder, trackers=[swarm.url], mdns=False, config=CONFIG) as layers,
                ):
                    found[name] = tokens_per_s(layers, microbatches * ROWS_AT_ONCE, repeats)
    return found


def report(loopback: Sequence[dict[str, Any]], network: dict[str, Rates]) -> int:
    bars = [Bar(f"{row['peers']} peers ÷ slowest stage alone", row["ratio"], ">=", 0.80) for row in loopback]
    rows = [
        (
            f"loopback, {row['peers']} peers",
            row["microbatches"],
            f"{statistics.median(row['together']):.0f}",
            f"{row['ratio']:.3f}",
            f"{row['bound']:.3f}",
        )
        for row in loopback
    ]
    if network:
        fast, slow, far = (statistics.median(network[name]) for name in LINKS)
        bars += [
            Bar("100 Mbit/s ÷ 1 Gbit/s, 5 ms", slow / fast, ">=", 0.718),
            Bar("100 ms ÷ 5 ms, 100 Mbit/s", far / slow, ">=", 0.616),
        ]
        rows += [(name, "", f"{statistics.median(rates):.0f}", "", "") for name, rates in network.items()]
    markdown = table(["peers", "microbatches", "tokens/s", "÷ slowest stage alone", "bound"], rows)
    return print_report({"loopback": list(loopback), "network": network}, bars, markdown)


def main() -> int:
    parser = argparse.ArgumentParser(description="pipelined training passes on paced peers")
    parser.add_argument("--quick", action="store_true", help="3 peers on loopback, 6 microbatches, one pass")
    parser.add_argument("--part", choices=["loopback", "network"])
    parser.add_argument("--peers", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--microbatches", type=int, help="of one pass; default 8 for each peer")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.part, options.peers, options.microbatches, options.repeats = "loopback", [3], 6, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sizes = options.peers if options.part != "network" else []
    loopback = [on_loopback(count, options.microbatches or 8 * count, options.repeats) for count in sizes]
    network: dict[str, Rates] = {}
    if options.part != "loopback":
        network = over_networks(3, options.microbatches or 32, options.repeats)
    status = report(loopback, network)
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
