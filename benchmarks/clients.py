"""Many clients through one peer that holds all blocks, against what a batch of as many rows gains locally.

    python benchmarks/clients.py [--hidden 256 1024] [--clients 8] [--prefix 128] [--tokens 32] [--rounds 9] [--ragged]

The peer is a process that holds a random fp32 llama of eight blocks; it and the clients use one torch thread each. The
clients are sessions of one process, driven without ``generate``, since eight Python clients would be what limits two
cores. Bursts of decode steps after a prefix run in turn, all arms in random order in each round: one local row, as many
local rows as clients in one batch, one client, all clients at once. ``share`` is (all clients' tokens/s / one client's)
/ (local batch's tokens/s / one local row's), median of each round's: 1.0 means that sessions gain all that rows of a
batch do. ``fairness`` is what the slowest client has done when the fastest is through. Outputs are compared with those
that each client gets alone. With ``--ragged`` prefixes are from an eighth of ``--prefix`` to all of it. Prints one line
of JSON; markdown goes to stderr. The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _report import Bar, print_report, say, table
from overhead import build_checkpoint
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import RemoteSequential
from remote_modules.client.call import CallArguments
from remote_modules.model.stack import cache_argument
from remote_modules.testing import LocalSwarm

SHARE_BAR, FAIRNESS_BAR, OUTPUT_BAR = 0.85, 0.8, 6e-5
ONE, ALL = "one client", "all clients"
ONE_ROW, ALL_ROWS = "one local row", "local batch"


@dataclass(frozen=True, slots=True)
class Text:
    """What one client runs: hidden states of a prefix ``[1, P, D]`` and of each step ``[1, 1, D]``."""

    prefix: torch.Tensor
    steps: list[torch.Tensor]


@dataclass
class Burst:
    """What came of one run of an arm.

    Attributes:
        tokens_per_s: of all rows or clients.
        fairness: steps of the slowest client, by those of the fastest, when that was through.
        outputs: of each client's steps.
    """

    tokens_per_s: float
    fairness: float = 1.0
    outputs: list[torch.Tensor] = field(default_factory=list)


def texts_of(clients: int, hidden_size: int, prefix: int, tokens: int, *, is_ragged: bool) -> list[Text]:
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, 1, generator=generator)
    least = max(1, prefix // 8)
    lengths = [
        prefix - (prefix - least) * number // max(1, clients - 1) if is_ragged else prefix for number in range(clients)
    ]
    return [Text(draw(length, hidden_size), [draw(1, hidden_size) for _ in range(tokens)]) for length in lengths]


def run_rows(owner: Any, texts: Sequence[Text]) -> Burst:
    """Of one length, as one local batch."""
    length = max(text.prefix.shape[1] for text in texts)
    prefix = torch.cat(
        [torch.nn.functional.pad(text.prefix, (0, 0, length - text.prefix.shape[1], 0)) for text in texts]
    )
    steps = [torch.cat(rows) for rows in zip(*(text.steps for text in texts), strict=True)]
    call: dict[str, Any] = {cache_argument(owner) or "": DynamicCache(config=owner.config), "use_cache": True}
    with torch.no_grad():
        owner(inputs_embeds=prefix, **call)
        began_s = time.perf_counter()
        for step in steps:
            owner(inputs_embeds=step, **call)
    return Burst(len(texts) * len(steps) / (time.perf_counter() - began_s))


def run_clients(layers: RemoteSequential, texts: Sequence[Text]) -> Burst:
    """Each text in a session of its own, all at once."""
    sessions = [layers.session() for _ in texts]
    try:
        for session, text in zip(sessions, texts, strict=True):
            session.step(text.prefix)
        return sessions[0]._io.run(_decode([session._state for session in sessions], texts))
    finally:
        for session in sessions:
            session.close()


async def _decode(states: Sequence[Any], texts: Sequence[Text]) -> Burst:
    call, num_steps = CallArguments(rows=1, num_tokens=1), len(texts[0].steps)
    outputs: list[list[torch.Tensor]] = [[] for _ in texts]
    slowest: list[int] = []

    async def client(number: int) -> None:
        for step in texts[number].steps:
            found = await states[number].step({"hidden_states": step}, call)
            outputs[number].append(found["hidden_states"])
        slowest.append(min(map(len, outputs)))

    began_s = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(len(texts))))
    seconds = time.perf_counter() - began_s
    return Burst(len(texts) * num_steps / seconds, slowest[0] / num_steps, [torch.cat(found) for found in outputs])


def difference(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest, of the largest value."""
    return max(
        float((found - alone).abs().max() / alone.abs().max())
        for found, alone in zip(outputs, expected, strict=True)
    )  # fmt: skip


