"""What slower links, longer ways and longer texts cost a token (H3, H4 of the Petals paper), with paced peers.

    python benchmarks/networks.py [--quick] [--peers 3 12] [--tokens 6] [--rounds 5]  # root, gcc and ../shared/netlab

Real processes on the hosts of a network laboratory. All blocks of a token together take so long that a round trip of
100 ms is the same share of a token as in the paper (0.17 with three peers, 0.12 with twelve); hidden states are an
eighth as wide, and so are links, as in `path.py`. In each round all arms take turns in random order: the three networks
of the paper after a prompt of 128 tokens, the fastest one after 2,048 too, and the stages of the peers one after
another in this process. All must decode the local model's tokens. *Physical* is what the ratio of two networks can be
at best: set time, N+1 one-way delays and transfers. Prints one line of JSON; markdown and progress go to stderr; the
exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _arms import Arm, ModelArm, RemoteArm, StagesArm, check_tokens, median_ratio
from _lab import LabSwarm, Netlab, build_llama, client_host
from _report import Bar, print_report, say, table
from path import HIDDEN_SIZE, LIMITED, NUM_BLOCKS, Profile, set_links, shares
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.testing.pace import Pace

FAST, SLOW, FAR = LIMITED
BLOCKS_S = {3: 0.58, 12: 0.82}  # of a token, by peers
PROMPT, LONG_PROMPT = 128, 2048
PREFILL_TOKENS = 2000  # as long as a block's decode step, so that prompts cost little time
ONE_PROCESS = "stages in one process"
LATENCY_BARS, ONE_PROCESS_BARS = {3: 0.80, 12: 0.60}, {FAST.name: 0.90, FAR.name: 0.60}


@dataclass(frozen=True, slots=True)
class Case:
    """One arm of a round."""

    name: str
    profile: Profile | None
    prompt: int


CASES = (
    *(Case(profile.name, profile, PROMPT) for profile in LIMITED),
    Case(f"{FAST.name}, {LONG_PROMPT} tokens", FAST, LONG_PROMPT),
    Case(ONE_PROCESS, None, PROMPT),
)


def physical(peers: int, profile: Profile) -> float:
    """Seconds of a token at best."""
    return BLOCKS_S[peers] + (peers + 1) * (profile.rtt_ms / 2e3 + profile.transfer_s)


def run(peers: int, *, tokens: int, rounds: int, cases: Sequence[Case] = CASES) -> dict[str, list[float]]:
    """Seconds of a token, by case."""
    hosts = [f"peer{number}" for number in range(peers)]
    pace = Pace(BLOCKS_S[peers] / NUM_BLOCKS, BLOCKS_S[peers] / NUM_BLOCKS / PREFILL_TOKENS)
    generator = torch.Generator().manual_seed(1)
    texts = {size: torch.randint(1, 128, (size,), generator=generator).tolist() for size in (PROMPT, LONG_PROMPT)}
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        build_llama(Path(folder), num_blocks=NUM_BLOCKS, hidden_size=HIDDEN_SIZE)
        local = ModelArm("local", LlamaForCausalLM.from_pretrained(folder).eval())
        expected = {size: local.decode(text, tokens).tokens for size, text in texts.items()}
        stages = StagesArm(Path(folder), shares(peers), local.model, pace)
        with (
            Netlab(dict.fromkeys(["tracker", "client", *hosts])) as lab,
            LabSwarm(lab, folder, "tracker") as swarm,
        ):
            for host, span in zip(hosts, shares(peers), strict=True):
                swarm.begin(host, pace, blocks=span)
            swarm.await_online()
            with client_host(lab, "client"):
                model: Any = load(swarm.folder, trackers=[swarm.url], mdns=False)
                with closing(model.model.layers):
                    remote = RemoteArm("remote", model, is_paced=True)
                    rng = Random(0)
                    for number in range(rounds + 1):  # the first warms up
                        for case in rng.sample(list(cases), len(cases)):
                            arm: Arm = stages if case.profile is None else remote
                            if case.profile is not None:
                                set_links(lab, swarm, case.profile)
                            sample = arm.decode(texts[case.prompt], tokens)
                            check_tokens(arm, sample, expected[case.prompt])
                            if number:
                                seconds[case.name].append(sample.token_s)
                            say(f"  {peers} peers, {case.name}: {1e3 * sample.token_s:.1f} ms")
    return seconds


def ratios(peers: int, seconds: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Of two networks, two lengths, and one process to each of two networks: measured, bar, and physical."""

    def ratio(base: str, other: str, bar: float, best: float) -> tuple[float, float, float]:
        return round(median_ratio(seconds[base], seconds[other]), 4), bar, round(best, 4)

    fast, slow, far = (physical(peers, profile) for profile in LIMITED)
    found = {
        "bandwidth": ratio(FAST.name, SLOW.name, 0.97, fast / slow),
        "latency": ratio(SLOW.name, FAR.name, LATENCY_BARS[peers], slow / far),
        "length": ratio(FAST.name, CASES[3].name, 0.90, 1.0),
    }
    for profile, best in ((FAST, fast), (FAR, far)):
        bar = ONE_PROCESS_BARS[profile.name]
        found[f"one process, {profile.name}"] = ratio(ONE_PROCESS, profile.name, bar, BLOCKS_S[peers] / best)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="what networks, hops and length cost a token, paced")
    parser.add_argument("--quick", action="store_true", help="three peers, 3 tokens, one round; bars do not count")
    parser.add_argument("--peers", type=int, nargs="+", default=[3, 12], choices=sorted(BLOCKS_S))
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.quick:
        options.peers, options.tokens, options.rounds = [3], 3, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results, bars, rows = [], [], []
    for peers in options.peers:
        seconds = run(peers, tokens=options.tokens, rounds=options.rounds)
        found = ratios(peers, seconds)
        results.append({"peers": peers, "blocks_s": BLOCKS_S[peers], "seconds": seconds, "ratios": found})
        bars += [Bar(f"{peers} peers: {name}", ratio, ">=", bar) for name, (ratio, bar, _) in found.items()]
        rows += [(peers, name, f"{statistics.median(one):.3f}", "", "") for name, one in seconds.items()]
        rows += [(peers, name, "", f"{ratio:.3f}", f"{best:.3f}") for name, (ratio, _, best) in found.items()]
    head = ["peers", "", "s/token", "ratio", "physical"]
    status = print_report({"paced": True, "results": results}, bars, table(head, rows))
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
