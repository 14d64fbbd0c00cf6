"""`benchmarks/finetune.py` at its quick size: kills land inside requests, and what differs from local is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm


@pytest.fixture(scope="module")
def finetune() -> Iterator[Any]:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_benchmark("finetune")
    torch.set_num_threads(before)


@pytest.fixture
def swarm(finetune: Any) -> Iterator[LocalSwarm]:
    with LocalSwarm(built_in_path(), spans=finetune.SPANS * 2, num_threads=1) as swarm:
        yield swarm


@pytest.mark.timeout(300)  # six processes are started
def test_killed_process_inside_a_backward_changes_no_loss(finetune: Any) -> None:
    bench = finetune.Bench(finetune.Task(steps=10), 1)
    bench.run(["kills"])
    assert [bar.name for bar in bench.bars if not bar.is_met] == []
    assert len(bench.bars) == 5
    (hit,) = bench.result["kills"]["hits"]
    assert hit["kind"] == "backward"
    assert hit["error"]
    assert bench.result["kills"]["largest_loss_difference"] == 0.0


def test_two_clients_at_once_train_as_each_does_alone(
    finetune: Any, swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "REST_S", 0.1)
    bench = finetune.Bench(finetune.Task(steps=6), 1, mode="thread")
    bench.kills(swarm)
    bench.clients(swarm)  # of whom the lost peer is there again
    assert [bar.name for bar in bench.bars if not bar.is_met] == []
    assert len(bench.bars) == 8


def test_bfloat16_gradients_are_near_the_local_ones(finetune: Any) -> None:
    bench = finetune.Bench(finetune.Task(), 1, mode="thread")
    bench.run(["bfloat16"])
    assert [bar.name for bar in bench.bars if not bar.is_met] == []
    assert len(bench.bars) == 2


def test_training_that_differs_from_the_local_one_is_seen(
    finetune: Any, swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = finetune._local

    def shifted(task: Any, **options: Any) -> Any:
        model = local(task, **options)
        with torch.no_grad():
            model.get_base_model().model.layers[4].mlp.up_proj.lora_B.default.weight.add_(1e-2)
        return model

    monkeypatch.setattr(finetune, "_local", shifted)
    monkeypatch.setattr(finetune, "REST_S", 0.1)
    bench = finetune.Bench(finetune.Task(steps=6), 1, mode="thread")
    bench.kills(swarm)
    assert [bar.name for bar in bench.bars if not bar.is_met] == [
        "largest difference of a loss to local",
        "final adapter, relative difference to local",
    ]


def test_kill_that_would_come_after_the_answer_is_tried_again_sooner(finetune: Any, swarm: LocalSwarm) -> None:
    span = finetune.Span(3, 6)
    killer = finetune.Killer(swarm, [finetune.Fault(1, "backward", span, 1000.0)])
    model = finetune._remote(swarm, finetune.Task())
    with killer.watching():
        finetune.train(
            model, finetune.Task(steps=3), torch.arange(500), before_step=lambda n: setattr(killer, "step", n)
        )
    finetune._close(model)
    assert killer.hits == []
    assert killer.lost == []
    assert [fault.moment for fault in killer.due] == [250.0]  # halved in steps 1 and 2


def test_places_differ_in_span_and_step_and_follow_from_the_seed(finetune: Any) -> None:
    for seed in range(20):
        faults = finetune.place(seed, 200, ["backward", "forward", "backward"])
        assert faults == finetune.place(seed, 200, ["backward", "forward", "backward"])
        assert len({str(fault.span) for fault in faults}) == len({fault.step for fault in faults}) == 3
        assert all(2 <= fault.step < 180 for fault in faults)
