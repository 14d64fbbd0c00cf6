"""Fourteen unequal peers on two continents against three equal ones, and against random routing (H5 of the paper).

    python benchmarks/continents.py [--quick] [--tokens 20] [--repeats 5]        # root, gcc and ../shared/netlab

Real processes on the emulated hosts of one laboratory; paced peers (`remote_modules.testing.pace`): each computes tiny
blocks of its own and then sleeps until the time of its GPU is over. All is at the paper's own scale: 70 blocks, times
and delays in true milliseconds; rates are divided as the hidden states are smaller.

* A block takes OVERHEAD + its bytes / the GPU's memory bandwidth. The overhead is what makes three A100 with blocks of
  int8 (2.44 GB) give the paper's 1.71 steps/s: the paper's GPUs were not bound by memory alone.
* equal: three A100 near the client, 1 Gbit/s, 5 ms.
* int8: 2 x 3060, 4 x 2080 Ti, 2 x 3090, 2 x A4000, 4 x A5000; spans by memory, 90 blocks in all. The client and nine
  peers are on one continent, five on the other: round trips of 10 and 100 ms, links of 100 to 1000 Mbit/s. Both 3060
  and two 2080 Ti accept no connections from outside: they announce, and must be routed around. 74 blocks of 70 are
  left, so there is little to choose from.
* 4 bit: the same peers with blocks of half the bytes, spans twice as long: here routes can be chosen, and are compared
  with random ones (at each block one of the peers that hold it, drawn anew for each session).

Steps/s after the first token, greedy decoding, medians over sessions, arms interleaved. The first session of each arm
meets peers that nobody has measured, and is left out. Prints one line of JSON; markdown and progress go to stderr.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _lab import Host, LabSwarm, Link, Netlab, build_llama, client_host
from _report import Bar, print_report, say, table
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.errors import NoRouteError
from remote_modules.plan.routing import Candidate, Hop, find_route
from remote_modules.spans import Span, missing_spans
from remote_modules.testing.pace import Pace

NUM_BLOCKS = 70
HIDDEN_SIZE = 256
INT8_GB, FOUR_BIT_GB = 2.44, 1.22  # a block of BLOOM-176B
PAPER_STEP_S = 1 / 1.71  # three A100, 1 Gbit/s, < 5 ms
EQUAL_RTT_S = 0.005
A100_GB_PER_S = 2039.0
OVERHEAD_S = (PAPER_STEP_S - 3 * EQUAL_RTT_S) / NUM_BLOCKS - INT8_GB / A100_GB_PER_S
PREFILL_TOKENS = 200  # as long as a block's decode step
NEAR_RTT_MS, FAR_RTT_MS = 10.0, 100.0
RATE_SCALE = 14336 * 2 / (HIDDEN_SIZE * 4)  # bytes of the paper's hidden state / bytes of ours


@dataclass(frozen=True, slots=True)
class Gpu:
    """One peer. ``memory`` is the number of int8 blocks that fit beside a KV cache."""

    name: str
    gb_per_s: float
    memory: int
    mbit: float
    is_far: bool = False
    is_closed: bool = False

    def pace(self, block_gb: float) -> Pace:
        block_s = OVERHEAD_S + block_gb / self.gb_per_s
        return Pace(block_s, block_s / PREFILL_TOKENS)


A100 = Gpu("A100", A100_GB_PER_S, 0, 1000)
# In the order of their spans, int8: open ones cover the model once, closed ones hold what others hold too.
GPUS = (
    Gpu("A5000", 768, 9, 1000),
    Gpu("A5000", 768, 9, 500),
    Gpu("A5000", 768, 9, 300),
    Gpu("3090", 936, 9, 500),
    Gpu("A4000", 448, 6, 200),
    Gpu("2080Ti", 616, 4, 100),
    Gpu("A5000", 768, 9, 1000, is_far=True),
    Gpu("3090", 936, 9, 500, is_far=True),
    Gpu("A4000", 448, 6, 200, is_far=True),
    Gpu("2080Ti", 616, 4, 100, is_far=True),
    Gpu("3060", 360, 4, 100, is_closed=True),
    Gpu("2080Ti", 616, 4, 300, is_closed=True),
    Gpu("2080Ti", 616, 4, 100, is_closed=True),
    Gpu("3060", 360, 4, 100, is_far=True, is_closed=True),
)


def spans_of(gpus: Sequence[Gpu], times: int, num_blocks: int = NUM_BLOCKS) -> list[Span]:
    """One after another and around again, in the order of ``gpus``, cut short at the end of the model; a remainder
    that is too short to be a span's other half goes to the front.

    Args:
        times: how many int8 blocks' room a block's room is.
    """
    spans, start = [], 0
    for gpu in gpus:
        length = min(num_blocks, gpu.memory * times)
        if start + length > num_blocks:
            length_left = num_blocks - start
            spans.append(Span(num_blocks - length, num_blocks) if length_left else Span(0, length))
            start = 0 if length_left else length
        else:
            spans.append(Span(start, start + length))
            start += length
    return spans


def random_route(
    blocks: Span, candidates: Sequence[Candidate], demand: object, *, rng: Any, **_: Any
) -> tuple[Hop, ...]:
    """At each block one of the peers that hold it, to the end of its span."""
    if missing := missing_spans((candidate.span for candidate in candidates), blocks):
        raise NoRouteError(f"no route for blocks {missing}", missing=missing)
    hops, block = [], blocks.start
    while block < blocks.end:
        chosen = rng.choice(sorted((c for c in candidates if block in c.span), key=lambda c: c.peer_id))
        end = min(blocks.end, chosen.span.end)
        hops.append(Hop(chosen.peer_id, Span(block, end)))
        block = end
    return tuple(hops)


@contextmanager
def random_routing() -> Iterator[None]:
    """All clients of this process take `random_route`."""
    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith("remote_modules.client.") and getattr(module, "find_route", None) is find_route
    ]
    if not users:
        raise SystemExit("nobody in remote_modules.client uses plan.routing.find_route any more")
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "find_route", random_route))
        yield


@dataclass(slots=True)
class Session:
    steps_per_s: float
    first_token_s: float
    route: tuple[Hop, ...]


class Arm:
    """A client of one swarm, with our routing or the random one."""

    def __init__(self, name: str, swarm: LabSwarm, expected: torch.Tensor, *, is_random: bool = False) -> None:
        self.name = name
        self.swarm = swarm
        self.sessions: list[Session] = []
        self._expected = expected
        self._is_random = is_random
        self._model: Any = load(swarm.folder, trackers=[swarm.url], mdns=False)

    def run(self, tokens: torch.Tensor) -> None:
        """One generation."""
        times: list[float] = []

        def note(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        began_s = time.perf_counter()
        num_new = self._expected.shape[1] - tokens.shape[1]
        with random_routing() if self._is_random else nullcontext():
            output = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_new,
                do_sample=False,
                stopping_criteria=[note],
            )
        if not torch.equal(output, self._expected):
            raise SystemExit(f"{self.name}: tokens differ")
        rate = (len(times) - 1) / (times[-1] - times[0])
        self.sessions.append(Session(rate, times[0] - began_s, self._model.model.layers.stats().route))
        hops = " ".join(f"{self.host_of(hop)}[{hop.span}]" for hop in self.sessions[-1].route)
        say(f"  {self.name}: {rate:.2f} steps/s, first token {times[0] - began_s:.1f} s, {hops}")

    def host_of(self, hop: Hop) -> str:
        return next(host for host, peer_id in self.swarm.peer_ids.items() if peer_id == hop.peer_id)

    @property
    def steps_per_s(self) -> float:
        """Median, the first session left out."""
        return statistics.median(session.steps_per_s for session in self.sessions[1:] or self.sessions)

    def close(self) -> None:
        self._model.model.layers.close()


def hosts_and_links(gpus: Sequence[Gpu]) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """Hosts by name, and the links that differ from the default (10 ms)."""
    hosts: dict[str, Any] = {"client": None, "tracker-equal": None, "tracker-int8": None, "tracker-4bit": None}
    links = {}
    for number in range(3):
        hosts[f"equal{number}"] = _host(A100)
        links["client", f"equal{number}"] = Link(delay_ms=1e3 * EQUAL_RTT_S / 2)
    for weights in ("int8", "4bit"):
        for number, gpu in enumerate(gpus):
            name = f"{weights}-{gpu.name.lower()}-{number}"
            hosts[name] = _host(gpu)
            for near in ("client", f"tracker-{weights}") if gpu.is_far else ():
                links[near, name] = Link(delay_ms=FAR_RTT_MS / 2)
    return hosts, links


def _host(gpu: Gpu) -> Any:
    rate = Link(mbit=gpu.mbit / RATE_SCALE)
    return Host(up=rate, down=rate, nat=gpu.is_closed)


def start_swarms(lab: Any, folder: str, gpus: Sequence[Gpu]) -> dict[str, LabSwarm]:
    swarms = {
        name: LabSwarm(lab, folder, f"tracker-{name}", announce_interval_s=5.0) for name in ("equal", "int8", "4bit")
    }
    for number in range(3):
        start, end = NUM_BLOCKS * number // 3, NUM_BLOCKS * (number + 1) // 3
        swarms["equal"].begin(f"equal{number}", A100.pace(INT8_GB), blocks=f"{start}:{end}")
    for weights, times, block_gb in (("int8", 1, INT8_GB), ("4bit", 2, FOUR_BIT_GB)):
        for number, (gpu, span) in enumerate(zip(gpus, spans_of(gpus, times), strict=True)):
            swarms[weights].begin(f"{weights}-{gpu.name.lower()}-{number}", gpu.pace(block_gb), blocks=str(span))
    for name, swarm in swarms.items():
        swarm.await_online()
        say(f"  {name}: {', '.join(f'{host} {span}' for host, span in swarm.spans.items())}")
    return swarms


def run(num_tokens: int, repeats: int) -> dict[str, Arm]:
    """All arms, by name."""
    hosts, links = hosts_and_links(GPUS)
    with tempfile.TemporaryDirectory() as folder:
        build_llama(Path(folder), num_blocks=NUM_BLOCKS, hidden_size=HIDDEN_SIZE)
        tokens = torch.randint(1, 128, (1, 4), generator=torch.Generator().manual_seed(0))
        local: Any = LlamaForCausalLM.from_pretrained(folder).eval()
        expected = local.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens, do_sample=False
        )
        with Netlab(hosts, default=Link(delay_ms=NEAR_RTT_MS / 2), links=links) as lab:
            swarms = start_swarms(lab, folder, GPUS)
            try:
                with client_host(lab, "client"):
                    arms = [Arm(name, swarms[name], expected) for name in swarms]
                    arms += [
                        Arm(f"{name}, random", swarms[name], expected, is_random=True) for name in ("int8", "4bit")
                    ]
                    for _ in range(1 + repeats):
                        for arm in arms:
                            arm.run(tokens)
                    for arm in arms:
                        arm.close()
            finally:
                for swarm in swarms.values():
                    swarm.close()
    return {arm.name: arm for arm in arms}


def main() -> int:
    parser = argparse.ArgumentParser(description="unequal peers on two continents")
    parser.add_argument("--quick", action="store_true", help="8 tokens, one session that counts")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="sessions that count")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.repeats = 8, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    arms = run(options.tokens, options.repeats)
    equal = arms["equal"].steps_per_s
    bars = [
        Bar("14 peers ÷ 3 equal ones, int8", arms["int8"].steps_per_s / equal, ">=", 0.485),
        Bar("14 peers ÷ random routing, 4 bit", arms["4bit"].steps_per_s / arms["4bit, random"].steps_per_s, ">=", 1.3),
    ]
    rows = [
        (
            arm.name,
            f"{arm.steps_per_s:.2f}",
            f"{arm.steps_per_s / equal:.3f}",
            len(arm.sessions[-1].route),
            f"{statistics.median(s.first_token_s for s in arm.sessions[1:]):.2f}",
        )
        for arm in arms.values()
    ]
    result = {
        name: {
            "steps_per_s": arm.steps_per_s,
            "sessions": [round(session.steps_per_s, 3) for session in arm.sessions],
            "first_token_s": [round(session.first_token_s, 2) for session in arm.sessions],
            "last_route": [f"{arm.host_of(hop)} {hop.span}" for hop in arm.sessions[-1].route],
        }
        for name, arm in arms.items()
    }
    markdown = table(["swarm", "steps/s", "÷ 3 equal", "hops of the last route", "first token, s"], rows)
    status = print_report(result, bars, markdown)
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
