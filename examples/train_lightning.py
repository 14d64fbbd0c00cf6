"""Lightning through a swarm: a LightningModule, its Trainer, swarm metrics in its logger, a checkpoint that resumes.

    python examples/train_lightning.py [--epochs N]

LoRA on licence texts, as in `train_lora.py`. Training stops after the first epoch; a new model on a new connection goes
on from the checkpoint. In the last epoch a peer is killed, and training goes on. It prints what the loggers got.
"""

import argparse
import csv
import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from licence_texts import licence_texts, windows
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from remote_modules import ClientConfig, RemoteModulesCallback, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers
NUM_TOKENS = 64
BATCH = 4
STEPS = 5  # of an epoch


class Licences(lightning.LightningModule):
    """The built-in model, its blocks in a swarm, with LoRA inside of them."""

    def __init__(self, trackers: list[str]) -> None:
        super().__init__()
        self.base: Any = load(built_in_path(), trackers=trackers, mdns=False, config=ALONE)
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(self.base, lora).train()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=4e-3)


class KillPeer(lightning.Callback):
    """Kills the peer that ran the last blocks before the second step of epoch ``epoch``."""

    def __init__(self, swarm: LocalSwarm, epoch: int) -> None:
        self.swarm = swarm
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            peer_id = pl_module.base.model.layers.stats().route[-1].peer_id
            next(peer for peer in self.swarm.peers if peer.peer_id == peer_id).kill()


def fit(swarm: LocalSwarm, rows: torch.Tensor, folder: Path, num_epochs: int, checkpoint: Path | None) -> None:
    """Train up to ``num_epochs`` epochs, from ``checkpoint`` if there is one."""
    torch.manual_seed(0)
    module = Licences(swarm.trackers)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=num_epochs,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name=f"to-epoch-{num_epochs}", version=""),
        callbacks=[
            RemoteModulesCallback(),
            ModelCheckpoint(folder / "saved", filename="last", save_on_train_epoch_end=True),
            *([KillPeer(swarm, num_epochs - 1)] if checkpoint is not None else []),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=BATCH), ckpt_path=checkpoint)  # type: ignore[arg-type]
    module.base.model.layers.close()
    with (folder / f"to-epoch-{num_epochs}" / "metrics.csv").open() as file:
        entries = list(csv.DictReader(file))
    losses = {entry["step"]: entry["loss"] for entry in entries if entry["loss"]}
    for entry in entries:
        if entry["swarm/steps"]:
            loss, failovers = float(losses[entry["step"]]), float(entry["swarm/failovers"])
            sent = float(entry["swarm/bytes_sent"]) / 1e6
            print(f"step {int(entry['step']) + 1}: loss {loss:.4f}, {failovers:.0f} failovers, {sent:.1f} MB sent")


def main() -> None:
    parser = argparse.ArgumentParser(description="Lightning through a swarm")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # as at the peers: numbers are equal to the last bit
    tokenizer = AutoTokenizer.from_pretrained(built_in_path(), model_max_length=1 << 30)
    rows = windows(tokenizer, licence_texts().training, NUM_TOKENS)[: BATCH * STEPS]
    with (
        LocalSwarm(built_in_path(), spans=["0:4", "4:8", "4:8"], num_threads=1) as swarm,
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        fit(swarm, rows, folder, 1, None)
        fit(swarm, rows, folder, options.epochs, folder / "saved" / "last.ckpt")


if __name__ == "__main__":
    main()
