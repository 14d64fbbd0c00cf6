"""What 10,000 sessions leave behind, at a real peer process and at the client that opened them.

    python benchmarks/leaks.py [--quick] [--sessions 10000]

Sessions are opened over loopback in batches and dropped in six ways: closed; cancelled in mid step; refused; never
closed, until they expire; their client vanished (reset connections); its process frozen (an open connection that is
neither read nor closed). A tenth as many go before, to fill caches and allocators. Figures are taken in quiet moments,
when the peer has dropped all. Prints one JSON line for each side: growth of resident memory, the same for each session
of the second half (by regression), and descriptors, threads, tasks, sessions and KV bytes before and after. Exit status
1 if a bar is missed. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import re
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, RemoteModulesError, RemoteSequential
from remote_modules.client.call import CallArguments
from remote_modules.client.session import SessionState
from remote_modules.model.checkpoint import built_in_path
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm

BATCH = 20
NUM_TOKENS = 8
MAX_BATCH_TOKENS = 64
SETTLE_S = 60.0
MAX_GROWTH_BYTES = 20e6
MAX_SLOPE_BYTES = 1024.0
NUM_PARTS = 4  # of the second half, with a quiet moment after each
EXACT = ("fds", "threads", "tasks", "sessions", "kv_bytes", "connections")


@dataclass
class Driver:
    """The client side: opens sessions, and drops them.

    Attributes:
        frozen: connections that nobody reads any more.
        counts: sessions by the way in which they were dropped.
    """

    layers: RemoteSequential
    rng: Random
    frozen: list[Any] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def swarm(self) -> Any:
        return self.layers._handle.swarm

    async def opened(self, num_tokens: int = NUM_TOKENS) -> SessionState:
        session = self.session()
        await self.step(session, num_tokens)
        return session

    def session(self) -> SessionState:
        return SessionState(self.swarm, Span(0, self.swarm.num_blocks), lambda callback: callback())

    async def step(self, session: SessionState, num_tokens: int) -> None:
        inputs = torch.zeros(1, num_tokens, self.swarm.hidden_size)
        call = CallArguments(rows=1, num_tokens=num_tokens, position_ids=None, attention_mask=None)
        await session.step({"hidden_states": inputs}, call)

    async def close(self) -> None:
        session = await self.opened()
        await session.close()

    async def cancel(self) -> None:
        session = self.session()
        step = asyncio.ensure_future(self.step(session, NUM_TOKENS))
        await asyncio.sleep(self.rng.uniform(0.0, 0.02))
        step.cancel()
        await asyncio.wait([step])
        await session.close()

    async def refuse(self) -> None:
        session = self.session()
        with contextlib.suppress(RemoteModulesError):
            await self.step(session, MAX_BATCH_TOKENS + 1)
            raise SystemExit("a request beyond the peer's limit was not refused")
        await session.close()

    async def expire(self) -> None:
        await self.opened()

    async def vanish(self) -> None:
        """The batch shares a connection, which `run` breaks."""
        await self.opened()

    freeze = vanish

    async def run(self, num_sessions: int) -> None:
        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "closed": self.close,
            "cancelled": self.cancel,
            "refused": self.refuse,
            "expired": self.expire,
            "vanished": self.vanish,
            "frozen": self.freeze,
        }
        for number in range(-(-num_sessions // BATCH)):
            name = list(ways)[number % len(ways)]
            await asyncio.gather(*(ways[name]() for _ in range(BATCH)))
            self.counts[name] = self.counts.get(name, 0) + BATCH
            if name in ("vanished", "frozen"):
                self.lose_connections(is_frozen=name == "frozen")

    def lose_connections(self, *, is_frozen: bool) -> None:
        for connection in self.swarm._connections.values():
            if is_frozen and connection.is_open:
                connection._idle_timer.cancel()
                connection._transport.pause_reading()
                self.frozen.append(connection)
            else:
                connection.abort()
        self.swarm._connections.clear()

    async def settle(self, peer: Any) -> None:
        """Wait until the peer has cut off what nobody reads, then end it here, too."""
        deadline_s = time.monotonic() + SETTLE_S
        num_alive = sum(connection.is_open for connection in self.swarm._connections.values())
        while (await asyncio.to_thread(of_peer, peer))["connections"] > num_alive:
            if time.monotonic() > deadline_s:
                raise SystemExit("connections that the peer should have cut off are still open")
            await asyncio.sleep(0.5)
        for connection in self.frozen:
            connection.abort()
        await asyncio.gather(*(connection.closed.wait() for connection in self.frozen))
        self.frozen.clear()


def of_process(pid: int) -> dict[str, int]:
    """Resident bytes, descriptors and threads."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    threads = re.search(r"^Threads:\s+(\d+)$", status, re.MULTILINE)
    if found is None or threads is None:
        raise SystemExit(f"/proc/{pid}/status does not say what it should")
    return {
        "rss_bytes": int(found[1]) * 1024,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(threads[1]),
    }


