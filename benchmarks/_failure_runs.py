"""The measurements of `benchmarks/failures.py`: all arms at one length of the sequence."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from _failure_arms import Client, Loss
from _report import say

from remote_modules.errors import PeerError

__all__ = ["FIRST_TOKEN", "Length", "Setup"]

PS = (0.0, 1e-4, 1e-3, 1e-2)
SENDS = 5
FIRST_TOKEN = 1
STAGES = (8, 7, 8, 7)
WHOLE = 3.0  # restart runs whole sequences up to so many times an undisturbed one, on average
HOPELESS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is run.

    Attributes:
        lengths: tokens of a sequence, and how many sequences.
        attempts: of the restart arm, where whole sequences would take too long.
        samples: lengths at which the arm without cache is measured.
    """

    lengths: dict[int, int]
    ps: tuple[float, ...] = PS
    attempts: int = 8
    samples: int = 6
    hidden_size: int = 512
    stages: tuple[int, ...] = STAGES
    mode: Literal["thread", "process"] = "process"


@dataclass(slots=True)
class Restart:
    """Attempts at one p; ``whole_s`` are those of complete chains of attempts."""

    seconds: float = 0.0
    sends: int = 0
    whole_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """One sequence: the seconds of each step, and what was lost."""

    seconds: list[float]
    losses: list[Loss]


