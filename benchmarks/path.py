"""The road of a token: hops that send their outputs on to each other, against hops that each answer the client.

    python benchmarks/path.py [--quick] [--peers 3 4 12] [--tokens 24] [--rounds 5]  # root, gcc and ../shared/netlab

Real processes on the emulated hosts of one laboratory; *paced* peers (`remote_modules.testing.pace`): each computes
tiny blocks of its own and then sleeps until the time of its GPU is over. All blocks together take 30 ms for a token, as
80 of Llama-70B do on three H200; its hidden state of 16 KiB is 2 KiB here, and rates are divided likewise.

Two clients of the same peers, with direct hops and without, decode greedily in turn, in random order in each round;
both must give the tokens of the local model. Without a limit of rates the *network share* is what a token takes beyond
the set time of the blocks, the client's own work among it, and is compared with N+1 one-way delays. With limits a token
is compared with its *physical limit*: set time, N+1 delays, and N+1 transfers of a hidden state. A delay is half the
time of a TCP handshake as measured between these hosts in the same run. Prints one line of JSON; markdown and progress
go to stderr; the exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
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
from _arms import Arm, ModelArm, RemoteArm, Sample, check_tokens, interleave, median_ratio, waterfall_of
from _lab import TRACKER_PORT, LabSwarm, Link, Netlab, build_llama, client_host
from _report import Bar, print_report, say, table
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, load
from remote_modules.testing.pace import Pace

NUM_BLOCKS = 12
HIDDEN_SIZE = 512
BLOCKS_S = 0.030  # all, for a token
STATE_BYTES = 4 * HIDDEN_SIZE
RATE_SCALE = 8192 * 2 / STATE_BYTES
PROMPT_TOKENS = 16
PREFILL_TOKENS = 200  # as long as a block's decode step
DIRECT, STAR = "direct", "by the client"


@dataclass(frozen=True, slots=True)
class Profile:
    """A network: ``mbit`` is the paper's; 0: without a limit."""

    mbit: float
    rtt_ms: float

    @property
    def name(self) -> str:
        rate = f"{self.mbit / 1000:g} Gbit/s" if self.mbit >= 1000 else f"{self.mbit:g} Mbit/s"
        return f"{rate if self.mbit else 'no limit'}, {self.rtt_ms:g} ms"

    def link(self) -> Any:
        return Link(delay_ms=self.rtt_ms / 2, mbit=self.mbit / RATE_SCALE)

    @property
    def transfer_s(self) -> float:
        """Of one token's hidden state."""
        return 8 * STATE_BYTES / (1e6 * self.mbit / RATE_SCALE) if self.mbit else 0.0


FREE = (Profile(0, 5), Profile(0, 100))
LIMITED = (Profile(1000, 5), Profile(100, 5), Profile(100, 100))
LIMIT_BARS = dict(zip(LIMITED, (0.90, 0.90, 0.95), strict=True))
SHARE_BAR = 1.10
STAR_PEERS, STAR_BAR = 4, 1.5


def limit_s(profile: Profile, peers: int, delay_s: float) -> float:
    """What a token takes at least: the blocks, and N+1 delays and transfers."""
    return BLOCKS_S + (peers + 1) * (delay_s + profile.transfer_s)


def shares(peers: int) -> list[str]:
    cuts = [round(number * NUM_BLOCKS / peers) for number in range(peers + 1)]
    return [f"{start}:{end}" for start, end in itertools.pairwise(cuts)]


def one_way_s(address: tuple[str, int]) -> float:
    """Half the time of a TCP handshake, median."""
    found = []
    for _ in range(15):
        began_s = time.perf_counter()
        with socket.create_connection(address, timeout=5.0):
            found.append(time.perf_counter() - began_s)
    return statistics.median(found) / 2


def set_links(lab: Any, swarm: LabSwarm, profile: Profile) -> None:
    for one, other in itertools.combinations(["tracker", "client", *swarm.peers], 2):
        lab.set_link(one, other, profile.link())


