"""Backwards from graphs that peers kept, and without those that they lost: the gradients of the local model."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.client.adapters import CallAdapter
from remote_modules.client.call import CallArguments
from remote_modules.client.passes import backward, forward
from remote_modules.client.traces import Wanted
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import AdapterSet
from remote_modules.spans import Span
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.testing.simulated_device import Ailment

from .conftest import HIDDEN_SIZE, grad_of, noise, run_locally

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


def settle(peers: InlineSwarm) -> None:
    peers.io.run(asyncio.sleep(1.0))


def test_graph_dropped_without_a_backward_is_released(peers: InlineSwarm, local: PreTrainedModel) -> None:
    layers = peers.layers()
    dropped, used = both(layers, local), both(layers, local, seed=1)
    assert num_kept(peers) == 2 * len(SPANS)
    del dropped
    gc.collect()
    settle(peers)
    assert num_kept(peers) == len(SPANS)
    check(*used)
    assert counts(layers) == (3, 0)


PROJECTIONS = {  # outputs and inputs
    "mlp.up_proj": (96, HIDDEN_SIZE),
    "mlp.gate_proj": (96, HIDDEN_SIZE),
    "mlp.down_proj": (HIDDEN_SIZE, 96),
    "self_attn.q_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
    "self_attn.o_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
}


def trained_pass(blocks: Sequence[int], modules: Sequence[str] = ("mlp.up_proj",), count: int = 1) -> CallArguments:
    """A pass with ``count`` LoRA at each of ``modules``."""
    generator = torch.Generator().manual_seed(3)
    entries = [Lora(block, module, 0.5) for block in blocks for module in modules for _ in range(count)]
    sizes = [PROJECTIONS[entry.module] for entry in entries]
    shapes = [shape for num_outputs, num_inputs in sizes for shape in ((1, num_inputs), (num_outputs, 1))]
    tensors = tuple(torch.randn(shape, generator=generator) * 0.01 for shape in shapes)
    adapter = CallAdapter(AdapterSet(tuple(entries), tensors))
    return CallArguments(rows=2, num_tokens=7, with_grad=True, adapter=adapter)


@pytest.mark.parametrize("is_known", [True, False], ids=["in-forward", "in-backward"])
def test_hops_that_need_no_backward_keep_nothing(peers: InlineSwarm, is_known: bool) -> None:
    """Known at once, they are not asked to keep their graphs; known later, they are told to drop them."""
    layers = peers.layers()
    swarm = layers._handle.swarm
    call, inputs = trained_pass([4]), {"hidden_states": noise(2, 7)}
    wanted = Wanted(frozenset(), frozenset({0, 1}))
    work = forward(swarm, Span(0, 8), inputs, call, wanted if is_known else None)
    outputs, _, trace = peers.io.run(work)
    assert num_kept(peers) == (2 if is_known else 3)
    _, grads = peers.io.run(
        backward(swarm, trace, {"hidden_states": torch.ones_like(outputs["hidden_states"])}, wanted)
    )
    settle(peers)
    assert num_kept(peers) == 0
    assert counts(layers) == (2, 0)
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    assert not trace.is_kept


def test_forward_that_fails_releases_what_its_hops_kept(peers: InlineSwarm) -> None:
    layers = peers.layers()
    swarm = layers._handle.swarm
    call, inputs = trained_pass([4]), {"hidden_states": noise(2, 7)}
    peers.peers[2].device.ailment = Ailment("slow", slowness=1e9)

    async def give_up() -> None:
        work = asyncio.ensure_future(forward(swarm, Span(0, 8), inputs, call))
        await asyncio.sleep(1.0)
        assert num_kept(peers) == 2
        work.cancel()
        await asyncio.wait([work])
        await asyncio.sleep(1.0)

    peers.io.run(give_up())
    assert num_kept(peers) == 0


def test_adapter_of_more_tensors_than_a_message_brings(checkpoint: Path) -> None:
    """One peer gets 1,200 tensors, ahead of the request; what comes of it is what two peers with 600 each do."""
    found = []
    for spans in (["0:8"], ["0:4", "4:8"]):
        with InlineSwarm(checkpoint, spans, config=NEVER_HEDGE) as peers:
            layers = peers.layers()
            swarm, call = layers._handle.swarm, trained_pass(range(8), list(PROJECTIONS), 15)
            outputs, _, trace = peers.io.run(forward(swarm, Span(0, 8), {"hidden_states": noise(2, 7)}, call))
            grads = {"hidden_states": torch.ones_like(outputs["hidden_states"])}
            found.append((outputs["hidden_states"], peers.io.run(backward(swarm, trace, grads))[1]))
            requests = [peer.handler.num_requests.get("adapter", 0) for peer in peers.peers if peer.handler is not None]
            assert requests == ([3] if len(spans) == 1 else [2, 2])
            assert layers.stats().failovers == 0
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() == set(range(1200))
    assert all(torch.equal(found[0][1][number], found[1][1][number]) for number in range(1200))
