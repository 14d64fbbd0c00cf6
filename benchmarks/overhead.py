"""Cost of hops: decode through 1, 2 and 3 peers on loopback against the same model run locally.

    python benchmarks/overhead.py [--hidden 256 1024] [--peers 1 2 3] [--prefix 128] [--tokens 64] [--rounds 9]

Peers are processes that hold equal shares of a random fp32 llama of eight blocks; client and peers use one torch thread
each. Bursts of greedy ``generate`` after a prefix run in turn, all arms in random order in each round; all must give
the same tokens. ``ratio`` is remote / local seconds for each token after the first, median of each round's ratio: 1.0
means that remoteness is free. The waterfall of a token is from the timings in the replies; *client* is what passes
outside of requests, embeddings and head among it. Prints one line of JSON; markdown goes to stderr. The exit status is
1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _arms import RemoteArm, Sample, interleave, median_ratio, waterfall_of
from _report import Bar, print_report, say, table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.testing import LocalSwarm

NUM_BLOCKS = 8
BARS = {256: {1: 1.25, 2: 1.45, 3: 1.65}, 1024: {1: 1.08, 2: 1.12, 3: 1.16}}  # by hidden size and peers
LOCAL = "local"


def build_checkpoint(folder: Path, hidden_size: int) -> None:
    """A random llama of 8 blocks in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def equal_spans(peers: int) -> list[str]:
    cuts = [round(number * NUM_BLOCKS / peers) for number in range(peers + 1)]
    return [f"{start}:{end}" for start, end in zip(cuts, cuts[1:], strict=False)]


@dataclass
class GenerateArm(RemoteArm):
    """Decodes as users do: with ``generate``, which gives an attention mask at each step."""

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        ids, seconds, began_s = torch.tensor([list(prompt)]), [], time.perf_counter()

        def note(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
            seconds.append(time.perf_counter() - began_s)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens + 1,
            do_sample=False,
            stopping_criteria=[note],
        )
        if self.name != LOCAL:
            self.steps += self.model.model.layers.stats().waterfall[-tokens:]
        return Sample(seconds[0], (seconds[-1] - seconds[0]) / tokens, tuple(output[0, len(prompt) :].tolist()))


def name_of(peers: int) -> str:
    return f"{peers} peer{'s' if peers > 1 else ''}"


def measure(
    hidden_size: int, peers: Sequence[int], *, prefix: int, tokens: int, rounds: int, mode: Any = "process"
) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead-")))
        build_checkpoint(folder, hidden_size)
        arms = [GenerateArm(LOCAL, LlamaForCausalLM.from_pretrained(folder).eval())]
        for number in peers:
            spans = equal_spans(number)
            swarm = stack.enter_context(LocalSwarm(folder, spans=spans, mode=mode, num_threads=1))
            model: Any = load(folder, trackers=swarm.trackers, mdns=False)
            stack.enter_context(closing(model.model.layers))
            arms.append(GenerateArm(name_of(number), model))
        prompt = torch.randint(1, 1024, (prefix,), generator=torch.Generator().manual_seed(1)).tolist()
        samples = interleave(arms, lambda arm: arm.decode(prompt, tokens), rounds, Random(0))
        seconds = {name: [sample.token_s for sample in found] for name, found in samples.items()}
        return {
            "hidden": hidden_size,
            "blocks": NUM_BLOCKS,
            "prefix": prefix,
            "tokens": tokens,
            "rounds": rounds,
            "local_ms_per_token": round(1e3 * statistics.median(seconds[LOCAL]), 3),
            "peers": {
                str(number): figures(arm, seconds) for number, arm in zip(peers, arms[1:], strict=True)
            },
        }  # fmt: skip


def figures(arm: GenerateArm, seconds: dict[str, list[float]]) -> dict[str, Any]:
    found, local = seconds[arm.name], seconds[LOCAL]
    token_s = statistics.median(found)
    ratios = [one / other for one, other in zip(found, local, strict=True)]
    return {
        "remote_ms_per_token": round(1e3 * token_s, 3),
        "ratio": round(median_ratio(found, local), 4),
        "least_ratio": round(min(ratios), 4),
        "most_ratio": round(max(ratios), 4),
        "added_us": round(1e6 * statistics.median(one - other for one, other in zip(found, local, strict=True))),
        "waterfall": [
            {"hop": row["hop"], **{f"{part}_us": round(1e6 * row[part]) for part in ("wire", "queue", "compute")}}
            for row in waterfall_of([step for step in arm.steps if step[0].num_tokens == 1], token_s)
        ],
    }


def bars_of(results: Sequence[dict[str, Any]]) -> list[Bar]:
    return [
        Bar(f"hidden {result['hidden']}, {name_of(int(peers))}: remote / local", found["ratio"], "<=", bar)
        for result in results
        for peers, found in result["peers"].items()
        if (bar := BARS.get(result["hidden"], {}).get(int(peers))) is not None
    ]


def markdown(results: Sequence[dict[str, Any]]) -> str:
    rows: list[tuple[object, ...]] = []
    hops: list[tuple[object, ...]] = []
    for result in results:
        for peers, found in result["peers"].items():
            head = (result["hidden"], peers)
            times = (f"{result['local_ms_per_token']:.2f}", f"{found['remote_ms_per_token']:.2f}")
            spread = f"{found['least_ratio']:.3f} to {found['most_ratio']:.3f}"
            rows.append((*head, *times, f"{found['ratio']:.3f}", spread, round(found["added_us"] / int(peers))))
            parts = ("hop", "wire_us", "queue_us", "compute_us")
            hops += [(*head, *(row[part] for part in parts)) for row in found["waterfall"]]
    first = ["hidden size", "peers", "local ms/token", "remote ms/token", "remote ÷ local", "of rounds", "a hop, µs"]
    second = ["hidden size", "peers", "hop of a token", "wire, µs", "queue", "compute"]
    return f"{table(first, rows)}\n\n{table(second, hops)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="cost of hops on loopback")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--peers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prefix", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if not all(1 <= peers <= NUM_BLOCKS for peers in options.peers) or len(set(options.peers)) < len(options.peers):
        parser.error(f"--peers takes different numbers from 1 to {NUM_BLOCKS}")
    return options


def main() -> int:
    options = parse(None)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = []
    for hidden_size in options.hidden:
        say(f"== hidden {hidden_size}")
        results.append(
            measure(hidden_size, options.peers, prefix=options.prefix, tokens=options.tokens, rounds=options.rounds)
        )
    return print_report({"results": results}, bars_of(results), markdown(results))


if __name__ == "__main__":
    sys.exit(main())
