"""transformers' Trainer with its callback: what is logged where, and resuming from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from remote_modules import RemoteModulesTrainerCallback, UnsupportedCallError, load
from remote_modules.testing import LocalSwarm

from . import loops
from .loops import NUM_STEPS, Outcome, adapted, arguments, assert_equal, rows, train_local, trained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft


class Reporter(TrainerCallback):
    """Keeps what it is told to log, as those for TensorBoard and the like do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer_of(model: Any, folder: Path, **changes: Any) -> Any:
    args = TrainingArguments(**arguments(folder, **changes))
    return loops.recording(Trainer)(model=model, args=args, train_dataset=loops.examples(rows()))


def test_metrics_reach_the_history_and_the_reporters(swarm: LocalSwarm, tmp_path: Path) -> None:
    base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
    trainer, reporter = trainer_of(adapted(base), tmp_path, max_steps=4, logging_steps=2), Reporter()
    trainer.add_callback(reporter)
    RemoteModulesTrainerCallback().add_to(trainer)
    trainer.train()
    stats = base.model.layers.stats()
    base.model.layers.close()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history] == [2, 4, 4]  # the last is the summary of the run
    assert [entry["swarm/steps"] for entry in history] == [4, 4, 0]
    assert sum(entry["swarm/bytes_received"] for entry in history) == stats.bytes_received
    assert [logs["swarm/bytes_sent"] for logs in reporter.logs] == [entry["swarm/bytes_sent"] for entry in history]


def test_model_without_remote_blocks_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(loops.whole(checkpoint)), tmp_path)
    trainer.add_callback(RemoteModulesTrainerCallback())
    with pytest.raises(UnsupportedCallError, match="expected a model with remote blocks, PeftModelForCausalLM has"):
        trainer.train()


def test_checkpoint_is_resumed_with_the_numbers_of_an_uninterrupted_run(swarm: LocalSwarm, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch; the second run has a new model and a new connection."""
    options: dict[str, Any] = {"lr_scheduler_type": "constant"}  # else the rate depends on the steps that are planned
    losses: list[float] = []
    for stop in (NUM_STEPS // 2, NUM_STEPS):
        base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
        model = adapted(base)
        saving = {"save_strategy": "steps", "save_steps": NUM_STEPS // 2, "max_steps": stop}
        trainer = trainer_of(model, tmp_path / "saved", **options, **saving)
        trainer.train(resume_from_checkpoint=stop == NUM_STEPS)
        base.model.layers.close()
        losses += trainer.losses

    def whole(model: Any, data: torch.Tensor, folder: Path) -> list[float]:
        return loops.trainer_of_transformers(model, data, folder, **options)

    assert_equal(Outcome(losses, trained(model)), train_local(whole, swarm.checkpoint, tmp_path))
