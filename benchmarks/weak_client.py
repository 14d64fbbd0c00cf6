"""A client with half a core and 1 GiB against one without limits: with the LM head at the last peer, and with its own.

    python benchmarks/weak_client.py [--rounds 7] [--tokens 32] [--rtt 5]     # root, cgroups, gcc and ../shared/netlab

A random llama of eight blocks of hidden size 1024 and a vocabulary of 64,000 on three peers, round trips of 5 ms at
1 Gbit/s. The clients are processes that decode the same prompt in turn, greedy, in random order within a round; the
others wait meanwhile. Seconds count from the first new token to the last; a ratio is the median over rounds. All must
come to the same tokens. Peers and clients share this machine's cores: a client that is held back leaves them more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load

SPANS = ("0:3", "3:6", "6:8")
CORES, MEMORY_BYTES = 0.5, 1024**3
PERIOD_US = 100_000
MBIT = 1000.0
CGROUPS = Path("/sys/fs/cgroup")
START_TIMEOUT_S = 180.0


def build(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def serve_rounds(options: argparse.Namespace) -> int:
    """The client: decodes at each line that it reads, and answers with seconds, tokens and its peak of memory."""
    model: Any = load(options.folder, trackers=[options.client], mdns=False, head=options.head or None)
    prompt = torch.arange(5, 21)[None]
    print(json.dumps({"up": True}), flush=True)
    for _ in sys.stdin:
        times: list[float] = []

        def note(input_ids: torch.Tensor, scores: object, *, times: list[float] = times, **_: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.tokens + 1,
            do_sample=False,
            stopping_criteria=[note],
        )
        status = Path("/proc/self/status").read_text("ascii")
        peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        answer = {"seconds": times[-1] - times[0], "tokens": output[0].tolist(), "peak_mb": peak_kb * 1024 / 1e6}
        print(json.dumps(answer), flush=True)
    model.model.layers.close()
    return 0


@contextmanager
def limits(of: str) -> Iterator[list[Path]]:
    """Files that a process writes its id into, to be held to the limits."""
    name = f"weak-client-{os.getpid()}-{of}"
    if (CGROUPS / "cgroup.controllers").exists():
        groups = [CGROUPS / name]
        values = {
            groups[0] / "cpu.max": f"{int(CORES * PERIOD_US)} {PERIOD_US}",
            groups[0] / "memory.max": MEMORY_BYTES,
        }
    else:
        groups = [CGROUPS / "cpu" / name, CGROUPS / "memory" / name]
        values = {
            groups[0] / "cpu.cfs_period_us": PERIOD_US,
            groups[0] / "cpu.cfs_quota_us": int(CORES * PERIOD_US),
            groups[1] / "memory.limit_in_bytes": MEMORY_BYTES,
        }
    try:
        for group in groups:
            group.mkdir()
        for path, value in values.items():
            path.write_text(str(value))
        yield [group / "cgroup.procs" for group in groups]
    finally:
        for group in groups:
            if group.exists():
                group.rmdir()


class Client:
    """A client's process on the laboratory's host for it."""

    def __init__(self, lab: Any, name: str, arguments: Sequence[str], held_by: Sequence[Path]) -> None:
        self.name = name
        self.answers: list[dict[str, Any]] = []
        command = [sys.executable, __file__, *arguments]
        self._process = lab.popen("client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for path in held_by:  # before it has memory worth speaking of; in its namespaces the path is another
            path.write_text(str(self._process.pid))
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"client '{self.name}' ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self) -> dict[str, Any]:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def measure(options: argparse.Namespace, folder: Path) -> list[Client]:
    from _lab import LabSwarm, Link, Netlab
    from _report import say

    hosts = dict.fromkeys(["client", "tracker", *(f"p{number}" for number in range(len(SPANS)))])
    with ExitStack() as stack:
        lab = stack.enter_context(Netlab(hosts, default=Link(delay_ms=options.rtt / 2, mbit=MBIT)))
        swarm = stack.enter_context(LabSwarm(lab, str(folder), "tracker"))
        for number, span in enumerate(SPANS):
            swarm.begin(f"p{number}", blocks=span, head=True)
        swarm.await_online()
        common = ["--client", swarm.url, "--folder", str(folder), "--tokens", str(options.tokens)]
        kinds = {
            "unlimited, remote head": ("remote", ()),
            "limited, remote head": ("remote", stack.enter_context(limits("remote"))),
            "unlimited, own head": ("", ()),
            "limited, own head": ("", stack.enter_context(limits("own"))),
        }
        clients = []
        for name, (head, files) in kinds.items():
            clients.append(Client(lab, name, [*common, "--head", head], files))
            stack.callback(clients[-1].close)
        dice = Random(0)
        for number in range(options.rounds + 1):  # the first warms up
            answers = {client.name: client.run() for client in dice.sample(clients, len(clients))}
            if len({tuple(answer["tokens"]) for answer in answers.values()}) != 1:
                raise SystemExit("the clients came to different tokens")
            for client in clients if number else ():
                client.answers.append(answers[client.name])
            say("  " + ", ".join(f"{name} {answer['seconds']:.2f} s" for name, answer in answers.items()))
    return clients


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a client with half a core and 1 GiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rtt", type=float, default=5.0, help="ms")
    parser.add_argument("--client", help=argparse.SUPPRESS)  # the tracker; then this process is a client
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--head", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.client:
        return serve_rounds(options)
    from _report import Bar, print_report, table

    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        clients = measure(options, Path(name))
    base = [answer["seconds"] for answer in clients[0].answers]
    result, rows = {}, []
    for client in clients:
        seconds = [answer["seconds"] for answer in client.answers]
        ratio = statistics.median(one / other for one, other in zip(base, seconds, strict=True))
        peak_mb = client.answers[-1]["peak_mb"]
        result[client.name] = {"seconds": [round(s, 3) for s in seconds], "ratio": ratio, "peak_mb": peak_mb}
        rate = options.tokens / statistics.median(seconds)
        rows.append((client.name, f"{rate:.1f}", f"{ratio:.3f}", f"{peak_mb:.0f}"))
    bars = [Bar("limited ÷ unlimited, remote head", result["limited, remote head"]["ratio"], ">=", 0.95)]
    markdown = table(["client", "tokens/s", "÷ unlimited with remote head", "peak of resident memory, MB"], rows)
    return print_report({"rtt_ms": options.rtt, "rounds": options.rounds, **result}, bars, markdown)


if __name__ == "__main__":
    sys.exit(main())
