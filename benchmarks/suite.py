"""Remote decoding against its baselines, over loopback and emulated networks: scenarios x profiles, one report.

    python benchmarks/suite.py [--profiles loopback 1g5 100m5 100m100] [--scenarios decode prefill] [--peers 3]
        [--hidden 1024] [--rounds 5] [--pace MS] [--system COMMAND]... [--output FOLDER] [--plots]

Peers are processes that hold equal shares of a random fp32 llama of eight blocks, one torch thread each. Profiles other
than loopback need root, gcc and ../shared/netlab. Arms, in random order in each round::

    local                    transformers, all blocks in this process
    stages in one process    what the peers run, one after the other here, without client and wire
    accelerate disk offload  transformers with blocks that accelerate reads from disk for each step
    remote                   through the peers
    COMMAND                  another system, timed by this script: `_systems.py` has its protocol

Figures are medians over rounds; ratios are medians of each round's ratio. All arms that tell must have the same tokens.
With ``--pace`` each block of the stages and peers takes a set time, as on a device that this machine does not have;
these arms are labelled as paced, and compared with the paced stages. The waterfall of a token is from the timings in
the replies. Prints one line of JSON; markdown goes to stderr. ``--output`` keeps both, with ``--plots`` also as plots
(extra `plots`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _arms import Arm, ModelArm, RemoteArm, StagesArm, interleave, median_ratio, offloaded, waterfall_of
from _report import machine, say, table
from _systems import OtherSystem
from overhead import NUM_BLOCKS, build_checkpoint, equal_spans
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.testing.child_process import ChildProcess
from remote_modules.testing.pace import Pace

MIN_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Scenario:
    """``figure``: of a `Sample`, in seconds."""

    prefix: int
    tokens: int
    figure: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where the peers are: arguments of `load`, and the addresses of the hosts of a laboratory."""

    peers: int
    sources: dict[str, Any]
    hosts: dict[str, str] = field(default_factory=dict)


PROFILES: dict[str, tuple[float, float] | None] = {  # Mbit/s each way, ms of round trip
    "loopback": None,
    "1g5": (1000.0, 5.0),
    "100m5": (100.0, 5.0),
    "100m100": (100.0, 100.0),
}
SCENARIOS = {"decode": Scenario(128, 64, "token_s"), "prefill": Scenario(512, 1, "prefill_s")}


@contextmanager
def on_loopback(folder: Path, spans: Sequence[str], pace: Pace | None) -> Iterator[Place]:
    options = {"model": str(folder), "mdns": False, "num_threads": 1, "peer_cache": None}
    with ExitStack() as stack:
        children = []
        for span in spans:
            config = {**options, "blocks": span}
            children.append(ChildProcess("peer", config, pace=None if pace is None else asdict(pace)))
            stack.callback(children[-1].end)
        yield Place(len(spans), {"peers": [child.first_line()["address"] for child in children]})


@contextmanager
def in_laboratory(folder: Path, spans: Sequence[str], pace: Pace | None, link: tuple[float, float]) -> Iterator[Place]:
    """This process is on the host of the client."""
    from _lab import LabSwarm, Link, Netlab, client_host

    mbit, rtt_ms = link
    peers = [f"peer{number}" for number in range(len(spans))]
    hosts: dict[str, Any] = dict.fromkeys(("client", "tracker", *peers))
    with (
        Netlab(hosts, default=Link(delay_ms=rtt_ms / 2, mbit=mbit)) as lab,
        LabSwarm(lab, str(folder), "tracker", announce_interval_s=5.0) as swarm,
    ):
        for host, span in zip(peers, spans, strict=True):
            swarm.begin(host, pace, blocks=span)
        swarm.await_online()
        with client_host(lab, "client"):
            yield Place(len(spans), {"trackers": [swarm.url]}, {name: lab.ip[name] for name in hosts})


def place_of(profile: str, folder: Path, spans: Sequence[str], pace: Pace | None) -> Any:
    link = PROFILES[profile]
    return on_loopback(folder, spans, pace) if link is None else in_laboratory(folder, spans, pace, link)


