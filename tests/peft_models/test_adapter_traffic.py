"""What travels of an adapter: what changed, once to each peer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from remote_modules import RemoteSequential
from remote_modules.testing import LocalSwarm
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.wire import messages

from .conftest import adapted, assert_equal, layers_of, logits, lora, shake, table, train_step, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LARGE: dict[str, Any] = {"r": 64, "target_modules": "all-linear"}  # what describes a tensor is little beside it
SHARE = 0.02


@pytest.fixture
def remote(swarm: InlineSwarm) -> PeftModel:
    return adapted(swarm.load(), lora(**LARGE))


def size_of(model: PeftModel) -> int:
    return sum(parameter.nbytes for parameter in table.trainable(model).values())


def traffic(model: PeftModel, work: Callable[[], object]) -> tuple[int, int, int]:
    """Bytes sent, adapters' bytes and adapters sent by ``work``."""
    before = layers_of(model).stats()
    work()
    after = layers_of(model).stats()
    return (
        after.bytes_sent - before.bytes_sent,
        after.adapter_bytes - before.adapter_bytes,
        after.adapters_sent - before.adapters_sent,
    )


def step(model: PeftModel) -> None:
    train_step(model)


def held_by(swarm: InlineSwarm) -> list[Any]:
    return [peer.handler.adapters for peer in swarm.peers if peer.handler is not None]


def test_each_step_sends_what_changed_once_to_each_peer(remote: PeftModel, swarm: InlineSwarm) -> None:
    step(remote)
    plain, nothing, _ = traffic(remote, lambda: step(remote))
    assert nothing == 0
    for _ in range(3):
        received = [store.bytes_received for store in held_by(swarm)]
        shake(remote)
        sent, adapter_bytes, adapters_sent = traffic(remote, lambda: step(remote))
        size = size_of(remote)
        assert adapter_bytes == size
        assert size <= sent - plain <= size * (1 + SHARE)
        assert adapters_sent == len(swarm.peers)
        now = [store.bytes_received for store in held_by(swarm)]
        assert sum(now) - sum(received) == size
        assert all(after > before for before, after in zip(received, now, strict=True))


def test_frozen_half_does_not_travel_again(remote: PeftModel) -> None:
    for name, parameter in remote.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    step(remote)
    plain = traffic(remote, lambda: step(remote))[0]
    shake(remote)
    sent, adapter_bytes, _ = traffic(remote, lambda: step(remote))
    assert adapter_bytes == size_of(remote)
    assert sent - plain <= size_of(remote) * (1 + SHARE)


def test_unchanged_adapter_travels_once_for_all_lanes_and_spans(remote: PeftModel) -> None:
    first = traffic(remote, lambda: step(remote))[1]
    assert first >= size_of(remote)
    layers = layers_of(remote)
    hidden_states = torch.randn(1, 3, 32)
    assert traffic(remote, lambda: logits(remote, use_cache=True))[1:] == (0, 0)  # sessions have a lane of their own
    assert traffic(remote, lambda: table.generated(remote))[1:] == (0, 0)
    assert traffic(remote, lambda: layers[1:2](hidden_states))[1:] == (0, 0)
    assert traffic(remote, lambda: layers[0:2](hidden_states))[1:] == (0, 0)


def test_adapters_that_take_turns_travel_once(remote: PeftModel) -> None:
    remote.add_adapter("second", lora(**LARGE))
    step(remote)
    remote.set_adapter("second")
    shake(remote)
    step(remote)
    for name in ("default", "second", "default"):
        remote.set_adapter(name)
        assert traffic(remote, lambda: step(remote))[1:] == (0, 0)


def test_content_that_another_client_brought_is_kept_once(swarm: InlineSwarm, remote: PeftModel) -> None:
    expected = logits(remote)
    held = [store.num_bytes for store in held_by(swarm)]
    twin = adapted(swarm.load(), lora(**LARGE))
    assert torch.equal(logits(twin), expected)
    assert [store.num_bytes for store in held_by(swarm)] == held


def test_adapter_is_gone_after_its_lease_and_comes_again(
    remote: PeftModel, local: PreTrainedModel, swarm: InlineSwarm
) -> None:
    oracle = adapted(local, lora(**LARGE))
    for _ in range(2):
        assert_equal(train_step(remote), train_step(oracle))
        for store in held_by(swarm):
            assert len(store) == 1
            store._lease_s = 0.0
            store.expire()
            assert len(store) == store.num_bytes == 0
    assert layers_of(remote).stats().failovers == 0


def test_parts_that_a_peer_lost_are_sent_again(remote: PeftModel, local: PreTrainedModel, swarm: InlineSwarm) -> None:
    """A peer lost what did not change, too: what changed alone would not do."""
    oracle = adapted(local, lora(**LARGE))
    for model in (remote, oracle):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    assert_equal(train_step(remote), train_step(oracle))
    for store in held_by(swarm):
        for name in list(store._held):
            store._drop(name)
    for model in (remote, oracle):
        torch.manual_seed(3)
        shake(model)
    received = sum(store.bytes_received for store in held_by(swarm))
    assert_equal(train_step(remote), train_step(oracle))
    assert sum(store.bytes_received for store in held_by(swarm)) - received > 1.5 * size_of(remote)
    assert layers_of(remote).stats().failovers == 0


def test_sides_that_speak_an_older_minor_send_it_whole_once_for_each_connection(
    checkpoint: Path, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "VERSION_MINOR", 2)
    oracle = adapted(local, lora(**LARGE))
    with InlineSwarm(checkpoint, ["0:2", "2:4"]) as swarm:
        remote = adapted(swarm.load(), lora(**LARGE))
        assert_equal(train_step(remote), train_step(oracle))
        assert all(name.startswith("1 ") for store in held_by(swarm) for name in store._held)
        assert traffic(remote, lambda: step(remote))[1:] == (0, 0)
        shake(remote)
        assert traffic(remote, lambda: step(remote))[1] > size_of(remote)
        assert traffic(remote, lambda: table.generated(remote))[2] == len(swarm.peers)  # another connection


def test_passes_that_begin_together_send_it_once(checkpoint: Path, local: PreTrainedModel) -> None:
    """1. Several threads call the model at once. 2. One brings the adapter. 3. All get what the local model gives."""
    expected = logits(adapted(local, lora(**LARGE)))
    with LocalSwarm(checkpoint, spans=["0:4"], mode="thread") as swarm:
        model: Any = whole(checkpoint)
        with RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False) as layers:
            model.model.layers = layers
            remote = adapted(model, lora(**LARGE))
            start, found = threading.Barrier(6), []

            def call(use_cache: bool) -> None:
                start.wait(timeout=30.0)
                found.append(logits(remote, use_cache=use_cache))

            threads = [threading.Thread(target=call, args=(number % 2 == 0,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=60.0)
            stats = layers.stats()
    assert len(found) == 6
    assert all(torch.equal(one, expected) for one in found)
    assert stats.adapters_sent == 1
