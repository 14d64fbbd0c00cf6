"""How long blocks are uncovered when their only holder is killed: eight unequal peers that choose their own spans.

    python benchmarks/churn.py [--quick] [--kills 3]        # root, gcc and ../shared/netlab

Real processes on the emulated hosts of one laboratory (round trips of 10 ms, 100 Mbit/s), paced to unequal speeds
(`remote_modules.testing.pace`), with the default settings of a server but the number of blocks, which stands for the
memory. They start one after another; all blocks are covered. Then the only holder of some blocks is killed (SIGKILL),
and the tracker is asked until every block is announced online by a live peer again. A client generates all the time.

* detection: until neither the tracker nor any live peer lists the dead one, or until somebody has claimed a block that
  was lost, whichever comes first.
* load: from the first record of a mover that takes such a block to its being online with it.
* bar: all blocks covered within detection + load + 5 s. Before the next kill the dead peer is started again.

Prints one line of JSON; markdown and progress go to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _lab import Host, LabSwarm, Link, Netlab, View, build_llama, client_host, wait_until
from _report import Bar, print_report, say, table
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.errors import RemoteModulesError
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.spans import Span
from remote_modules.testing.pace import Pace

NUM_BLOCKS = 24
HIDDEN_SIZE = 64
SLACK_S = 5.0
SETTLED_S = 20.0  # without a move before a kill, so that no other move counts as healing
POLL_S = 0.2
LIMIT_S = 240.0  # then a gap counts as never covered
REQUEST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Kind:
    """A peer: how many blocks fit, and milliseconds of a block."""

    num_blocks: int
    block_ms: float

    @property
    def pace(self) -> Pace:
        return Pace(self.block_ms / 1e3, self.block_ms / 1e5)


KINDS = (Kind(6, 2), Kind(6, 3), Kind(6, 5), Kind(5, 2), Kind(4, 4), Kind(4, 6), Kind(4, 3), Kind(3, 8))


@dataclass(slots=True)
class Recovery:
    """One kill."""

    victim: str
    lost: str
    detection_s: float | None = None
    load_s: float | None = None
    covered_s: float | None = None
    movers: list[str] = field(default_factory=list)

    @property
    def over_s(self) -> float | None:
        """Seconds beyond detection and load; None if the blocks stayed uncovered."""
        if self.covered_s is None:
            return None
        return self.covered_s - (self.detection_s or 0.0) - (self.load_s or 0.0)


def coverage(records: Sequence[PeerRecord], alive: set[str], num_blocks: int) -> Counter[int]:
    """Live peers that are online, for each block."""
    held: Counter[int] = Counter(dict.fromkeys(range(num_blocks), 0))
    for record in records:
        if record.peer_id in alive and record.state is PeerState.ONLINE:
            held.update(block for block in record.span if block < num_blocks)
    return held


def sole_holder(records: Sequence[PeerRecord], num_blocks: int) -> tuple[str, list[int]] | None:
    """The peer that holds most blocks alone, and which."""
    held = coverage(records, {record.peer_id for record in records}, num_blocks)
    alone = {
        record.peer_id: [block for block in record.span if held[block] == 1]
        for record in records
        if record.state is PeerState.ONLINE
    }
    best = max(alone, key=lambda peer_id: (len(alone[peer_id]), peer_id), default="")
    return (best, alone[best]) if best and alone[best] else None


class Follower:
    """Reads what the tracker lists after a kill, until all blocks are covered."""

    def __init__(self, before: Sequence[PeerRecord], victim: str, num_blocks: int, recovery: Recovery) -> None:
        self._spans = {record.peer_id: record.span for record in before if record.peer_id != victim}
        self._victim = victim
        self._num_blocks = num_blocks
        self._began_s: dict[str, float] = {}
        self._lost = Span.parse(recovery.lost)
        self.recovery = recovery

    def see(self, view: View, now_s: float) -> bool:
        """Whether all is covered ``now_s`` seconds after the kill."""
        recovery, records = self.recovery, view.records()
        moving = [record for record in records if self._is_taking(record)]
        if recovery.detection_s is None:
            is_listed = self._victim in {record.peer_id for record in records}
            live = [record for record in records if record.peer_id in self._spans]
            if moving or not (is_listed or view.is_listed(self._victim, live)):
                recovery.detection_s = now_s
        for record in moving:
            began_s = self._began_s.setdefault(record.peer_id, now_s)
            if record.state is PeerState.ONLINE:
                recovery.load_s = max(recovery.load_s or 0.0, now_s - began_s)
                recovery.movers.append(f"{self._spans[record.peer_id]} to {record.span}")
                self._spans[record.peer_id] = record.span
                del self._began_s[record.peer_id]
        if min(coverage(records, set(self._spans), self._num_blocks).values()) > 0:
            recovery.covered_s = now_s
            return True
        return False

    def _is_taking(self, record: PeerRecord) -> bool:
        """Whether it has announced a lost block that it did not hold."""
        before = self._spans.get(record.peer_id)
        return before is not None and any(block in record.span and block not in before for block in self._lost)


class Load(threading.Thread):
    """A client that generates until `stop`."""

    def __init__(self, swarm: LabSwarm, expected: torch.Tensor, tokens: torch.Tensor) -> None:
        super().__init__(name="load")
        self.requests = self.wrong = 0
        self.errors: list[str] = []
        self.longest_s = 0.0
        self._model: Any = load(swarm.folder, trackers=[swarm.url], mdns=False)
        self._expected, self._tokens = expected, tokens
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.is_set():
            began_s = time.perf_counter()
            try:
                output = greedy(self._model, self._tokens)
            except RemoteModulesError as exc:
                self.errors.append(f"{type(exc).__name__}: {exc}")
            else:
                self.wrong += not torch.equal(output, self._expected)
            self.requests += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - began_s)

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        self._model.model.layers.close()


def greedy(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=REQUEST_TOKENS, do_sample=False
    )
    return output


class Churn:
    """The swarm under test."""

    def __init__(self, swarm: LabSwarm, view: View, kinds: Sequence[Kind], num_blocks: int, limit_s: float) -> None:
        self.swarm = swarm
        self.view = view
        self.num_blocks = num_blocks
        self.recoveries: list[Recovery] = []
        self._kinds = {f"p{number}": kind for number, kind in enumerate(kinds)}
        self._limit_s = limit_s
        self._placed: dict[str, tuple[Span, PeerState]] = {}
        self._placed_at_s = 0.0

    def start(self) -> None:
        """One peer after another, each seeing those before it; then all blocks are covered."""
        for host in self._kinds:
            self.start_one(host)
            say(f"  {host}: {self.swarm.spans[host]}")
        wait_until(self._is_covered, self._limit_s, "all blocks to be covered at the start")

    def start_one(self, host: str) -> None:
        kind = self._kinds[host]
        identity = Path(self.swarm.folder) / f"{host}.pem"
        self.swarm.peer_ids.pop(host, None)
        self.swarm.begin(host, kind.pace, num_blocks=kind.num_blocks, identity_path=identity)
        self.swarm.await_online()

    def kill_sole_holder(self) -> Recovery:
        """Kill one and wait for its blocks."""
        wait_until(self._is_settled, self._limit_s, "the swarm to settle")
        records = self.view.records()
        found = sole_holder(records, self.num_blocks)
        if found is None:
            raise SystemExit("every block has two holders; take fewer peers")
        peer_id, blocks = found
        host = next(host for host, known in self.swarm.peer_ids.items() if known == peer_id)
        recovery = Recovery(f"{host} {self.swarm.spans[host]}", str(Span(blocks[0], blocks[-1] + 1)))
        follower = Follower(records, peer_id, self.num_blocks, recovery)
        self.swarm.kill(host)
        killed_s = time.monotonic()
        while not follower.see(self.view, time.monotonic() - killed_s):
            if time.monotonic() - killed_s > self._limit_s:
                break
            time.sleep(POLL_S)
        self.recoveries.append(recovery)
        say(f"  {recovery}")
        self.start_one(host)
        return recovery

    def _is_settled(self) -> bool:
        """Whether all is covered, and nobody has moved for a while."""
        records = self.view.records()
        placed = {record.peer_id: (record.span, record.state) for record in records}
        if placed != self._placed or not self._is_covered():
            self._placed, self._placed_at_s = placed, time.monotonic()
        return time.monotonic() - self._placed_at_s > SETTLED_S

    def _is_covered(self) -> bool:
        return min(coverage(self.view.records(), set(self.swarm.peer_ids.values()), self.num_blocks).values()) > 0


def run(
    kinds: Sequence[Kind], kills: int, *, num_blocks: int = NUM_BLOCKS, limit_s: float = LIMIT_S
) -> tuple[Churn, Load]:
    """Start, kill ``kills`` times, and what a client noticed."""
    hosts: dict[str, Any] = {"client": None, "tracker": None, **{f"p{n}": Host() for n in range(len(kinds))}}
    tokens = torch.randint(1, 128, (1, 4), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, Netlab(hosts, default=Link(delay_ms=5, mbit=100)) as lab:
        build_llama(Path(folder), num_blocks=num_blocks, hidden_size=HIDDEN_SIZE)
        expected = greedy(LlamaForCausalLM.from_pretrained(folder).eval(), tokens)
        with LabSwarm(lab, folder, "tracker") as swarm, client_host(lab, "client"):
            view = View(swarm.url)
            churn = Churn(swarm, view, kinds, num_blocks, limit_s)
            churn.start()
            client = Load(swarm, expected, tokens)
            client.start()
            try:
                for _ in range(kills):
                    churn.kill_sole_holder()
            finally:
                client.stop()
                view.close()
    return churn, client


def main() -> int:
    parser = argparse.ArgumentParser(description="sole holders killed")
    parser.add_argument("--quick", action="store_true", help="one kill")
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    churn, client = run(KINDS, 1 if options.quick else options.kills)
    worst = max((r.over_s if r.over_s is not None else LIMIT_S for r in churn.recoveries), default=LIMIT_S)
    bars = [
        Bar("uncovered beyond detection + load, s", worst, "<=", SLACK_S),
        Bar("requests with wrong tokens", client.wrong, "<=", 0),
        Bar("requests that failed", len(client.errors), "<=", 0),
    ]
    rows = [
        (r.victim, r.lost, _text(r.detection_s), _text(r.load_s), _text(r.covered_s), ", ".join(r.movers) or "–")
        for r in churn.recoveries
    ]
    markdown = table(["killed", "lost", "detection, s", "load, s", "covered again, s", "moved"], rows)
    markdown += f"\n\nA client made {client.requests} requests of {REQUEST_TOKENS} tokens meanwhile; "
    markdown += f"{len(client.errors)} failed, the longest took {client.longest_s:.1f} s."
    result = {
        "recoveries": [asdict(recovery) for recovery in churn.recoveries],
        "requests": client.requests,
        "errors": client.errors[:10],
        "longest_request_s": round(client.longest_s, 2),
    }
    return print_report(result, bars, markdown)


def _text(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"


if __name__ == "__main__":
    sys.exit(main())
