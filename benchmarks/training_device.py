"""Training through a peer on an accelerator, against the same span in one process on it: tokens/s, and FLOP/s achieved.

    python benchmarks/training_device.py [--device cuda] [--rounds 5] [--in-flight 8] [--tokens 2048] [--quick]

A span of random blocks, by default ten of the shape of Llama 70B in bf16, is saved to a folder and loaded by a peer
process; this process has the same span for comparison, and is the client: hidden states on the CPU, so every pass
crosses loopback and the bus of the accelerator. Weights are frozen, and the gradient is that of the inputs. In each
round the local span does a number of microbatches, forward and backward, one after the other, and then the client does
the same ones through the peer, several in flight from as many threads; the peer keeps its graphs. The ratio is the
median over rounds. The matrix rate is that of one large product, measured in each round as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "4")

import torch
from _device_span import add_shape, build, config_of, wait
from _report import Bar, print_report, say, table
from torch import nn
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.testing import LocalSwarm, child_process

BAR = 0.9
START_TIMEOUT_S = 400.0  # of a peer that reads, hashes and measures 17 GB
LARGEST_DIFFERENCE = 0.05  # of the gradients of two local runs with and without an explicit mask, on an H200: 0.047
QUICK = {"shape": "tiny", "blocks": 2, "tokens": 32, "microbatches": 2}


@dataclass(slots=True)
class Outcome:
    """What was measured, by round.

    Attributes:
        local, remote: tokens/s.
        matrix: FLOP/s of a large product.
        largest_difference: norm of a gradient's difference / its norm. Attention's backward on an accelerator adds up
            in no fixed order.
    """

    local: list[float] = field(default_factory=list)
    remote: list[float] = field(default_factory=list)
    matrix: list[float] = field(default_factory=list)
    largest_difference: float = 0.0
    kept_backwards: int = 0
    recomputed_backwards: int = 0
    timings: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(self.remote, self.local, strict=True))


def flops_of_token(config: LlamaConfig, num_tokens: int) -> float:
    """Forward and backward of one token in all blocks: products with frozen weights, and causal attention."""
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv_size = head * (config.num_key_value_heads or config.num_attention_heads)
    weights = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * config.intermediate_size
    attention = 2 * num_tokens * hidden  # scores and values, half of them masked
    return config.num_hidden_layers * (2 * 2 * weights + 3 * attention)


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of products of two bf16 matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = 20 if device.type == "cuda" else 2
    left @ right
    wait(device)
    began_s = time.perf_counter()
    for _ in range(times):
        left @ right
    wait(device)
    return times * 2 * size**3 / (time.perf_counter() - began_s)


class Bench:
    """Both sides, and the microbatches: inputs and the gradients of what comes out, on the CPU and on the device."""

    def __init__(self, options: argparse.Namespace, folder: Path, config: LlamaConfig, local: nn.Module) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.local = local
        shape = (options.rows, options.tokens, config.hidden_size)
        generator = torch.Generator().manual_seed(1)
        self.host = [
            (torch.randn(shape, generator=generator).bfloat16(), torch.randn(shape, generator=generator).bfloat16())
            for _ in range(options.microbatches)
        ]
        self.there = [(inputs.to(self.device), grad.to(self.device)) for inputs, grad in self.host]
        self.num_tokens = options.microbatches * options.rows * options.tokens
        self.swarm = LocalSwarm(
            folder,
            spans=[f"0:{options.blocks}"],
            mode="process",
            device=options.device,
            activation_budget_bytes=int(options.budget_gib * 2**30),
            max_batch_tokens=max(8192, options.rows * options.tokens),
        )
        self.outcome = Outcome()

    def measure(self, config: LlamaConfig, rounds: int) -> Outcome:
        outcome, lease = self.outcome, ClientConfig(retain_activations_s=300.0, peer_cache=None)
        with self.swarm as swarm, ThreadPoolExecutor(self.options.in_flight) as pool:
            with RemoteSequential.from_swarm(config, trackers=swarm.trackers, mdns=False, config=lease) as layers:
                for number in range(rounds + 1):
                    matrix = matrix_rate(self.device, self.options.matrix)
                    local_s, expected = self._run_locally()
                    remote_s, found = self._run_remotely(layers, pool)
                    differences = [
                        (a - b).norm().item() / b.norm().item() for a, b in zip(found, expected, strict=True)
                    ]
                    outcome.largest_difference = max(outcome.largest_difference, *differences)
                    say(f"round {number}: local {local_s:.3f} s, remote {remote_s:.3f} s, {matrix / 1e12:.4g} TFLOP/s")
                    if number:  # the first warms up
                        outcome.matrix.append(matrix)
                        outcome.local.append(self.num_tokens / local_s)
                        outcome.remote.append(self.num_tokens / remote_s)
                stats = layers.stats()
                outcome.kept_backwards, outcome.recomputed_backwards = stats.kept_backwards, stats.recomputed_backwards
                outcome.timings = [
                    f"total {hop.total_s:.3f} queue {hop.queue_s:.3f} compute {hop.compute_s:.3f} wire {hop.wire_s:.3f}"
                    for hops in stats.waterfall[-8:]
                    for hop in hops
                ]
        return outcome

    def _run_locally(self) -> tuple[float, list[torch.Tensor]]:
        wait(self.device)
        grads = []
        began_s = time.perf_counter()
        for inputs, grad in self.there:
            leaf = inputs.detach().requires_grad_()
            self.local(inputs_embeds=leaf, use_cache=False).last_hidden_state.backward(grad)
            grads.append(leaf.grad)
        wait(self.device)
        took_s = time.perf_counter() - began_s
        return took_s, [grad.cpu() for grad in grads if grad is not None]

    def _run_remotely(self, layers: RemoteSequential, pool: ThreadPoolExecutor) -> tuple[float, list[torch.Tensor]]:
        def do(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            leaf = pair[0].detach().requires_grad_()
            layers(leaf).backward(pair[1])
            assert leaf.grad is not None
            return leaf.grad

        began_s = time.perf_counter()
        grads = list(pool.map(do, self.host))
        return time.perf_counter() - began_s, grads


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="training through a peer on an accelerator")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_shape(parser)
    parser.add_argument("--rows", type=int, default=1, help="of a microbatch")
    parser.add_argument("--tokens", type=int, default=2048, help="of each row")
    parser.add_argument("--microbatches", type=int, default=48, help="in each round")
    parser.add_argument("--in-flight", type=int, default=8, help="microbatches at once, each from a thread of its own")
    parser.add_argument("--budget-gib", type=float, default=76.0, help="of kept graphs at the peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192, help="size of the product that is the limit")
    parser.add_argument("--quick", action="store_true", help="tiny blocks, one round, no bars of speed")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK, rounds=1, in_flight=2, matrix=256, budget_gib=1.0)
    return options


def run(options: argparse.Namespace) -> Outcome:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    child_process.START_TIMEOUT_S = START_TIMEOUT_S
    folder = Path(tempfile.mkdtemp(prefix="remote-modules-span-"))
    try:
        config, began_s = config_of(options.shape, options.blocks, options.tokens), time.perf_counter()
        local = build(config, torch.device(options.device), folder)
        say(f"built in {time.perf_counter() - began_s:.0f} s")
        bench = Bench(options, folder, config, local)
        return bench.measure(config, options.rounds)
    finally:
        shutil.rmtree(folder)


def main() -> int:
    options = options_of()
    outcome = run(options)
    for line in outcome.timings:
        say(line)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    flops = flops_of_token(config_of(options.shape, options.blocks, options.tokens), options.tokens)
    local, remote, matrix = map(statistics.median, (outcome.local, outcome.remote, outcome.matrix))
    bars = [Bar("largest relative difference of a gradient", outcome.largest_difference, "<=", LARGEST_DIFFERENCE)]
    if not options.quick:
        bars.append(Bar("tokens/s through the peer / in one process", outcome.ratio, ">=", BAR))
    head = ["side", "tokens/s", "TFLOP/s", "of the matrix rate"]
    rows = [
        (side, f"{rate:.0f}", f"{rate * flops / 1e12:.4g}", f"{rate * flops / matrix:.3f}")
        for side, rate in (("one process", local), ("through the peer", remote))
    ]
    rows.append(("one product", "", f"{matrix / 1e12:.4g}", "1"))
    result = {
        "device": name,
        "options": vars(options),
        "ratio": outcome.ratio,
        "local_tokens_per_s": outcome.local,
        "remote_tokens_per_s": outcome.remote,
        "matrix_flops_per_s": outcome.matrix,
        "flops_of_token": flops,
        "largest_difference": outcome.largest_difference,
        "kept_backwards": outcome.kept_backwards,
        "recomputed_backwards": outcome.recomputed_backwards,
    }
    return print_report(result, bars, f"{name}, ratio {outcome.ratio:.3f}\n\n" + table(head, rows))


if __name__ == "__main__":
    sys.exit(main())
