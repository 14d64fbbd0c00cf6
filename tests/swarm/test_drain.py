"""Peers that leave, restart and move while clients generate: no request fails, and no token differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.client.stats import ClientStats
from remote_modules.errors import RefusalReason, RemoteModulesError
from remote_modules.server.checks import refuse
from remote_modules.server.copies import Copies
from remote_modules.testing import LocalSwarm
from remote_modules.testing.local_peer import ThreadPeer
from remote_modules.wire.messages import CopyRequest

from .conftest import assert_rebuilt, generate, noise, poll, prompt, run_locally, with_blocks

NUM_CLIENTS = 4
NUM_NEW = 24
EXIT_S = 30.0


class Load:
    """Clients that generate again and again, each in a thread of its own, and compare with the local model."""

    def __init__(self, models: list[tuple[Any, RemoteSequential]], local: PreTrainedModel) -> None:
        self.num_done = 0
        self.failures: list[str] = []
        self._models = models
        self._expected = [generate(local, prompt(12, seed=number), NUM_NEW) for number in range(len(models))]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[number]) for number in range(len(models))]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                found = generate(self._models[number][0], prompt(12, seed=number), NUM_NEW)
            except (RemoteModulesError, RuntimeError, ValueError, AssertionError) as exc:  # what the test counts
                self.failures.append(repr(exc))
                return
            if not torch.equal(found, self._expected[number]):
                self.failures.append(f"client {number} generated other tokens")
            self.num_done += 1

    def stats(self) -> list[ClientStats]:
        return [layers.stats() for _, layers in self._models]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120.0)
        assert not any(thread.is_alive() for thread in self._threads)


@contextmanager
def swarm_under_load(
    checkpoint: Path, local: PreTrainedModel, spans: list[str], **options: Any
) -> Iterator[tuple[LocalSwarm, Load]]:
    config = ClientConfig(refresh_interval_s=1.0, **options)
    with LocalSwarm(checkpoint, spans=spans, drain_s=10.0) as swarm:
        clients = [
            RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False, config=config)
            for _ in range(NUM_CLIENTS)
        ]
        load = Load([(with_blocks(local, layers), layers) for layers in clients], local)
        try:
            with load.running():
                poll(lambda: load.num_done >= NUM_CLIENTS, "every client generates")
                yield swarm, load
        finally:
            for layers in clients:
                layers.close()
        assert load.failures == []


def test_rolling_restart_of_all_peers_fails_no_request(checkpoint: Path, local: PreTrainedModel) -> None:
    with swarm_under_load(checkpoint, local, ["0:4", "4:8", "0:4", "4:8"]) as (swarm, load):
        for peer in list(swarm.peers):
            peer.drain()
            assert peer.wait(EXIT_S) == 0
            peer.restart()
            done = load.num_done
            poll(lambda done=done: load.num_done > done + 2, "clients go on")  # type: ignore[misc]
        stats = load.stats()
    assert sum(client.handed_over_tokens for client in stats) > 0
    assert sum(client.copied_bytes for client in stats) > 0


@dataclass
class Idle:
    """What an idle session did when its peer left."""

    outputs: torch.Tensor
    stats: ClientStats
    took_s: float


def left_idle(checkpoint: Path) -> Idle:
    """A session of 6 tokens whose client does nothing until the peer has ended; then it goes on."""
    with LocalSwarm(checkpoint, spans=["0:8", "0:8"], drain_s=20.0) as swarm:
        config = ClientConfig(refresh_interval_s=1.0)
        with RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False, config=config) as layers:
            hidden = noise(1, 9)
            with layers.session() as session:
                outputs = [session.step(hidden[:, :6])]
                (hop,) = layers.stats().route
                peer = next(peer for peer in swarm.peers if peer.peer_id == hop.peer_id)
                began_s = time.monotonic()
                peer.drain()
                assert peer.wait(EXIT_S) == 0
                took_s = time.monotonic() - began_s
                outputs += [session.step(hidden[:, 6:7]), session.step(hidden[:, 7:])]
            return Idle(torch.cat(outputs, dim=1), layers.stats(), took_s)


def test_idle_session_leaves_before_its_peer_ends(checkpoint: Path, local: PreTrainedModel) -> None:
    idle = left_idle(checkpoint)
    assert idle.took_s < 15.0  # far from drain_s: the peer did not wait for the session's end
    stats = idle.stats
    assert (stats.failovers, stats.replayed_tokens, stats.handed_over_tokens) == (0, 0, 6)
    assert stats.copied_bytes > 0
    assert_rebuilt(idle.outputs, run_locally(local, noise(1, 9)))


def test_copy_that_is_refused_is_replayed(
    checkpoint: Path, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    async def refuse_all(self: Copies, request: CopyRequest, *args: Any, **kwargs: Any) -> None:
        refused.append(request.session_id)
        refuse("not today", RefusalReason.OUT_OF_MEMORY)

    monkeypatch.setattr(Copies, "copy", refuse_all)
    idle = left_idle(checkpoint)
    assert len(refused) == 1
    assert idle.took_s < 15.0
    stats = idle.stats
    assert (stats.failovers, stats.replayed_tokens, stats.handed_over_tokens) == (0, 6, 0)
    assert_rebuilt(idle.outputs, run_locally(local, noise(1, 9)))


def test_peer_moves_to_other_blocks_and_fails_no_request(checkpoint: Path, local: PreTrainedModel) -> None:
    with swarm_under_load(checkpoint, local, ["0:4", "4:8", "0:8", "0:4"]) as (swarm, load):
        peer = swarm.peers[0]
        assert isinstance(peer, ThreadPeer)
        server = peer._running()
        assert str(server.span) == "0:4"
        server.move("2:8")
        assert str(server.span) == "2:8"
        done = load.num_done
        poll(lambda: load.num_done > done + NUM_CLIENTS, "clients go on")
        with pytest.raises(ValueError, match="9"):
            server.move("4:9")
        assert str(server.span) == "2:8"


def test_buddies_take_over_from_killed_peers(checkpoint: Path, local: PreTrainedModel) -> None:
    options = {"replicate_kv": True, "replicate_tokens": 2}
    with swarm_under_load(checkpoint, local, ["0:8", "0:8"], **options) as (swarm, load):
        for peer in list(swarm.peers) * 2:
            peer.restart()  # killed, and up again
            done = load.num_done
            poll(lambda done=done: load.num_done > done + NUM_CLIENTS, "clients go on")  # type: ignore[misc]
        stats = load.stats()
    assert sum(client.promotions for client in stats) > 0
