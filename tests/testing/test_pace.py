from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.model.replay import SpanModel
from remote_modules.testing import LocalSwarm
from remote_modules.testing.pace import Pace, paced


def test_time_is_that_of_blocks_and_tokens() -> None:
    assert Pace(0.5, 0.25).seconds(3, 2) == 3 * (0.5 + 2 * 0.25)
    assert Pace(0.5).seconds(2, 100) == 1.0


@pytest.mark.parametrize(("block_s", "token_s"), [(-1.0, 0.0), (0.0, -1.0), (float("nan"), 0.0)])
def test_negative_pace_is_refused(block_s: float, token_s: float) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Pace(block_s, token_s)


@pytest.mark.parametrize(("retain_s", "forwards"), [(0.0, 2), (60.0, 1)], ids=["recomputed", "kept"])
def test_paced_peer_answers_the_same_later_and_announces_its_pace(
    tmp_path: Path, retain_s: float, forwards: int
) -> None:
    folder = save_tiny(tmp_path)
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))

    def answer() -> tuple[torch.Tensor, torch.Tensor, float, float, float]:
        with LocalSwarm(folder, spans=["0:4"]) as swarm:
            config = ClientConfig(retain_activations_s=retain_s)
            with RemoteSequential.from_swarm(folder, trackers=swarm.trackers, mdns=False, config=config) as layers:
                layers(hidden)
                began_s = time.perf_counter()
                output = layers(hidden)
                took_s = time.perf_counter() - began_s
                inputs = hidden.clone().requires_grad_()
                loss = layers(inputs).sum()
                began_s = time.perf_counter()
                loss.backward()
                backward_s = time.perf_counter() - began_s
                assert layers.stats().kept_backwards == 2 - forwards
                (record,) = layers._handle.swarm.router.records.values()
        assert inputs.grad is not None
        return output, inputs.grad, took_s, backward_s, record.decode_tokens_per_s

    plain, plain_grad, _, _, fast = answer()
    original: Callable[..., Any] = SpanModel.run
    with paced(Pace(0.02)):
        slow, slow_grad, took_s, backward_s, speed = answer()
    assert SpanModel.run is original
    assert torch.equal(plain, slow)
    assert torch.equal(plain_grad, slow_grad)
    assert took_s >= 4 * 0.02
    assert backward_s >= forwards * 4 * 0.02
    assert speed <= 1 / 0.02 < fast
