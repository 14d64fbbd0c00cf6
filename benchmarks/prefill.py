"""A long prompt through three hops over a slow network: whole or in chunks, by the client or directly.

    python benchmarks/prefill.py [--quick] [--prompt 512] [--output 32] [--chunk 32] [--rounds 5]  # as path.py

Real processes on the emulated hosts of one laboratory, *paced* as in `path.py`: 30 ms for a token or a short chunk, and
110 ms more for 512 tokens, as Llama-70B on three H200; hidden states are an eighth as wide, and so is the network of
100 Mbit/s and 100 ms. Arms take turns in random order in each round, and those that are exact must give the local
model's tokens; chunks and whole prompts may differ by rounding. *Time to first token* is compared with one transfer of
the prompt's hidden states, N+1 one-way delays and the set time of all blocks. Prints one line of JSON; markdown and
progress go to stderr; the exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _arms import ModelArm, RemoteArm, Sample, check_tokens, interleave, median_ratio
from _lab import TRACKER_PORT, LabSwarm, Netlab, build_llama, client_host
from _report import Bar, print_report, say, table
from path import BLOCKS_S, HIDDEN_SIZE, NUM_BLOCKS, Profile, one_way_s, shares
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, load
from remote_modules.testing.pace import Pace

PEERS = 3
TOKEN_S = 0.110 / 512  # of all blocks, beyond BLOCKS_S
NETWORK = Profile(100, 100)
STAR, DIRECT, CHUNKS, CODED = "whole, by the client", "whole, direct", "chunks, direct", "chunks, direct, int8"


@dataclass
class PromptArm(RemoteArm):
    """Attributes: is_exact: whether its tokens are those of the local model."""

    is_exact: bool = True

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        sample = super().decode(prompt, tokens)
        return sample if self.is_exact else replace(sample, tokens=None)


def configs(chunk: int) -> dict[str, ClientConfig]:
    return {
        STAR: ClientConfig(direct=False),
        DIRECT: ClientConfig(),
        CHUNKS: ClientConfig(prefill_chunk_tokens=chunk),
        CODED: ClientConfig(prefill_chunk_tokens=chunk, wire="int8"),
    }


def limit_s(prompt: int, delay_s: float) -> float:
    """Least time to the first token: one transfer, N+1 delays, and the blocks."""
    return prompt * NETWORK.transfer_s + (PEERS + 1) * delay_s + BLOCKS_S + prompt * TOKEN_S


def run(prompt: int, output: int, chunk: int, rounds: int) -> tuple[dict[str, list[Sample]], float]:
    """Samples by arm, and a one-way delay."""
    hosts = [f"peer{number}" for number in range(PEERS)]
    pace = Pace(BLOCKS_S / NUM_BLOCKS, TOKEN_S / NUM_BLOCKS)
    ids = torch.randint(1, 128, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        build_llama(Path(folder), num_blocks=NUM_BLOCKS, hidden_size=HIDDEN_SIZE)
        expected = ModelArm("local", LlamaForCausalLM.from_pretrained(folder).eval()).decode(ids, output - 1).tokens
        lab = stack.enter_context(Netlab(dict.fromkeys(["tracker", "client", *hosts]), default=NETWORK.link()))
        swarm = stack.enter_context(LabSwarm(lab, folder, "tracker"))
        for host, span in zip(hosts, shares(PEERS), strict=True):
            swarm.begin(host, pace, blocks=span)
        swarm.await_online()
        stack.enter_context(client_host(lab, "client"))
        delay_s = one_way_s((lab.ip["tracker"], TRACKER_PORT))
        arms = []
        for name, config in configs(chunk).items():
            model: Any = load(folder, trackers=[swarm.url], mdns=False, config=config)
            stack.enter_context(closing(model.model.layers))
            arms.append(PromptArm(name, model, is_paced=True, is_exact=name != CODED))

        def decode(arm: Any) -> Sample:
            sample: Sample = arm.decode(ids, output - 1)
            check_tokens(arm, sample, expected)
            say(f"  {arm.name}: first token {sample.prefill_s:.3f} s, then {1e3 * sample.token_s:.1f} ms each")
            return sample

        return interleave(arms, decode, rounds, Random(0)), delay_s


def main() -> int:
    parser = argparse.ArgumentParser(description="a long prompt over a slow network, paced")
    parser.add_argument("--quick", action="store_true", help="short prompt and output, one round; bars do not count")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.quick:
        options.prompt, options.output, options.rounds = 128, 3, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    samples, delay_s = run(options.prompt, options.output, options.chunk, options.rounds)
    first = {name: [sample.prefill_s for sample in found] for name, found in samples.items()}
    whole = {
        name: [one.prefill_s + (options.output - 1) * one.token_s for one in found] for name, found in samples.items()
    }
    least_s = limit_s(options.prompt, delay_s)
    bars = [
        Bar("whole answer: chunks, direct / whole, by the client", median_ratio(whole[CHUNKS], whole[STAR]), "<=", 0.6),
        Bar("first token: chunks, direct / whole, by the client", median_ratio(first[CHUNKS], first[STAR]), "<=", 0.40),
        Bar("first token: the same with int8", median_ratio(first[CODED], first[STAR]), "<=", 0.25),
        Bar("first token: chunks, direct / limit", statistics.median(first[CHUNKS]) / least_s, "<=", 1.25),
    ]
    rows = [
        (
            name,
            f"{statistics.median(first[name]):.3f}",
            f"{min(first[name]):.3f} to {max(first[name]):.3f}",
            f"{statistics.median(whole[name]):.2f}",
            f"{median_ratio(first[name], first[STAR]):.3f}",
            f"{median_ratio(whole[name], whole[STAR]):.3f}",
        )
        for name in samples
    ]
    head = ["prompt", "first token, s", "of rounds", "answer, s", "first ÷ by the client", "answer ÷ by the client"]
    result = {"paced": True, "options": vars(options), "one_way_s": delay_s, "limit_s": least_s, "first_s": first}
    status = print_report({**result, "answer_s": whole}, bars, table(head, rows) + f"\n\nlimit: {least_s:.3f} s.")
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