def of_peer(peer: Any) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{peer.address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    gauges = dict(re.findall(r"^remote_modules_(sessions|kv_bytes|connections|tasks) ([\d.e+]+)$", text, re.MULTILINE))
    return {**of_process(peer.pid), **{name: int(float(value)) for name, value in gauges.items()}}


def of_client(layers: RemoteSequential) -> dict[str, int]:
    gc.collect()
    loop = layers._handle.io.loop
    num_tasks = asyncio.run_coroutine_threadsafe(_num_tasks(), loop).result(10)
    return {**of_process(os.getpid()), "threads": threading.active_count(), "tasks": num_tasks}


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


def quiet(peer: Any, layers: RemoteSequential, num_connections: int) -> tuple[dict[str, int], dict[str, int]]:
    """Both sides once the peer has dropped everything; the last figures if it does not."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        found = of_peer(peer)
        if found["sessions"] == found["kv_bytes"] == 0 and found["connections"] <= num_connections:
            time.sleep(2.0)  # what ends after them
            return of_peer(peer), of_client(layers)
        if time.monotonic() > deadline_s:
            return found, of_client(layers)
        time.sleep(0.5)


def verdict(side: str, start: dict[str, int], end: dict[str, int], slope: float) -> dict[str, Any]:
    """What grew, and whether that is within the bars."""
    growth = end["rss_bytes"] - start["rss_bytes"]
    exact = {name: [start[name], end[name]] for name in EXACT if name in start}
    is_met = growth <= MAX_GROWTH_BYTES and all(after <= before for before, after in exact.values())
    return {
        "side": side,
        "rss_growth_mb": round(growth / 1e6, 2),
        "second_half_bytes_per_session": round(slope, 1),
        **exact,
        "slope_met": slope <= MAX_SLOPE_BYTES,
        "met": is_met,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what sessions leave behind")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="600 sessions")
    arguments = parser.parse_args()
    num_sessions = 600 if arguments.quick else arguments.sessions
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    limits: dict[str, Any] = {
        "session_idle_s": 2.0,
        "orphan_session_s": 1.0,
        "max_batch_tokens": MAX_BATCH_TOKENS,
        "num_threads": 1,
    }
    with LocalSwarm(built_in_path(), spans=["0:8"], mode="process", **limits) as swarm:
        layers = RemoteSequential.from_swarm(
            built_in_path(), trackers=swarm.trackers, mdns=False, config=ClientConfig(pass_deadline_s=30.0)
        )
        (peer,) = swarm.peers
        driver = Driver(layers, Random(0))
        run = layers._handle.io.run
        snapshots = []
        parts = 1 if arguments.quick else NUM_PARTS
        half = num_sessions // 2
        for count in (max(200, num_sessions // 10), half, *[(num_sessions - half) // parts] * parts):
            began_s = time.monotonic()
            run(driver.run(count))
            run(driver.settle(peer))
            run(driver.close())  # one connection stays
            snapshots.append(quiet(peer, layers, 1))
            print(f"{count} sessions, {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
        lines = []
        for index, side in enumerate(("peer", "client")):
            seen = [snapshot[index] for snapshot in snapshots]
            at = [number * half / parts for number in range(parts + 1)]
            slope = statistics.linear_regression(at, [each["rss_bytes"] for each in seen[1:]]).slope
            start, end = seen[0], seen[-1]
            lines.append(verdict(side, start, end, slope))
        layers.close()
    for line in lines:
        print(
            json.dumps({"benchmark": "leaks", "num_sessions": num_sessions, **line, "ways": driver.counts}), flush=True
        )
    if not all(line["met"] for line in lines):
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