def compare(
    lab: Any, swarm: LabSwarm, profile: Profile, local: ModelArm, *, tokens: int, rounds: int
) -> dict[str, Any]:
    """Both arms over one network."""
    set_links(lab, swarm, profile)
    prompt = torch.randint(1, 128, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = local.decode(prompt, tokens).tokens
    with ExitStack() as stack:
        stack.enter_context(client_host(lab, "client"))
        delay_s = one_way_s((lab.ip["tracker"], TRACKER_PORT))
        arms = []
        for name in (DIRECT, STAR):
            config = ClientConfig(direct=name == DIRECT)
            model: Any = load(swarm.folder, trackers=[swarm.url], mdns=False, config=config)
            stack.enter_context(closing(model.model.layers))
            arms.append(RemoteArm(name, model, is_paced=True))

        def decode(arm: Arm) -> Sample:
            sample = arm.decode(prompt, tokens)
            check_tokens(arm, sample, expected)
            return sample

        samples = interleave(arms, decode, rounds, Random(0))
        forwarded = [arm.model.model.layers.stats().forwarded for arm in arms]
    if forwarded[0] < (len(swarm.peers) - 1) * (tokens - 2) * rounds or forwarded[1]:
        raise SystemExit(f"outputs went on directly {forwarded[0]} and {forwarded[1]} times")
    return figures(profile, len(swarm.peers), delay_s, arms, samples)


def figures(
    profile: Profile, peers: int, delay_s: float, arms: Sequence[RemoteArm], samples: dict[str, list[Sample]]
) -> dict[str, Any]:
    seconds = {name: [sample.token_s for sample in found] for name, found in samples.items()}
    token_s = {name: statistics.median(found) for name, found in seconds.items()}
    least_s = limit_s(profile, peers, delay_s)
    return {
        "network": profile.name,
        "peers": peers,
        "one_way_ms": round(1e3 * delay_s, 3),
        "limit_ms": round(1e3 * least_s, 2),
        "token_ms": {name: round(1e3 * found, 2) for name, found in token_s.items()},
        "rounds_ms": {name: [round(1e3 * one, 2) for one in found] for name, found in seconds.items()},
        "share_of_delays": round((token_s[DIRECT] - BLOCKS_S) / ((peers + 1) * delay_s), 4),
        "of_limit": {name: round(least_s / found, 4) for name, found in token_s.items()},
        "times_star": round(median_ratio(seconds[STAR], seconds[DIRECT]), 4),
        "waterfall": {arm.name: waterfall_of(arm.steps, token_s[arm.name]) for arm in arms},
    }


def run(peers: int, profiles: Sequence[Profile], *, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One swarm, over each network in turn."""
    hosts = [f"peer{number}" for number in range(peers)]
    pace = Pace(BLOCKS_S / NUM_BLOCKS, BLOCKS_S / NUM_BLOCKS / PREFILL_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        build_llama(Path(folder), num_blocks=NUM_BLOCKS, hidden_size=HIDDEN_SIZE)
        local = ModelArm("local", LlamaForCausalLM.from_pretrained(folder).eval())
        with (
            Netlab(dict.fromkeys(["tracker", "client", *hosts])) as lab,
            LabSwarm(lab, folder, "tracker") as swarm,
        ):
            for host, span in zip(hosts, shares(peers), strict=True):
                swarm.begin(host, pace, blocks=span)
            swarm.await_online()
            results = []
            for profile in profiles:
                results.append(compare(lab, swarm, profile, local, tokens=tokens, rounds=rounds))
                say(f"  {peers} peers, {profile.name}: {results[-1]['token_ms']}, limit {results[-1]['limit_ms']} ms")
            return results


def bars_of(results: Sequence[dict[str, Any]]) -> list[Bar]:
    bars = []
    limited = {profile.name: bar for profile, bar in LIMIT_BARS.items()}
    free = [profile.name for profile in FREE]
    for result in results:
        name = f"{result['peers']} peers, {result['network']}"
        if result["network"] in free and result["peers"] != STAR_PEERS:
            bars.append(Bar(f"{name}: network share / delays", result["share_of_delays"], "<=", SHARE_BAR))
        if result["network"] in free and result["peers"] == STAR_PEERS:
            bars.append(Bar(f"{name}: by the client / direct", result["times_star"], ">=", STAR_BAR))
        if result["network"] in limited and result["peers"] == 3:
            bars.append(Bar(f"{name}: limit / token", result["of_limit"][DIRECT], ">=", limited[result["network"]]))
    return bars


def markdown(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            result["peers"],
            result["network"],
            f"{result['one_way_ms']:.2f}",
            f"{result['limit_ms']:.1f}",
            *(f"{result['token_ms'][name]:.1f}" for name in (DIRECT, STAR)),
            *(f"{result['of_limit'][name]:.3f}" for name in (DIRECT, STAR)),
            f"{result['share_of_delays']:.3f}",
            f"{result['times_star']:.2f}",
        )
        for result in results
    ]
    head = ["peers", "network", "one way, ms", "limit, ms", "direct, ms/token", "by the client"]
    return table([*head, "limit ÷ direct", "÷ by the client", "share ÷ delays", "by the client ÷ direct"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="direct hops against hops that each answer the client, paced")
    parser.add_argument("--quick", action="store_true", help="three peers, 8 tokens, one round; bars do not count")
    parser.add_argument("--peers", type=int, nargs="+", default=[3, 4, 12])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.quick:
        options.peers, options.tokens, options.rounds = [3], 8, 1
    if not all(2 <= peers <= NUM_BLOCKS for peers in options.peers):
        parser.error(f"--peers takes numbers from 2 to {NUM_BLOCKS}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = []
    for peers in options.peers:
        profiles = (*FREE, *LIMITED) if peers == 3 else FREE
        results += run(peers, profiles, tokens=options.tokens, rounds=options.rounds)
    status = print_report(
        {"paced": True, "blocks_s": BLOCKS_S, "results": results}, bars_of(results), markdown(results)
    )
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
