"""Peers killed and frozen in long generations, and restarted one after another under load: nothing may get lost.

    python benchmarks/kills.py [--quick] [--runs 50] [--only kill freeze modes rolling]

Six processes hold a tiny random llama as 0:2, 2:4, 4:6, twice; default settings, greedy decoding of 1,000 tokens.

* kill: SIGKILL of three of the six, one of each span, at random times; afterwards they are started again.
* freeze: the same with SIGSTOP.
* modes: the same for other ways to call a model, and for training steps.
* rolling: SIGTERM (drain) and a new start with the same identity, one peer after another, while four clients generate.

Every run must give the local model's tokens (or gradients). A stall is the longest time between two passes through the
swarm. Faults are placed by seed: after so many passes, and somewhere within the next. Takes about 20 minutes on two
quiet cores, 4 with --quick. Prints one line of JSON; markdown and progress go to stderr.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _kill_modes import MODES, Mode, assisted, build_checkpoint, generate, greedy, prompt
from _report import Bar, print_report, quantile, say, table
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.errors import RemoteModulesError
from remote_modules.testing import LocalSwarm
from remote_modules.testing.local_peer import LocalPeer

SPANS = ("0:2", "2:4", "4:6")
NUM_TOKENS = 1000
POLL_S = 0.001
CLIENTS = 4
REQUEST_TOKENS = 40
MIN_GAP = 1e-4  # between the two best logits of the reference: replay rounds by less
DRAIN_TIMEOUT_S = 60.0


# faults


@dataclass(frozen=True, slots=True)
class Fault:
    """One peer is lost ``delay_s`` after ``after`` passes."""

    after: int
    delay_s: float
    peer: LocalPeer


class Watch:
    """Follows a client's passes from a thread: does the faults when they are due, and notes the longest gap."""

    def __init__(self, model: Any, faults: Sequence[Fault], lose: Callable[[LocalPeer], None]) -> None:
        self._layers = model.model.layers
        self._faults = sorted(faults, key=lambda fault: (fault.after, fault.delay_s))
        self._lose = lose
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self.longest_s = 0.0
        self.num_passes = 0
        self.lost: list[LocalPeer] = []

    def __enter__(self) -> Watch:
        self._first = self._layers._handle.stats.steps
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        due, moved_s = list(self._faults), time.perf_counter()
        while not self._is_over.wait(POLL_S):
            passes = self._layers._handle.stats.steps - self._first
            now_s = time.perf_counter()
            if passes > self.num_passes:
                self.num_passes, moved_s = passes, now_s
            self.longest_s = max(self.longest_s, now_s - moved_s)
            while due and passes >= due[0].after:
                fault = due.pop(0)
                time.sleep(fault.delay_s)
                self._lose(fault.peer)
                self.lost.append(fault.peer)


@dataclass(slots=True)
class Outcome:
    """Runs of one mode with one kind of fault."""

    name: str
    stalls_s: list[float] = field(default_factory=list)
    calm_s: float = 0.0
    calm_gap_s: float = 0.0
    equal: int = 0
    runs: int = 0
    faults: int = 0
    failovers: int = 0
    problems: list[str] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        stalls = self.stalls_s or [float("nan")]
        return (
            self.name,
            f"{self.equal} of {self.runs}",
            f"{self.faults} ({self.failovers} failovers)",
            f"{statistics.median(stalls):.3f}",
            f"{quantile(stalls, 0.95):.3f}",
            f"{max(stalls):.3f}",
            f"{self.calm_gap_s:.3f}",
        )

    def summary(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "equal": self.equal,
            "faults": self.faults,
            "failovers": self.failovers,
            "median_stall_s": round(statistics.median(self.stalls_s), 3),
            "p95_stall_s": round(quantile(self.stalls_s, 0.95), 3),
            "longest_stall_s": round(max(self.stalls_s), 3),
            "calm_s": round(self.calm_s, 2),
            "longest_gap_without_fault_s": round(self.calm_gap_s, 3),
            "problems": self.problems,
        }


