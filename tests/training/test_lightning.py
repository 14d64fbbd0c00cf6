"""Lightning with its callback: equal losses though a peer is lost, what is logged, and resuming from a checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from remote_modules import RemoteModulesCallback, UnsupportedCallError, load
from remote_modules.testing import LocalSwarm

from . import loops
from .loops import BATCH, NUM_STEPS, PeerKill, adapted, assert_equal, rows, train, train_local, train_remote, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),  # advice of Lightning
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows that the callback wrote."""
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["swarm/steps"]]


def test_losses_are_the_local_ones_and_the_failover_is_logged(
    swarm: LocalSwarm, kill: PeerKill, tmp_path: Path
) -> None:
    assert_equal(train_remote(loops.lit, swarm, kill, tmp_path), train_local(loops.lit, swarm.checkpoint, tmp_path))
    logs = logged(tmp_path / "remote")
    assert [int(row["step"]) for row in logs] == list(range(NUM_STEPS))
    assert float(logs[loops.KILL_AT - 1]["swarm/failovers"]) >= 1
    assert all(float(row["swarm/steps"]) == 2 for row in logs)  # a forward and a backward
    assert all(float(row["swarm/bytes_sent"]) > 0 for row in logs)
    assert all(float(row["swarm/hop_seconds/0:2"]) > 0 for row in logs)


def test_nothing_between_two_logs_is_lost(swarm: LocalSwarm, tmp_path: Path) -> None:
    base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
    module = loops.Lit(adapted(base).train())
    trainer = loops.lightning_trainer(tmp_path, log_every_n_steps=4, max_steps=6, callbacks=[RemoteModulesCallback()])
    trainer.fit(module, DataLoader(rows(), batch_size=BATCH))  # type: ignore[arg-type]  # a tensor is a dataset
    stats = base.model.layers.stats()
    base.model.layers.close()
    logs = logged(tmp_path)
    assert [int(row["step"]) for row in logs] == [3, 5]
    assert sum(float(row["swarm/steps"]) for row in logs) == stats.steps == 12
    assert sum(float(row["swarm/bytes_sent"]) for row in logs) == stats.bytes_sent


def test_model_without_remote_blocks_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    def loop(model: Any, data: torch.Tensor, folder: Path) -> list[float]:
        trainer = loops.lightning_trainer(folder, callbacks=[RemoteModulesCallback()])
        trainer.fit(loops.Lit(model.train()), DataLoader(data, batch_size=BATCH))  # type: ignore[arg-type]
        return []

    with pytest.raises(UnsupportedCallError, match="expected a model with remote blocks, Lit has none"):
        train_local(loop, checkpoint, tmp_path)


def test_checkpoint_is_resumed_with_the_numbers_of_an_uninterrupted_run(swarm: LocalSwarm, tmp_path: Path) -> None:
    """Stopped after the first of three epochs; the second run has a new model and a new connection."""
    epoch = rows()[: BATCH * NUM_STEPS // 3]
    losses: list[float] = []
    for name, num_epochs in (("first", 1), ("second", 3)):
        base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
        saver = ModelCheckpoint(tmp_path / "saved", filename="last", save_on_train_epoch_end=True)
        trainer = loops.lightning_trainer(
            tmp_path / name,
            max_steps=-1,
            max_epochs=num_epochs,
            enable_checkpointing=True,
            callbacks=[RemoteModulesCallback(), saver],
        )
        module = loops.Lit(adapted(base).train())
        loader: Any = DataLoader(epoch, batch_size=BATCH)  # type: ignore[arg-type]  # a tensor is a dataset
        saved = None if name == "first" else tmp_path / "saved" / "last.ckpt"
        trainer.fit(module, loader, ckpt_path=saved, weights_only=False)
        base.model.layers.close()
        losses += module.losses
    local = loops.whole(swarm.checkpoint)
    expected = train(lambda model, _, folder: loops.lit(model, epoch, folder), local, tmp_path / "local")
    assert_equal(loops.Outcome(losses, trained(module.model)), expected)