class Suite:
    """Args: as the command's options. ``baselines``: arms that do not depend on the profile."""

    def __init__(
        self, folder: Path, baselines: Sequence[Arm], *, rounds: int, seed: int, scenarios: dict[str, Scenario]
    ) -> None:
        self._folder = folder
        self._baselines = list(baselines)
        self._rounds = rounds
        self._random = Random(seed)
        self._scenarios = scenarios

    def measure(self, profile: str, place: Place, *, is_paced: bool = False, systems: Sequence[str] = ()) -> Any:
        """Figures by scenario."""
        opening = {"model": str(self._folder), "profile": profile, "hosts": place.hosts, "peers": place.peers}
        with ExitStack() as stack:
            model: Any = load(self._folder, mdns=False, **place.sources)
            stack.enter_context(closing(model.model.layers))
            remote = RemoteArm("remote", model, is_paced)
            others = [stack.enter_context(OtherSystem(command, opening)) for command in systems]
            arms = [*self._baselines, remote, *others]
            if len({arm.name for arm in arms}) < len(arms):
                raise SystemExit(f"arms must have different names, got {', '.join(arm.name for arm in arms)}")
            return {name: self._run(arms, remote, scenario) for name, scenario in self._scenarios.items()}

    def _run(self, arms: Sequence[Arm], remote: RemoteArm, scenario: Scenario) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(1, 1024, (scenario.prefix,), generator=generator).tolist()
        remote.steps.clear()
        samples = interleave(arms, lambda arm: arm.decode(prompt, scenario.tokens), self._rounds, self._random)
        seconds = {name: [getattr(sample, scenario.figure) for sample in found] for name, found in samples.items()}
        figures = [self._figures(arm, arms, seconds) for arm in arms]
        steps = [step for step in remote.steps if all(hop.num_tokens == 1 for hop in step)]
        token_s = statistics.median(sample.token_s for sample in samples[remote.name])
        return {**asdict(scenario), "arms": figures, "waterfall": waterfall_of(steps, token_s)}

    def _figures(self, arm: Arm, arms: Sequence[Arm], seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Paced arms are compared with the first paced one, others with the first."""
        base = next(other for other in arms if other.is_paced == arm.is_paced)
        found = seconds[arm.name]
        return {
            "arm": arm.name,
            "is_paced": arm.is_paced,
            "median_s": statistics.median(found),
            "min_s": min(found),
            "max_s": max(found),
            "ratio": median_ratio(found, seconds[base.name]),
            "ratio_to": base.name,
        }


def label(row: dict[str, Any]) -> str:
    return f"{row['arm']} (paced)" if row["is_paced"] else str(row["arm"])


def markdown(results: dict[str, Any]) -> str:
    rows, hops = [], []
    for profile, scenarios in results.items():
        for name, found in scenarios.items():
            for row in found["arms"]:
                times = [f"{1e3 * row[key]:.2f}" for key in ("median_s", "min_s", "max_s")]
                rows.append((profile, name, label(row), *times, f"{row['ratio']:.3f} × {row['ratio_to']}"))
        hops += [
            (profile, hop["hop"], *(f"{1e3 * hop[part]:.3f}" for part in ("wire", "queue", "compute")))
            for hop in (scenarios["decode"]["waterfall"] if "decode" in scenarios else ())
        ]
    head = ["profile", "scenario", "arm", "median, ms", "least", "most", "ratio"]
    return f"{table(head, rows)}\n\n{table(['profile', 'hop of a token', 'wire, ms', 'queue', 'compute'], hops)}"


def keep(folder: Path, report: dict[str, Any], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (folder / "suite.md").write_text(text + "\n", "utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="remote decoding against its baselines")
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--pace", type=float, metavar="MS", help="of each block, for stages and peers")
    parser.add_argument("--system", action="append", default=[], metavar="COMMAND", help="another system; repeatable")
    parser.add_argument("--no-offload", action="store_true", help="without accelerate's disk offload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for JSON and markdown")
    parser.add_argument("--plots", action="store_true", help="write plots to FOLDER, too")
    options = parser.parse_args(arguments)
    if options.rounds < MIN_ROUNDS or not 1 <= options.peers <= NUM_BLOCKS:
        parser.error(f"at least {MIN_ROUNDS} rounds and 1 to {NUM_BLOCKS} peers, please")
    if options.plots and options.output is None:
        parser.error("--plots needs --output")
    return options


def main() -> int:
    options = parse(None)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pace = None if options.pace is None else Pace(options.pace / 1e3)
    results = {}
    with tempfile.TemporaryDirectory(prefix="suite-") as name:
        folder, spans = Path(name) / "model", equal_spans(options.peers)
        build_checkpoint(folder, options.hidden)
        local: Any = LlamaForCausalLM.from_pretrained(folder).eval()
        baselines: list[Arm] = [ModelArm("local", local), StagesArm(folder, spans, local, pace)]
        if not options.no_offload:
            baselines.append(offloaded(LlamaForCausalLM.from_pretrained(folder).eval(), Path(name) / "offload"))
        scenarios = {name: SCENARIOS[name] for name in options.scenarios}
        suite = Suite(folder, baselines, rounds=options.rounds, seed=options.seed, scenarios=scenarios)
        for profile in options.profiles:
            say(f"== {profile}")
            with place_of(profile, folder, spans, pace) as place:
                results[profile] = suite.measure(
                    profile, place, is_paced=pace is not None, systems=tuple(options.system)
                )
    asked = {name: getattr(options, name) for name in ("peers", "hidden", "rounds", "pace", "seed")}
    report = {"options": asked, "results": results, "machine": machine()}
    print(json.dumps(report), flush=True)
    text = f"{markdown(results)}\n\n{options.peers} peers, hidden {options.hidden}, {machine()}."
    say(f"\n{text}")
    if options.output is not None:
        keep(options.output, report, text)
    if options.plots:
        from _suite_plots import plot_suite  # matplotlib is an extra

        plot_suite(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
