"""Backwards from graphs that peers kept, and without those that they lost: the gradients of the local model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.testing.simulated_device import Ailment

from .conftest import grad_of, noise, run_locally

SPANS = ["0:3", "3:6", "6:8"]
NEVER_HEDGE = ClientConfig(hedge=False)


@pytest.fixture
def peers(checkpoint: Path) -> Iterator[InlineSwarm]:
    with InlineSwarm(checkpoint, SPANS, config=NEVER_HEDGE) as swarm:
        yield swarm


def counts(layers: RemoteSequential) -> tuple[int, int]:
    stats = layers.stats()
    return stats.kept_backwards, stats.recomputed_backwards


def num_kept(peers: InlineSwarm) -> int:
    return sum(len(peer.handler.activations) for peer in peers.peers if peer.handler is not None)


def both(layers: RemoteSequential, local: PreTrainedModel, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Remote and local leaf, and the sum of what comes out of each."""
    ours, theirs = (noise(2, 7, seed=seed).requires_grad_() for _ in range(2))
    return ours, theirs, layers(ours).square().sum(), run_locally(local, theirs).square().sum()


def check(ours: torch.Tensor, theirs: torch.Tensor, loss: torch.Tensor, expected: torch.Tensor) -> None:
    loss.backward()
    expected.backward()
    assert loss.item() == expected.item()
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_peers_use_what_they_kept(peers: InlineSwarm, local: PreTrainedModel) -> None:
    layers = peers.layers()
    passes = [both(layers, local, seed) for seed in range(3)]
    assert num_kept(peers) == 3 * len(SPANS)
    sent = layers.stats().bytes_sent
    for number in (1, 0, 2):
        check(*passes[number])
    assert counts(layers) == (9, 0)
    assert num_kept(peers) == 0
    assert layers.stats().bytes_sent - sent < 9 * 1.5 * noise(2, 7).numel() * 4  # gradients alone went there


def test_two_clients_use_their_own(peers: InlineSwarm, local: PreTrainedModel) -> None:
    first, second = peers.layers(), peers.layers()
    passes = [both(layers, local, seed) for seed, layers in enumerate((first, second, first, second))]
    for number in (3, 0, 1, 2):
        check(*passes[number])
    assert counts(first) == counts(second) == (6, 0)


def forget_graphs(peers: InlineSwarm) -> None:
    assert sum(peer.handler.activations.clear() for peer in peers.peers if peer.handler is not None) == len(SPANS)


def let_the_lease_end(peers: InlineSwarm) -> None:
    peers.io.run(asyncio.sleep(ClientConfig().retain_activations_s + 2.0))
    for peer in peers.peers:
        assert peer.handler is not None
        peer.handler.expire_sessions()


@pytest.mark.parametrize("lose", [forget_graphs, let_the_lease_end])
def test_lost_graphs_are_recomputed_and_no_failure(
    peers: InlineSwarm, local: PreTrainedModel, lose: Callable[[InlineSwarm], None]
) -> None:
    layers = peers.layers()
    work = both(layers, local)
    lose(peers)
    assert num_kept(peers) == 0
    check(*work)
    assert counts(layers) == (0, 3)
    assert sum(peer.handler.activations.num_lost for peer in peers.peers if peer.handler is not None) == 3
    stats = layers.stats()
    assert (stats.failovers, stats.reroutes, stats.stall_seconds) == (0, 0, 0.0)


def test_second_backward_of_a_graph_recomputes(peers: InlineSwarm, local: PreTrainedModel) -> None:
    layers = peers.layers()
    ours, theirs, loss, expected = both(layers, local)
    for total in (loss, expected):
        total.backward(retain_graph=True)
        total.backward(retain_graph=True)
    assert torch.equal(grad_of(ours), grad_of(theirs))
    assert counts(layers) == (3, 3)
    assert sum(peer.handler.activations.num_lost for peer in peers.peers if peer.handler is not None) == 0


def test_switched_off_nothing_is_kept(checkpoint: Path, local: PreTrainedModel) -> None:
    with InlineSwarm(checkpoint, SPANS, config=ClientConfig(retain_activations_s=0.0)) as peers:
        layers = peers.layers()
        work = both(layers, local)
        assert num_kept(peers) == 0
        check(*work)
        assert counts(layers) == (0, 3)


def test_passes_without_gradient_keep_nothing(peers: InlineSwarm) -> None:
    layers = peers.layers()
    layers(noise(2, 7))
    with torch.no_grad():
        layers(noise(2, 7).requires_grad_())
    assert num_kept(peers) == 0


def test_graph_lost_with_its_peer_is_recomputed_elsewhere(checkpoint: Path, local: PreTrainedModel) -> None:
    with InlineSwarm(checkpoint, SPANS * 2, config=NEVER_HEDGE) as peers:
        layers = peers.layers()
        work = both(layers, local)
        lost = peers.swarm.peer_of(layers.stats().route[1].peer_id)

        async def crash() -> None:
            lost.crash()

        peers.io.run(crash())
        check(*work)
        assert counts(layers) == (2, 1)
        assert layers.stats().failovers == 1


def test_rival_of_a_slow_peer_keeps_nothing(checkpoint: Path, local: PreTrainedModel) -> None:
    with InlineSwarm(checkpoint, SPANS * 2) as peers:
        layers = peers.layers()
        for seed in range(4):  # so that it is known how long they take
            check(*both(layers, local, seed))
        slow = peers.peers[1]
        slow.device.ailment = Ailment("slow", slowness=1000.0)
        passes: list[tuple[torch.Tensor, ...]] = []
        while not layers.stats().hedges_won:
            assert len(passes) < 20, "the slow peer was never asked"
            passes.append(both(layers, local, len(passes)))
        slow.device.ailment = None
        kept, _ = counts(layers)
        assert num_kept(peers) == len(SPANS) * len(passes) - 1
        for work in passes:
            check(*work)
        assert counts(layers) == (kept + len(SPANS) * len(passes) - 1, 1)


def test_reconnected_client_recomputes(peers: InlineSwarm, local: PreTrainedModel) -> None:
    layers = peers.layers()
    work = both(layers, local)

    async def disconnect() -> None:
        for connection in layers._handle.swarm._connections.values():
            connection.abort()
        await asyncio.sleep(1.0)

    peers.io.run(disconnect())
    assert num_kept(peers) == 0
    check(*work)
    assert counts(layers) == (0, 3)