class Bench:
    """A swarm of six, one client of it, and the local model."""

    def __init__(self, swarm: LocalSwarm, folder: str, *, rest_s: float = 1.5) -> None:
        self.swarm = swarm
        self.local: Any = LlamaForCausalLM.from_pretrained(folder).eval()
        self.remote: Any = load(folder, trackers=swarm.trackers, mdns=False)
        self.set_up_s = 0.0
        self._rest_s = rest_s

    def close(self) -> None:
        self.remote.model.layers.close()

    def measure(self, name: str, mode: Mode, fault: str, runs: int) -> Outcome:
        """``runs`` calls that each lose one peer of each span."""
        outcome = Outcome(name)
        expected = mode(self.local)
        mode(self.remote)
        with Watch(self.remote, (), _kill) as calm:
            began_s = time.perf_counter()
            mode(self.remote)
            outcome.calm_s, outcome.calm_gap_s = time.perf_counter() - began_s, calm.longest_s
        for number in range(runs):
            rng = Random(f"{name}/{fault}/{number}")
            self._run(outcome, mode, expected, fault, self._faults(rng, calm.num_passes, outcome.calm_s))
            say(f"  {fault} {name} {number + 1}/{runs}: stall {outcome.stalls_s[-1]:.2f} s")
        return outcome

    def _faults(self, rng: Random, num_passes: int, calm_s: float) -> list[Fault]:
        """One peer of each span, at random."""
        step_s = calm_s / num_passes
        return [
            Fault(rng.randrange(1 + num_passes * 9 // 10), rng.random() * step_s, rng.choice([first, second]))
            for first, second in zip(self.swarm.peers[:3], self.swarm.peers[3:], strict=True)
        ]

    def _run(self, outcome: Outcome, mode: Mode, expected: list[torch.Tensor], fault: str, faults: list[Fault]) -> None:
        layers = self.remote.model.layers
        before = layers.stats().failovers
        outcome.runs += 1
        with Watch(self.remote, faults, _kill if fault == "kill" else _freeze) as watch:
            try:
                is_equal = _equal(mode(self.remote), expected)
            except RemoteModulesError as exc:
                is_equal = False
                outcome.problems.append(f"run {outcome.runs}: {type(exc).__name__}: {exc}")
        outcome.equal += is_equal
        outcome.stalls_s.append(watch.longest_s)
        outcome.faults += len(watch.lost)
        outcome.failovers += layers.stats().failovers - before
        if len(watch.lost) < len(faults):
            outcome.problems.append(f"run {outcome.runs}: {len(watch.lost)} of {len(faults)} faults happened")
        self._mend(fault, watch.lost)

    def _mend(self, fault: str, lost: list[LocalPeer]) -> None:
        began_s = time.perf_counter()
        with ThreadPoolExecutor(len(SPANS)) as pool:
            list(pool.map(lambda peer: peer.restart() if fault == "kill" else peer.thaw(), lost))
        time.sleep(self._rest_s)  # bans run out, and the peers are announced again
        self.set_up_s += time.perf_counter() - began_s


def _kill(peer: LocalPeer) -> None:
    peer.kill()


def _freeze(peer: LocalPeer) -> None:
    peer.freeze()


def _equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# rolling restart


@dataclass(slots=True)
class Load:
    """What one client did."""

    requests: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def roll(
    swarm: LocalSwarm, folder: str, local: Any, *, clients: int = CLIENTS, num_tokens: int = REQUEST_TOKENS
) -> Any:
    """Restart every peer, one after another, while ``clients`` generate all the time."""
    stop, loads = threading.Event(), [Load() for _ in range(clients)]
    expected = [generate(local, prompt(10 + number), num_tokens) for number in range(clients)]
    threads = [
        threading.Thread(target=_client, args=(swarm, folder, 10 + number, expected[number], num_tokens, stop, load_))
        for number, load_ in enumerate(loads)
    ]
    for thread in threads:
        thread.start()
    _await_requests(loads, 1)
    began_s, statuses = time.perf_counter(), []
    for peer in swarm.peers:
        peer_id = peer.peer_id
        peer.drain()
        statuses.append(peer.wait(DRAIN_TIMEOUT_S))
        peer.restart()
        if peer.peer_id != peer_id:
            raise SystemExit(f"{peer} came back as another peer")
        say(f"  rolling {peer.span}: status {statuses[-1]}, {sum(load_.requests for load_ in loads)} requests so far")
    took_s = time.perf_counter() - began_s
    _await_requests(loads, 1 + min(load_.requests for load_ in loads))
    stop.set()
    for thread in threads:
        thread.join()
    return {
        "requests": sum(load_.requests for load_ in loads),
        "failed": sum(len(load_.errors) + load_.wrong for load_ in loads),
        "wrong_tokens": sum(load_.wrong for load_ in loads),
        "errors": [error for load_ in loads for error in load_.errors][:10],
        "longest_stall_s": round(max(load_.longest_s for load_ in loads), 3),
        "drain_statuses": statuses,
        "seconds": round(took_s, 1),
    }


def _await_requests(loads: list[Load], count: int) -> None:
    deadline_s = time.monotonic() + 120
    while min(load_.requests for load_ in loads) < count:
        if time.monotonic() > deadline_s:
            raise SystemExit("the clients do not get on")
        time.sleep(0.05)


def _client(
    swarm: LocalSwarm,
    folder: str,
    seed: int,
    expected: torch.Tensor,
    num_tokens: int,
    stop: threading.Event,
    done: Load,
) -> None:
    model: Any = load(folder, trackers=swarm.trackers, mdns=False)
    while not stop.is_set():
        try:
            with Watch(model, (), _kill) as watch:
                output = generate(model, prompt(seed), num_tokens)
        except RemoteModulesError as exc:
            done.errors.append(f"{type(exc).__name__}: {exc}")
        else:
            done.wrong += not torch.equal(output, expected)
        done.requests += 1
        done.longest_s = max(done.longest_s, watch.longest_s)
    model.model.layers.close()


# the whole


def check_reference(local: Any, num_tokens: int) -> float:
    """The smallest gap between the two best logits of the reference run: rounding must not decide a token."""
    output = generate(local, prompt(), num_tokens, return_dict_in_generate=True, output_logits=True)
    best = torch.stack(output.logits).topk(2, dim=-1).values
    gap = float((best[..., 0] - best[..., 1]).min())
    if gap < MIN_GAP:
        raise SystemExit(f"the reference run has a near tie ({gap:.1e}); choose another prompt")
    return gap


def main() -> int:
    parser = argparse.ArgumentParser(description="kills, freezes and rolling restarts in long generations")
    parser.add_argument(
        "--quick", action="store_true", help="2 kills, 1 freeze of 200 tokens, and of each other mode 1 kill"
    )
    parser.add_argument("--runs", type=int, help="with kills; a fifth of it with freezes, a tenth for each other mode")
    parser.add_argument("--only", nargs="+", choices=["kill", "freeze", "modes", "rolling"])
    options = parser.parse_args()
    parts = options.only or ["kill", "freeze", "modes", "rolling"]
    runs = options.runs or (2 if options.quick else 50)
    num_tokens = 200 if options.quick else NUM_TOKENS
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        build_checkpoint(Path(folder))
        with LocalSwarm(folder, spans=SPANS * 2, mode="process", num_threads=1) as swarm:
            return _report(Bench(swarm, folder), folder, parts, runs, num_tokens)


def _report(bench: Bench, folder: str, parts: list[str], runs: int, num_tokens: int) -> int:
    gap = check_reference(bench.local, num_tokens)
    outcomes: dict[str, Outcome] = {}
    bars: list[Bar] = []
    few = max(1, runs // 10)
    for fault, count, bar_s in (("kill", runs, 2.0), ("freeze", max(1, runs // 5), 5.0)):
        if fault in parts:
            outcome = outcomes[fault] = bench.measure("greedy", greedy(num_tokens), fault, count)
            bars.append(Bar(f"{fault}: equal runs of {count}", outcome.equal, ">=", count))
            bars.append(Bar(f"{fault}: faults that happened", outcome.faults, ">=", len(SPANS) * count))
            bars.append(Bar(f"{fault}: p95 stall, s", quantile(outcome.stalls_s, 0.95), "<=", bar_s))
    if "modes" in parts:
        for name, mode in (MODES | {"assisted": assisted(bench.local)}).items():
            for fault in ("kill", "freeze") if few > 1 else ("kill",):
                outcomes[f"{name}, {fault}"] = bench.measure(name, mode, fault, few)
        others = [outcome for name, outcome in outcomes.items() if ", " in name]
        bars.append(
            Bar("other modes: equal share", sum(o.equal for o in others) / sum(o.runs for o in others), ">=", 1)
        )
    rolling = None
    if "rolling" in parts:
        rolling = roll(bench.swarm, folder, bench.local)
        bars.append(Bar(f"rolling restart: failed of {rolling['requests']} requests", rolling["failed"], "<=", 0))
    bench.close()
    head = ("fault", "equal", "faults", "median stall, s", "p95, s", "longest, s", "longest gap without, s")
    rows = [(name, *outcome.row()[1:]) for name, outcome in outcomes.items()]
    markdown = table(head, rows)
    if rolling is not None:
        markdown += (
            f"\n\nRolling restart of six peers under {CLIENTS} clients: {rolling['requests']} requests of "
            f"{REQUEST_TOKENS} tokens, {rolling['failed']} failed, longest stall {rolling['longest_stall_s']} s."
        )
    result = {
        "tokens": num_tokens,
        "smallest_logit_gap": gap,
        "set_up_s": round(bench.set_up_s, 1),
        "outcomes": {name: outcome.summary() for name, outcome in outcomes.items()},
        "rolling": rolling,
    }
    return print_report(result, bars, markdown)


if __name__ == "__main__":
    sys.exit(main())