@dataclass(slots=True)
class Cell:
    """Our runs at one p."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    excess_s: list[float] = field(default_factory=list)  # of the steps with losses, over the same steps at p = 0


class Length:
    """All measurements at one number of tokens."""

    def __init__(self, client: Client, setup: Setup, num_tokens: int) -> None:
        self.client = client
        self.setup = setup
        self.num_tokens = num_tokens
        self.plain: list[list[float]] = []
        self.ours = {p: Cell() for p in setup.ps}
        self.restart = {p: Restart() for p in setup.ps if p}
        self.uncached: dict[int, tuple[float, float]] = {}
        self.tokens: list[int] = []

    @property
    def plain_s(self) -> float:
        """Median seconds of an undisturbed sequence with plain caching."""
        return statistics.median(map(sum, self.plain))

    @property
    def step_s(self) -> float:
        """Ours, undisturbed."""
        return statistics.median(self.ours[0.0].seconds) / self.num_tokens

    def run_round(self, number: int) -> None:
        """One sequence of each arm, in an order that rotates with the rounds."""
        order = [None, *self.setup.ps]  # None: plain caching
        turn = number % len(order)
        runs: dict[float, Run] = {}
        for p in order[turn:] + order[:turn]:
            if p is None:
                self._run_plain()
            else:
                runs[p] = self._run_ours(p, number)
        calm = runs[0.0].seconds
        for p, run in runs.items():
            cell = self.ours[p]
            cell.seconds.append(sum(run.seconds))
            cell.ratios.append(sum(self.plain[-1]) / sum(run.seconds))
            cell.losses += run.losses
            hit = sorted({loss.token for loss in run.losses})
            cell.excess_s += [run.seconds[token] - calm[token] for token in hit]
        for p in self.restart:
            if not self.is_hopeless(p):
                self._run_restart(p, number)

    def _run_plain(self) -> None:
        self.client.injector.begin(0.0, 0)
        with self.client.plain() as session:
            tokens, seconds = self.client.decode(session, self.num_tokens, FIRST_TOKEN)
        self._check(tokens, "plain caching")
        self.plain.append(seconds)

    def _run_ours(self, p: float, number: int) -> Run:
        client, layers = self.client, self.client.layers
        client.injector.begin(p, number)
        before = layers.stats()
        with layers.session() as session:
            tokens, seconds = client.decode(session, self.num_tokens, FIRST_TOKEN)
        self._check(tokens, f"ours at p={p:g}")
        losses, after = client.injector.losses, layers.stats()
        # A hedge that fails is no failover: whoever was slow has answered in the meantime.
        noticed = after.failovers - before.failovers + after.hedges - before.hedges
        if noticed < len(losses):
            raise SystemExit(f"{len(losses)} failures were injected, {noticed} were noticed")
        say(f"  t={self.num_tokens} p={p:g} ours {sum(seconds):.1f} s, {len(losses)} failures")
        return Run(seconds, losses)

    def _check(self, tokens: list[int], name: str) -> None:
        self.tokens = self.tokens or tokens
        if tokens != self.tokens:
            raise SystemExit(f"{name}: tokens differ")

    # restart

    def slowdown(self, p: float) -> float:
        """How many undisturbed sequences one with restarts is expected to take, by the formula."""
        return float(((1 - p) ** (-SENDS * self.num_tokens) - 1) / (SENDS * self.num_tokens * p))

    def slowdown_by_steps(self, p: float) -> float:
        """The same, with the measured times of the steps: those at short prefixes take less."""
        steps = [statistics.median(column) for column in zip(*self.plain, strict=True)]
        reached = [(1 - p) ** (SENDS * number) for number in range(self.num_tokens)]
        attempt_s = sum(step_s * share for step_s, share in zip(steps, reached, strict=True))
        return float(attempt_s / (1 - p) ** (SENDS * self.num_tokens) / sum(steps))

    def is_hopeless(self, p: float) -> bool:
        return self.slowdown(p) > HOPELESS

    def _run_restart(self, p: float, number: int) -> None:
        restart, is_whole = self.restart[p], self.slowdown(p) <= WHOLE
        self.client.injector.begin(p, number)
        total_s, done = 0.0, False
        for _ in range(10_000 if is_whole else self.setup.attempts):
            seconds, done = self._attempt()
            total_s += seconds
            if done:
                break
        restart.seconds += total_s
        restart.sends += self.client.injector.sends
        if is_whole and done:
            restart.whole_s.append(total_s)
        losses, sends = len(self.client.injector.losses), self.client.injector.sends
        say(f"  t={self.num_tokens} p={p:g} restart {total_s:.1f} s, {sends} sends, {losses} failures")

    def _attempt(self) -> tuple[float, bool]:
        """One, until it fails or is done."""
        began_s = time.perf_counter()
        try:
            with self.client.plain() as session:
                tokens, _ = self.client.decode(session, self.num_tokens, FIRST_TOKEN)
        except PeerError:
            return time.perf_counter() - began_s, False
        self._check(tokens, "restart")
        return time.perf_counter() - began_s, True

    def restart_s(self, p: float) -> float:
        """Expected seconds of a sequence, from the measured seconds of a send."""
        restart, q = self.restart[p], (1 - p) ** (SENDS * self.num_tokens)
        return restart.seconds / restart.sends * (1 - q) / (p * q)

    # no cache

    def run_uncached(self) -> None:
        """Seconds of a token, and what a failure adds, at lengths spread over the sequence."""
        last, count = self.num_tokens, self.setup.samples
        self.client.injector.begin(0.0, 0)
        starts = [0, *itertools.accumulate(self.setup.stages)][:-1]
        for number in range(count):
            length = 1 + round((last - 1) * number / (count - 1))
            calm = [self.client.recompute(self.tokens[:length]) for _ in range(2)]
            self.client.injector.forced = {starts[number % len(starts)]}
            hit = self.client.recompute(self.tokens[:length])
            if {token for token, _ in [*calm, hit]} != {self.tokens[length]}:
                raise SystemExit(f"no cache: the token after {length} differs")
            calm_s = min(seconds for _, seconds in calm)
            self.uncached[length] = (calm_s, max(0.0, hit[1] - calm_s))
        say(f"  t={self.num_tokens} no cache {self.uncached_s(0.0):.1f} s, integrated over {count} lengths")

    def uncached_s(self, p: float) -> float:
        """Seconds of a sequence, by the trapezoids between the measured lengths."""
        points = [(length, calm_s + SENDS * p * hit_s) for length, (calm_s, hit_s) in sorted(self.uncached.items())]
        pairs = itertools.pairwise(points)
        inner = sum((there - here) * (a + b) / 2 for (here, a), (there, b) in pairs)
        return inner + (points[0][1] + points[-1][1]) / 2

    # figures

    def normalized(self, arm: str, p: float) -> float | None:
        """Speed by plain caching at p = 0; None where nothing was run."""
        if arm == "ours":
            return statistics.median(self.ours[p].ratios)
        if arm == "no cache":
            return self.plain_s / self.uncached_s(p)
        if p == 0.0:
            return 1.0
        return None if self.is_hopeless(p) else self.plain_s / self.restart_s(p)

    def cost(self) -> float | None:
        """Normal steps that a failure costs, over all runs."""
        calm = self.ours[0.0].seconds
        pairs = [
            (sum(a - b for a, b in zip(cell.seconds, calm, strict=True)), len(cell.losses))
            for p, cell in self.ours.items()
            if p >= 1e-3
        ]
        failures = sum(count for _, count in pairs)
        return sum(extra for extra, _ in pairs) / failures / self.step_s if failures else None

    def profile(self) -> dict[str, Any]:
        """Where the time of a failure goes: means, milliseconds."""
        cells = [cell for p, cell in self.ours.items() if p]
        losses = [loss for cell in cells for loss in cell.losses]
        excess_s = sum(sum(cell.excess_s) for cell in cells)
        if not losses:
            return {"failures": 0}
        count = len(losses)

        def mean_ms(seconds: float) -> float:
            return round(1e3 * seconds / count, 2)

        dial_s, replay_s = sum(loss.dial_s for loss in losses), sum(loss.replay_s for loss in losses)
        compute_s = sum(loss.replay_compute_s for loss in losses)
        return {
            "failures": count,
            "step_ms": round(1e3 * self.step_s, 2),
            "excess_of_a_failing_step_ms": mean_ms(excess_s),
            "dial_ms": mean_ms(dial_s),
            "replay_compute_ms": mean_ms(compute_s),
            "replay_wire_and_queue_ms": mean_ms(replay_s - compute_s),
            "rest_ms": mean_ms(excess_s - dial_s - replay_s),
            "replayed_tokens": round(sum(loss.replayed_tokens for loss in losses) / count, 1),
            "longest_excess_ms": round(1e3 * max(max(cell.excess_s, default=0.0) for cell in cells), 1),
        }
