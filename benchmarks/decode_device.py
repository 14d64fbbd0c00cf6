"""Decoding through a peer on an accelerator, against the same span in one process, and against reading its memory once.

    python benchmarks/decode_device.py [--device cuda] [--shape 70b|8b] [--rows 1 8 32] [--past 2048] [--rounds 5]
        [--no-graphs] [--compile 1 8 32]

A span of random blocks, by default ten of the shape of Llama 70B in bf16, is saved to a folder and loaded by a peer
process; this process has the same span, and is the client: hidden states on the CPU. A step is one token of each row.
In each round the local span does a number of steps on its own cache, all queued before the device is waited for; then
as many with the hidden states brought from the CPU and back, which a peer must do, too; then the client does them
through the peer. The limit is the time to read the weights, and the keys and values, once, at the rate at which the
device reads a large tensor, measured in each round as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "4")

import torch
from _device_span import add_shape, build, config_of, wait
from _read_rate import read_rate
from _report import Bar, print_report, say, table
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.model.stack import cache_argument
from remote_modules.testing import LocalSwarm, child_process

START_TIMEOUT_S = 400.0  # of a peer that reads, hashes and measures 17 GB
PREFILL_TOKENS = 512  # of all rows, in each call that fills the caches
KV_BYTES = 16 << 30
READ_BYTES = 4 << 30
BARS = {("70b", 1): 0.85, ("70b", 8): 0.75, ("70b", 32): 0.75, ("8b", 1): 0.60}  # of the read limit
OVERHEAD_BAR_S = 0.3e-3  # a step's time above the peer's computing


@dataclass(slots=True)
class Outcome:
    """Seconds of a step, by round.

    Attributes:
        local, brought, remote, compute: in this process; with hidden states from the CPU and back; through the peer;
            the peer's own computing.
        limit: for reading weights, keys and values once.
        difference: of the last outputs, relative.
    """

    rows: int
    past: int
    local: list[float] = field(default_factory=list)
    brought: list[float] = field(default_factory=list)
    remote: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    difference: float = 0.0


def bytes_of(local: nn.Module, config: LlamaConfig, rows: int, past: int) -> int:
    """Weights of the blocks, and their keys and values."""
    weights = sum(parameter.nbytes for name, parameter in local.named_parameters() if name.startswith("layers."))
    head = config.hidden_size // config.num_attention_heads
    kv = 2 * 2 * head * (config.num_key_value_heads or config.num_attention_heads) * config.num_hidden_layers
    return weights + kv * rows * past


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path, config: LlamaConfig, local: nn.Module) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.config = config
        self.local = local
        self.swarm = LocalSwarm(
            folder,
            spans=[f"0:{options.blocks}"],
            mode="process",
            device=options.device,
            max_batch_tokens=max(8192, PREFILL_TOKENS),
            graphs=options.graphs,
            compile_rows=tuple(options.compile),
            kv_budget_bytes=KV_BYTES if options.device == "cuda" else None,
        )

    def measure(self) -> list[Outcome]:
        with self.swarm as swarm, torch.inference_mode():
            config = ClientConfig(peer_cache=None)
            with RemoteSequential.from_swarm(
                self.config, trackers=swarm.trackers, mdns=False, config=config
            ) as self.layers:
                return [self._of(rows, 0 if rows == 1 else self.options.past) for rows in self.options.rows]

    def _of(self, rows: int, past: int) -> Outcome:
        outcome = Outcome(rows, past)
        generator = torch.Generator().manual_seed(rows)
        shape = (rows, max(past, 128), self.config.hidden_size)
        prefix = torch.randn(shape, generator=generator).bfloat16()
        steps = [torch.randn(rows, 1, self.config.hidden_size, generator=generator).bfloat16() for _ in range(8)]
        cache = DynamicCache(config=self.config)
        session = self.layers.session()
        for chunk in prefix.split(max(1, PREFILL_TOKENS // rows), dim=1):
            self._forward(chunk.to(self.device), cache)
            session.step(chunk)
        for number in range(self.options.rounds + 1):
            rate = read_rate(self.device, READ_BYTES if self.device.type == "cuda" else 1 << 24)
            local_s = self._locally(cache, [step.to(self.device) for step in steps])
            brought_s, expected = self._brought(cache, steps)
            remote_s, compute_s, found = self._remotely(session, steps)
            outcome.difference = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
            text = f"local {local_s * 1e3:.3f}, brought {brought_s * 1e3:.3f}, remote {remote_s * 1e3:.3f}"
            say(f"{rows} rows, round {number}: {text}, peer's computing {compute_s * 1e3:.3f} ms")
            if number:  # the first warms up
                outcome.local.append(local_s)
                outcome.brought.append(brought_s)
                outcome.remote.append(remote_s)
                outcome.compute.append(compute_s)
                outcome.limit.append(bytes_of(self.local, self.config, rows, session.position) / rate)
        session.close()
        return outcome

    def _forward(self, hidden: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "inputs_embeds": hidden,
            cache_argument(self.local) or "": cache,
            "use_cache": True,
        }
        output: torch.Tensor = self.local(**arguments).last_hidden_state
        return output

    def _locally(self, cache: DynamicCache, steps: list[torch.Tensor]) -> float:
        wait(self.device)
        began_s = time.perf_counter()
        for step in steps:
            self._forward(step, cache)
        wait(self.device)
        took_s = time.perf_counter() - began_s
        cache.crop(-len(steps))  # `_brought` does them again
        return took_s / len(steps)

    def _brought(self, cache: DynamicCache, steps: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
        output, began_s = steps[0], time.perf_counter()
        for step in steps:
            output = self._forward(step.to(self.device), cache).cpu()
        return (time.perf_counter() - began_s) / len(steps), output

    def _remotely(self, session: Any, steps: list[torch.Tensor]) -> tuple[float, float, torch.Tensor]:
        output, times, computing = steps[0], [], []
        for step in steps:
            began_s = time.perf_counter()
            output = session.step(step)
            times.append(time.perf_counter() - began_s)
            computing.append(sum(hop.compute_s for hop in self.layers.stats().waterfall[-1]))
        return statistics.fmean(times), statistics.fmean(computing), output


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="decoding through a peer on an accelerator")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_shape(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="sequences in a step")
    parser.add_argument("--past", type=int, default=2048, help="tokens in the caches, where there are several rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="of the peer")
    parser.add_argument(
        "--compile", type=int, nargs="*", default=[], help="rows for which the peer compiles its blocks"
    )
    parser.add_argument("--quick", action="store_true", help="tiny blocks, one round, no bars")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(shape="tiny", blocks=2, rows=[1, 2], past=160, rounds=1)
    return options


def run(options: argparse.Namespace) -> list[Outcome]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    child_process.START_TIMEOUT_S = START_TIMEOUT_S
    folder = Path(tempfile.mkdtemp(prefix="remote-modules-span-"))
    try:
        config = config_of(options.shape, options.blocks, 2 * options.past)
        local = build(config, torch.device(options.device), folder)
        return Bench(options, folder, config, local).measure()
    finally:
        shutil.rmtree(folder)


def main() -> int:
    options = options_of()
    outcomes = run(options)
    bars, rows = [], []
    for outcome in outcomes:
        local, brought, remote, compute, limit = map(
            statistics.median, (outcome.local, outcome.brought, outcome.remote, outcome.compute, outcome.limit)
        )
        figures = [f"{seconds * 1e3:.3f}" for seconds in (limit, local, brought, remote, compute)]
        rows.append((outcome.rows, outcome.past, *figures, f"{limit / remote:.3f}", f"{local / remote:.3f}"))
        bar = BARS.get((options.shape, outcome.rows))
        if bar is not None and not options.quick:
            bars.append(Bar(f"{outcome.rows} rows: read limit / step through the peer", limit / remote, ">=", bar))
            bars.append(Bar(f"{outcome.rows} rows: step - computing, s", remote - compute, "<=", OVERHEAD_BAR_S))
    head = ["rows", "past", "limit, ms", "local", "local, CPU to CPU", "remote", "peer's computing"]
    text = table([*head, "limit / remote", "local / remote"], rows)
    result = {"options": vars(options), "differences": [outcome.difference for outcome in outcomes]}
    return print_report(result, bars, text)


if __name__ == "__main__":
    sys.exit(main())
