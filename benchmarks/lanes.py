"""What opening a session costs over a slow link, and how long its tokens wait for the prompt of another session.

    python benchmarks/lanes.py [--rounds 5]

Three peers of the network laboratory (root), blocks that take next to no time. Arms in random order in each round: as
it is, and with hops dialled in turn and one connection for each peer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _lab import LabSwarm, Link, Netlab, build_llama, client_host
from _report import Bar, print_report, say, table
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.client import step
from remote_modules.client.call import CallArguments
from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.net.loop import shared_loop
from remote_modules.spans import Span

NUM_PEERS = 3
HIDDEN_SIZE = 1024
PROMPT_TOKENS = 512
RTT_S = 0.1
MBIT = 100
ARMS = ("in turn, one connection", "at once, prompts apart")
OPENING_BAR_RTT = 1.0  # of a session to peers that the client is connected to


@contextmanager
def arm(name: str) -> Iterator[None]:
    if name == ARMS[1]:
        yield
        return
    in_turn = mock.patch.object(Swarm, "dial_soon", return_value=None)
    with in_turn, mock.patch.object(step, "step_lane", return_value="step"):
        yield


def new_session(layers: Any) -> SessionState:
    return SessionState(layers._handle.swarm, Span(0, NUM_PEERS), lambda callback: callback())


async def take(session: SessionState, num_tokens: int) -> float:
    """Seconds of a step."""
    hidden = torch.randn(1, num_tokens, HIDDEN_SIZE)
    began_s = time.perf_counter()
    await session.step({"hidden_states": hidden}, CallArguments(rows=1, num_tokens=num_tokens))
    return time.perf_counter() - began_s


async def opening(session: SessionState) -> float:
    """Seconds that the first token takes longer than others."""
    first_s = await take(session, 1)
    others = [await take(session, 1) for _ in range(3)]
    await session.close()
    return first_s - statistics.median(others)


async def waiting(decoder: SessionState, prompter: SessionState) -> float:
    """The longest token of one session while another's prompt goes out, as a multiple of an undisturbed one."""
    await take(decoder, 8)
    alone_s = statistics.median([await take(decoder, 1) for _ in range(3)])
    await take(prompter, PROMPT_TOKENS)  # opens its connections, and TCP's windows
    prompt = asyncio.create_task(take(prompter, PROMPT_TOKENS))
    longest_s = 0.0
    while not prompt.done():
        longest_s = max(longest_s, await take(decoder, 1))
    await prompt
    await decoder.close()
    await prompter.close()
    return longest_s / alone_s


def measure(lab: Any, folder: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {
        name: {"opening": [], "opening again": [], "waiting": []} for name in ARMS
    }
    rng = Random(0)
    config = ClientConfig(hedge=False, connect_timeout_s=10.0)
    with LabSwarm(lab, folder, "tracker", announce_interval_s=5.0) as swarm:
        for number in range(NUM_PEERS):
            swarm.begin(f"peer{number}", blocks=f"{number}:{number + 1}")
        swarm.await_online()
        for number in range(rounds):
            for name in rng.sample(ARMS, len(ARMS)):
                say(f"round {number}, {name}")
                with (
                    arm(name),
                    client_host(lab, "client"),
                    RemoteSequential.from_swarm(folder, trackers=[swarm.url], mdns=False, config=config) as layers,
                ):
                    run = shared_loop().run
                    run(layers._handle.swarm.refresh())  # finding peers is another matter
                    found[name]["opening"].append(run(opening(new_session(layers))) / RTT_S)
                    found[name]["opening again"].append(run(opening(new_session(layers))) / RTT_S)
                    found[name]["waiting"].append(run(waiting(new_session(layers), new_session(layers))))
    return found


def report(found: dict[str, dict[str, list[float]]]) -> int:
    medians = {name: {what: statistics.median(each) for what, each in one.items()} for name, one in found.items()}
    rows = [
        (name, f"{one['opening']:.1f}", f"{one['opening again']:.1f}", f"{one['waiting']:.2f}")
        for name, one in medians.items()
    ]
    head = [
        "", "first session, round trips", "next one", "longest token during another's prompt ÷ undisturbed"
    ]  # fmt: skip
    bars = [Bar("a session adds, round trips", medians[ARMS[1]]["opening again"], "<=", OPENING_BAR_RTT)]
    return print_report({"lanes": found}, bars, table(head, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="opening a session, and waiting for another's prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hosts = dict.fromkeys(["tracker", "client", *(f"peer{number}" for number in range(NUM_PEERS))])
    with (
        tempfile.TemporaryDirectory(prefix="lanes-benchmark-") as folder,
        Netlab(hosts, default=Link(delay_ms=RTT_S * 500, mbit=MBIT)) as lab,
    ):
        build_llama(Path(folder), num_blocks=NUM_PEERS, hidden_size=HIDDEN_SIZE)
        return report(measure(lab, folder, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
