"""Training loops as people write them, each for a model of any kind; all give the loss of every step.

The model has LoRA in its blocks. A loop knows nothing of swarms: what happens in between is the model's forward hook.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from accelerate import Accelerator
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from remote_modules import RemoteModulesCallback, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm
from remote_modules.testing.local_peer import LocalPeer

NUM_STEPS = 30
KILL_AT = 10
BATCH = 2
RATE = 1e-2


class PeerKill:
    """A forward hook: SIGKILL for the peer that ran the last hop of step `KILL_AT`, between forward and backward."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self.swarm = swarm
        self.peer: LocalPeer | None = None
        self.count = 0

    def __call__(self, model: Any, inputs: object, output: object) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self.count += 1
        if self.count == KILL_AT:
            peer_id = model.model.layers.stats().route[-1].peer_id
            self.peer = next(peer for peer in self.swarm.peers if peer.peer_id == peer_id)
            self.peer.kill()


class Outcome(NamedTuple):
    """Losses of all steps, and what was trained."""

    losses: list[float]
    trained: dict[str, torch.Tensor]


Loop = Callable[[Any, torch.Tensor, Path], list[float]]


def train_remote(loop: Loop, swarm: LocalSwarm, kill: PeerKill, folder: Path) -> Outcome:
    """Train through the swarm, and lose a peer on the way."""
    base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
    base.register_forward_hook(kill)
    try:
        outcome = train(loop, base, folder / "remote")
        assert kill.peer is not None
        assert base.model.layers.stats().failovers >= 1
    finally:
        base.model.layers.close()
    return outcome


def train_local(loop: Loop, checkpoint: str | Path, folder: Path) -> Outcome:
    return train(loop, whole(checkpoint), folder / "local")


def whole(checkpoint: str | Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model


def train(loop: Loop, base: PreTrainedModel, folder: Path) -> Outcome:
    model = adapted(base)
    losses = loop(model, rows(), folder)
    return Outcome(losses, trained(model))


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(base: PreTrainedModel) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def rows() -> torch.Tensor:
    """Token ids ``[N, T]``: one batch for each step."""
    return torch.randint(3, 96, (NUM_STEPS * BATCH, 12), generator=torch.Generator().manual_seed(2))


def assert_equal(ours: Outcome, theirs: Outcome) -> None:
    """To the last bit."""
    assert len(theirs.losses) == NUM_STEPS
    assert len(set(theirs.losses)) > NUM_STEPS / 2, "something is learned"
    assert ours.losses == theirs.losses
    assert ours.trained.keys() == theirs.trained.keys()
    assert all(torch.equal(parameter, theirs.trained[name]) for name, parameter in ours.trained.items())


def plain(model: Any, data: torch.Tensor, folder: Path | None = None) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for batch in data.split(BATCH):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accelerated(model: Any, data: torch.Tensor, folder: Path) -> list[float]:
    """With gradient accumulation: the optimizer steps after each second batch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loader: Any = DataLoader(data, batch_size=BATCH)  # type: ignore[arg-type]  # a tensor is a dataset
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def examples(data: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in data]


def recording(trainer_class: type[Trainer]) -> Any:
    """A subclass that keeps the unrounded loss of every step in ``losses``."""

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        losses: list[float]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            self.__dict__.setdefault("losses", []).append(loss.item())
            return loss

    return Recording


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of `TrainingArguments` and its subclasses."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": NUM_STEPS,
        "learning_rate": RATE,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return options | changes


def trainer_of_transformers(model: Any, data: torch.Tensor, folder: Path, **changes: Any) -> list[float]:
    trainer = recording(Trainer)(
        model=model, args=TrainingArguments(**arguments(folder, **changes)), train_dataset=examples(data)
    )
    trainer.train()
    losses: list[float] = trainer.losses
    return losses


def supervised(model: Any, data: torch.Tensor, folder: Path, **changes: Any) -> list[float]:
    """TRL. Its defaults are bf16 and gradient checkpointing."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    texts = Dataset.from_dict({"text": [" ".join(map(str, row.tolist())) for row in data]})
    trainer = recording(SFTTrainer)(
        model=model,
        args=SFTConfig(**arguments(folder, bf16=False, max_length=24, **changes)),
        train_dataset=texts,
        processing_class=AutoTokenizer.from_pretrained(built_in_path()),
    )
    trainer.train()
    losses: list[float] = trainer.losses
    return losses


class Lit(lightning.LightningModule):
    """The model, and the losses of its steps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=RATE)


def lightning_trainer(folder: Path, **changes: Any) -> lightning.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": NUM_STEPS,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "logger": CSVLogger(folder, name="", version=""),
    }
    return lightning.Trainer(**(options | changes))


def lit(model: Any, data: torch.Tensor, folder: Path) -> list[float]:
    module = Lit(model.train())  # transformers loads models in eval mode, and Lightning leaves that as it is
    is_remote = hasattr(model.get_base_model().model.layers, "stats")
    trainer = lightning_trainer(folder, callbacks=[RemoteModulesCallback()] if is_remote else [])
    trainer.fit(module, DataLoader(data, batch_size=BATCH))  # type: ignore[arg-type]  # a tensor is a dataset
    return module.losses
