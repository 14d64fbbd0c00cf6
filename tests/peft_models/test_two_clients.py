"""Clients that train different adapters at the same time, on the same peers."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.testing import LocalSwarm

from .conftest import adapted, lora, table, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NUM_STEPS = 15
TASKS: dict[str, dict[str, Any]] = {
    "one": {"target_modules": "all-linear", "use_dora": True},
    "two": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 8},
}


def train(model: nn.Module, seed: int, together: threading.Barrier | None = None) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(list(table.trainable(model).values()), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(NUM_STEPS):
        tokens = torch.randint(1, 96, (2, 11), generator=generator)
        if together is not None:
            together.wait(timeout=60.0)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in table.trainable(model).values()]


def gauge(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10.0) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def remote(checkpoint: Path, swarm: LocalSwarm, options: dict[str, Any], seed: int) -> tuple[Any, RemoteSequential]:
    model: Any = whole(checkpoint)
    config = ClientConfig(peer_cache=None)
    layers = RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False, config=config)
    model.model.layers = layers
    return adapted(model, lora(**options), seed=seed).train(), layers


def test_each_curve_equals_its_solo_run(checkpoint: Path) -> None:
    solo: dict[str, tuple[list[float], list[torch.Tensor]]] = {}
    for seed, (name, options) in enumerate(TASKS.items()):
        local = adapted(whole(checkpoint), lora(**options), seed=seed).train()
        solo[name] = train(local, seed), values(local)
    with LocalSwarm(checkpoint, spans=["0:2", "2:4"], mode="process", num_threads=1) as swarm:
        clients = {n: remote(checkpoint, swarm, options, seed) for seed, (n, options) in enumerate(TASKS.items())}
        together, curves = threading.Barrier(len(TASKS)), dict[str, list[float]]()

        def run(name: str, seed: int) -> None:
            curves[name] = train(clients[name][0], seed, together)

        threads = [threading.Thread(target=run, args=(name, seed)) for seed, name in enumerate(TASKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=180.0)
        num_held = [gauge(peer.address, "remote_modules_adapters") for peer in swarm.peers]
        stats = {name: layers.stats() for name, (_, layers) in clients.items()}
        for _, layers in clients.values():
            layers.close()
    assert curves == {name: losses for name, (losses, _) in solo.items()}
    for name, (model, _) in clients.items():
        assert solo[name][0][-1] != solo[name][0][0]
        for ours, theirs in zip(values(model), solo[name][1], strict=True):
            assert torch.equal(ours, theirs)
        assert stats[name].adapters_sent == NUM_STEPS * len(num_held)
        assert stats[name].failovers == 0
    assert all(count > len(TASKS) for count in num_held)  # versions of both
