"""The LM head with int8 weights against the plain one, one token at a time.

    python benchmarks/head.py [--hidden 8192] [--rows 32000] [--threads 2] [--rounds 15]

Random weights and hidden states: the greatest of random logits stands out less than that of a trained model, so the
share of tokens that need the plain product after all is an upper one. Both heads are run in turn on the same token, in
random order; the ratio is the median over rounds of int8 seconds / plain seconds. Every token must be that of the plain
head.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time

import torch
from _report import Bar, print_report, table
from torch import nn

from remote_modules.model.head import Int8Head

WEIGHT_STD = 0.02


def measure(hidden: int, rows: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(hidden, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    for part in plain.weight.split(4096):
        part.copy_(torch.randn(part.shape, generator=generator) * WEIGHT_STD)
    coded = Int8Head(plain)
    heads = {"plain": plain, "int8": coded}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first warms up
            hidden_states = torch.randn(1, 1, hidden, generator=generator).bfloat16()
            tokens = {}
            for name in order.sample(sorted(heads), len(heads)):
                began_s = time.perf_counter()
                tokens[name] = int(heads[name](hidden_states).argmax())
                if number:
                    seconds[name].append(time.perf_counter() - began_s)
            if tokens["plain"] != tokens["int8"]:
                raise SystemExit(f"int8 chose token {tokens['int8']}, the plain head {tokens['plain']}")
    return {
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
        "int8_ms": 1e3 * statistics.median(seconds["int8"]),
        "ratio": statistics.median(int8 / full for int8, full in zip(seconds["int8"], seconds["plain"], strict=True)),
        "plain_products": coded.num_full / (rounds + 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="the LM head with int8 weights against the plain one")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = measure(options.hidden, options.rows, options.rounds)
    cells = [f"{value:.3g}" for value in figures.values()]
    head = ["plain, ms", "int8, ms", "int8 ÷ plain", "share of plain products"]
    bars = [Bar("int8 ÷ plain", figures["ratio"], "<=", 1.0)]
    return print_report({**vars(options), **figures}, bars, table(head, [cells]))


if __name__ == "__main__":
    sys.exit(main())
