"""Retained activations: forward and backward through paced peers that keep their graphs, against peers that recompute.

    python benchmarks/activations.py [--rounds 15] [--factor 1.0] [--quick]

Peers on loopback take a set time for each token in each block (`remote_modules.testing.pace`), so that two cores do not
hide what is measured: a backward takes ``--factor`` times its forward, and where the graph was not kept that forward
first. Two clients of the same peers, one that asks them to keep and one that does not, do the same forward and backward
in turn; the ratio is the median over rounds of seconds recomputed / seconds kept. Gradients must be equal to the last
bit. Memory is what the peers say that they hold between forward and backward, and what they hold afterwards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _report import Bar, print_report, say, table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.testing import LocalSwarm
from remote_modules.testing.pace import Pace, paced

NUM_BLOCKS = 8
HIDDEN_SIZE = 64
SPANS = ["0:4", "4:8"]
BAR = 1.25


@dataclass(frozen=True, slots=True)
class Load:
    """What one round does."""

    rows: int = 4
    num_tokens: int = 64
    token_s: float = 1e-4  # of each token in each block


@dataclass(slots=True)
class Outcome:
    """Attributes: held_bytes: by all peers after a forward; left_bytes: after all backwards."""

    kept_s: list[float] = field(default_factory=list)
    recomputed_s: list[float] = field(default_factory=list)
    num_equal: int = 0
    held_bytes: float = 0.0
    left_bytes: float = 0.0
    kept_backwards: int = 0
    recomputed_backwards: int = 0

    @property
    def ratio(self) -> float:
        return statistics.median(slow / fast for slow, fast in zip(self.recomputed_s, self.kept_s, strict=True))


def save_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def held_bytes(swarm: LocalSwarm) -> float:
    total = 0.0
    for peer in swarm.peers:
        with urllib.request.urlopen(f"http://{peer.address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        total += sum(float(line.split()[1]) for line in lines if line.startswith("remote_modules_kept_bytes "))
    return total


def train(
    layers: RemoteSequential, inputs: torch.Tensor, swarm: LocalSwarm | None
) -> tuple[float, torch.Tensor, float]:
    """Seconds of forward and backward, the gradient, and what peers held between the two, if they are asked."""
    leaf = inputs.clone().requires_grad_()
    began_s = time.perf_counter()
    loss = layers(leaf).square().sum()
    took_s = time.perf_counter() - began_s
    held = 0.0 if swarm is None else held_bytes(swarm)
    began_s = time.perf_counter()
    loss.backward()
    assert leaf.grad is not None
    return took_s + time.perf_counter() - began_s, leaf.grad, held


def measure(load: Load, factor: float, rounds: int) -> Outcome:
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name, paced(Pace(0.0, load.token_s, factor)):
        save_llama(Path(name))
        with LocalSwarm(name, spans=SPANS, num_threads=1) as swarm:
            clients = [
                RemoteSequential.from_swarm(
                    name,
                    trackers=swarm.trackers,
                    mdns=False,
                    config=ClientConfig(retain_activations_s=lease_s, peer_cache=None),
                )
                for lease_s in (60.0, 0.0)
            ]
            kept, recomputed = clients
            for number in range(rounds + 1):
                generator = torch.Generator().manual_seed(number)
                inputs = torch.randn(load.rows, load.num_tokens, HIDDEN_SIZE, generator=generator)
                fast_s, fast, held = train(kept, inputs, swarm)
                slow_s, slow, _ = train(recomputed, inputs, None)
                outcome.num_equal += torch.equal(fast, slow)
                if number:  # the first warms up
                    outcome.kept_s.append(fast_s)
                    outcome.recomputed_s.append(slow_s)
                    outcome.held_bytes = max(outcome.held_bytes, held)
            outcome.left_bytes = held_bytes(swarm)
            outcome.kept_backwards = kept.stats().kept_backwards
            outcome.recomputed_backwards = recomputed.stats().recomputed_backwards
            for layers in clients:
                layers.close()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description="retained activations against recomputation, paced peers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--factor", type=float, nargs="+", default=[1.0, 2.0], help="of a backward, in forwards")
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    load = Load(num_tokens=32) if options.quick else Load()
    rounds = 3 if options.quick else options.rounds
    bars, rows, results = [], [], {}
    for factor in options.factor:
        outcome = measure(load, factor, rounds)
        say(f"factor {factor}: {outcome.ratio:.3f}")
        ideal = (2 + factor) / (1 + factor)
        kib = outcome.held_bytes / (load.rows * load.num_tokens * NUM_BLOCKS) / 1024
        bars += [
            Bar(f"recomputed / kept, backward of {factor:g} forwards", outcome.ratio, ">=", BAR),
            Bar(f"rounds with other gradients, {factor:g}", rounds + 1 - outcome.num_equal, "<=", 0),
            Bar(f"bytes left at the end, {factor:g}", outcome.left_bytes, "<=", 0),
            Bar(f"backwards that used a graph, {factor:g}", outcome.kept_backwards, ">=", len(SPANS) * (rounds + 1)),
        ]
        fast_ms, slow_ms = (1e3 * statistics.median(times) for times in (outcome.kept_s, outcome.recomputed_s))
        rows.append(
            (f"{factor:g}", f"{slow_ms:.1f}", f"{fast_ms:.1f}", f"{outcome.ratio:.3f}", f"{ideal:.2f}", f"{kib:.2f}")
        )
        results[f"{factor:g}"] = {"ratio": outcome.ratio, "ideal": ideal, "held_bytes": outcome.held_bytes, "kib": kib}
    head = [
        "backward, in forwards",
        "recomputed, ms",
        "kept, ms",
        "ratio",
        "if nothing else took time",
        "KiB/token and block",
    ]
    return print_report({"rounds": rounds, "by_factor": results}, bars, table(head, rows))


if __name__ == "__main__":
    sys.exit(main())
