"""Peers, trackers and a client on the hosts of a network laboratory (`../shared/netlab`), for benchmarks and tests/wan.

Processes are forked from a server that has torch imported already: twenty of them start in the time of three.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from remote_modules.discovery.http_json import ask, make_session
from remote_modules.discovery.peers_answer import PEERS_PATH, Heard, PeersReader
from remote_modules.discovery.tracker_client import TrackerClient
from remote_modules.errors import DiscoveryError
from remote_modules.net import loop as loops
from remote_modules.net.loop import LoopThread
from remote_modules.peers import PeerRecord
from remote_modules.testing.pace import Pace

NETLAB = Path(os.environ.get("NETLAB", Path(__file__).parents[2] / "shared" / "netlab"))
sys.path.append(str(NETLAB))

from netlab import NETNS, Host, Link, Netlab  # noqa: E402

__all__ = ["ForkedChild", "Host", "LabSwarm", "Link", "Netlab", "build_llama", "client_host"]

START_TIMEOUT_S = 180.0
PRELOAD = ["remote_modules.testing.child", "remote_modules.server.server", "transformers.models.llama.modeling_llama"]
CLONE_NEWNET = 0x40000000
TRACKER_PORT = 8000

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _main(netns: str, pipe: Connection) -> None:
    """A process of `testing.child`, in a network namespace."""
    from remote_modules.testing import child

    with open(netns) as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    sys.stdin, sys.stdout = os.fdopen(os.dup(pipe.fileno())), os.fdopen(os.dup(pipe.fileno()), "w")
    sys.exit(child.main())


class ForkedChild:
    """`testing.child` on a host of the laboratory."""

    def __init__(self, lab: Any, host: str, job: dict[str, Any]) -> None:
        self.host = host
        ours, theirs = _context.Pipe()
        self.process = _context.Process(target=_main, args=(str(NETNS / lab.netns(host)), theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._pipe = ours
        os.write(ours.fileno(), (json.dumps(job, default=str) + "\n").encode())

    def first_line(self) -> dict[str, Any]:
        """What it says when it is up."""
        if not self._pipe.poll(START_TIMEOUT_S):
            raise SystemExit(f"{self.host} said nothing within {START_TIMEOUT_S:.0f} s")
        with os.fdopen(os.dup(self._pipe.fileno())) as lines:
            line = lines.readline()
        message: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in message:
            raise SystemExit(f"{self.host} did not start: {message['error']}")
        return message

    def signal(self, number: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL and reap; idempotent."""
        self.process.kill()
        self.process.join()
        self._pipe.close()


class LabSwarm:
    """A tracker and peers of one checkpoint; a context manager.

    Args:
        tracker: the host of the tracker.
    """

    def __init__(self, lab: Any, folder: str, tracker: str, **server_options: Any) -> None:
        self.lab = lab
        self.folder = folder
        self.url = f"http://{lab.ip[tracker]}:{TRACKER_PORT}"
        self.peers: dict[str, ForkedChild] = {}
        self.peer_ids: dict[str, str] = {}
        self.spans: dict[str, str] = {}
        self._options = {"mdns": False, "num_threads": 1, "trackers": [self.url], **server_options}
        config = {"host": lab.ip[tracker], "port": TRACKER_PORT}
        self._tracker = ForkedChild(lab, tracker, {"kind": "tracker", "config": config})
        self._tracker.first_line()

    def begin(self, host: str, pace: Pace | None = None, **options: Any) -> None:
        """Start a peer without waiting for it."""
        config = {**self._options, "model": self.folder, "host": self.lab.ip[host], **options}
        job: dict[str, Any] = {"kind": "peer", "config": config}
        if pace is not None:
            job["pace"] = asdict(pace)
        self.peers[host] = ForkedChild(self.lab, host, job)

    def await_online(self) -> None:
        """Wait for all that were begun."""
        for host, peer in self.peers.items():
            if host not in self.peer_ids:
                message = peer.first_line()
                self.peer_ids[host], self.spans[host] = message["peer_id"], message["span"]

    def kill(self, host: str) -> None:
        self.peers.pop(host).kill()

    def close(self) -> None:
        for peer in [*self.peers.values(), self._tracker]:
            peer.kill()

    def __enter__(self) -> LabSwarm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class View:
    """What the tracker says, asked from the client's host."""

    def __init__(self, url: str) -> None:
        self._io = LoopThread("benchmark-view")
        self._client = self._io.run(_tracker_client(url))

    def records(self) -> list[PeerRecord]:
        return self._io.run(self._client.lookup(None))

    def is_listed(self, peer_id: str, by: Sequence[PeerRecord]) -> bool:
        """Whether one of these peers tells others of ``peer_id``; those that do not answer tell nobody."""
        answers = self._io.run(_ask_all([f"https://{record.addresses[0]}{PEERS_PATH}" for record in by]))
        return any(heard.record.peer_id == peer_id for answer in answers for heard in answer)

    def close(self) -> None:
        self._io.run(self._client.aclose())
        self._io.stop()


async def _tracker_client(url: str) -> TrackerClient:
    return TrackerClient(url)


async def _ask_all(urls: Sequence[str]) -> list[list[Heard]]:
    async def ask_one(session: aiohttp.ClientSession, url: str) -> list[Heard]:
        try:
            answer = await ask(session, url, who=url, verify_tls=False)
            return await PeersReader(url, level=logging.DEBUG).read(answer.body)
        except DiscoveryError:
            return []

    async with make_session(1.0) as session:
        return await asyncio.gather(*(ask_one(session, url) for url in urls))


@contextmanager
def client_host(lab: Any, host: str) -> Iterator[None]:
    """This process is a client on ``host``: its event loop is made anew there, and once more afterwards outside."""
    _stop_shared_loop()
    with lab.inside(host):
        loops.shared_loop()
        try:
            yield
        finally:
            _stop_shared_loop()


def _stop_shared_loop() -> None:
    shared, loops._shared = loops._shared, None
    if shared is not None:
        shared.stop()


def build_llama(folder: Path, *, num_blocks: int, hidden_size: int) -> None:
    """A random llama whose blocks take little time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="4MB")


def wait_until(condition: Any, timeout_s: float, what: str) -> float:
    """Seconds until ``condition()`` holds."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > timeout_s:
            raise SystemExit(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)
    return time.monotonic() - began_s