def measure(
    hidden_size: int,
    clients: int,
    *,
    prefix: int,
    tokens: int,
    rounds: int,
    is_ragged: bool = False,
    mode: Any = "process",
) -> dict[str, Any]:
    texts = texts_of(clients, hidden_size, prefix, tokens, is_ragged=is_ragged)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clients-")))
        build_checkpoint(folder, hidden_size)
        owner = LlamaForCausalLM.from_pretrained(folder).eval().model
        swarm = stack.enter_context(LocalSwarm(folder, spans=["0:8"], mode=mode, num_threads=1))
        layers = stack.enter_context(RemoteSequential.from_swarm(folder, trackers=swarm.trackers, mdns=False))
        alone = [run_clients(layers, [text]).outputs[0] for text in texts]
        arms: dict[str, Any] = {
            ONE_ROW: lambda: run_rows(owner, texts[:1]),
            ALL_ROWS: lambda: run_rows(owner, texts),
            ONE: lambda: run_clients(layers, texts[:1]),
            ALL: lambda: run_clients(layers, texts),
        }
        for run in arms.values():
            run()
        bursts: dict[str, list[Burst]] = {name: [] for name in arms}
        rng = Random(0)
        for _ in range(rounds):
            for name in rng.sample(list(arms), len(arms)):
                bursts[name].append(arms[name]())
    worst = max(difference(burst.outputs, alone) for burst in bursts[ALL])
    return {
        "hidden": hidden_size,
        "clients": clients,
        "prefix": prefix,
        "is_ragged": is_ragged,
        "tokens": tokens,
        "rounds": rounds,
        "output_difference": worst,
        **figures({name: [burst.tokens_per_s for burst in found] for name, found in bursts.items()}),
        "fairness": round(statistics.median(burst.fairness for burst in bursts[ALL]), 4),
    }


def figures(speeds: dict[str, list[float]]) -> dict[str, Any]:
    gains = [many / one for many, one in zip(speeds[ALL], speeds[ONE], strict=True)]
    local = [many / one for many, one in zip(speeds[ALL_ROWS], speeds[ONE_ROW], strict=True)]
    shares = [gain / row for gain, row in zip(gains, local, strict=True)]
    return {
        "tokens_per_s": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
        "gain": round(statistics.median(gains), 3),
        "local_gain": round(statistics.median(local), 3),
        "share": round(statistics.median(shares), 4),
        "least_share": round(min(shares), 4),
        "most_share": round(max(shares), 4),
    }


def bars_of(results: Sequence[dict[str, Any]]) -> list[Bar]:
    bars = []
    for result in results:
        name = f"hidden {result['hidden']}, {result['clients']} clients"
        bars += [
            Bar(f"{name}: gain / that of a local batch", result["share"], ">=", SHARE_BAR),
            Bar(f"{name}: slowest / fastest", result["fairness"], ">=", FAIRNESS_BAR),
            Bar(f"{name}: difference from solo", result["output_difference"], "<=", OUTPUT_BAR),
        ]
    return bars


def markdown(results: Sequence[dict[str, Any]]) -> str:
    head = ["hidden size", "clients", "prefix", *(f"{name}, tokens/s" for name in (ONE_ROW, ALL_ROWS, ONE, ALL))]
    head += ["local gain", "clients' gain", "share", "of rounds", "slowest ÷ fastest", "difference"]
    rows = [
        (result["hidden"], result["clients"], f"{'≤ ' if result['is_ragged'] else ''}{result['prefix']}",
         *(result["tokens_per_s"][name] for name in (ONE_ROW, ALL_ROWS, ONE, ALL)),
         f"{result['local_gain']:.2f}", f"{result['gain']:.2f}", f"{result['share']:.3f}",
         f"{result['least_share']:.3f} to {result['most_share']:.3f}", f"{result['fairness']:.3f}",
         f"{result['output_difference']:.1e}")
        for result in results
    ]  # fmt: skip
    return table(head, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="many clients through one peer")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ragged", action="store_true")
    options = parser.parse_args(arguments)
    if min(options.clients, options.prefix, options.tokens, options.rounds) < 1:
        parser.error("--clients, --prefix, --tokens and --rounds take 1 or more")
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
            measure(
                hidden_size,
                options.clients,
                prefix=options.prefix,
                tokens=options.tokens,
                rounds=options.rounds,
                is_ragged=options.ragged,
            )
        )
    return print_report({"results": results}, bars_of(results), markdown(results))


if __name__ == "__main__":
    sys.exit(main())
