"""transformers' Trainer, or TRL's SFTTrainer, through a swarm, with swarm metrics in the logs.

    python examples/train_trainer.py [--steps N] [--sft]

LoRA on licence texts, as in `train_lora.py`. Halfway a peer is killed, and training goes on. At the end the adapter is
saved, loaded into the whole model in this process, and compared: it is an ordinary peft adapter.
"""

import argparse
import tempfile
from typing import Any

import torch
from licence_texts import licence_texts, windows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from remote_modules import ClientConfig, RemoteModulesTrainerCallback, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers
NUM_TOKENS = 64


class KillPeer(TrainerCallback):
    """Kills the peer that ran the last blocks before step ``step``."""

    def __init__(self, swarm: LocalSwarm, step: int) -> None:
        self.swarm = swarm
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            peer_id = kwargs["model"].get_base_model().model.layers.stats().route[-1].peer_id
            next(peer for peer in self.swarm.peers if peer.peer_id == peer_id).kill()


def trainer_of(model: Any, tokenizer: Any, options: argparse.Namespace, folder: str) -> Trainer:
    texts = licence_texts().training
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 4e-3,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    if options.sft:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        lines = [line for text in texts for line in text.splitlines()]
        arguments = SFTConfig(**common, bf16=False, max_length=NUM_TOKENS)  # TRL's default is bf16
        data = Dataset.from_dict({"text": lines})
        return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    rows = windows(tokenizer, texts, NUM_TOKENS)
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=TrainingArguments(**common), train_dataset=examples)


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> float:
    model.eval()
    return float(model(input_ids=rows, labels=rows, use_cache=False).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trainer and SFTTrainer through a swarm")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sft", action="store_true", help="TRL's SFTTrainer")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as at the peers: numbers are equal to the last bit
    tokenizer = AutoTokenizer.from_pretrained(built_in_path(), model_max_length=1 << 30)
    held_out = windows(tokenizer, licence_texts().validation, NUM_TOKENS)[:8]
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with (
        LocalSwarm(built_in_path(), spans=["0:4", "4:8", "4:8"], num_threads=1) as swarm,
        tempfile.TemporaryDirectory() as folder,
    ):
        base: Any = load(built_in_path(), trackers=swarm.trackers, mdns=False, config=ALONE)
        torch.manual_seed(0)
        model = get_peft_model(base, lora)
        trainer = trainer_of(model, tokenizer, options, folder)
        trainer.remove_callback(PrinterCallback)  # it prints each log as a dict of 30 entries; some of them are below
        RemoteModulesTrainerCallback().add_to(trainer)
        trainer.add_callback(KillPeer(swarm, options.steps // 2))
        trainer.train()
        trainer.save_model(folder)
        for entry in trainer.state.log_history:
            if "loss" in entry:
                loss, sent = float(entry["loss"]), entry["swarm/bytes_sent"] / 1e6
                failovers = entry["swarm/failovers"]
                print(f"step {entry['step']}: loss {loss:.4f}, {failovers:.0f} failovers, {sent:.1f} MB sent")
        remote = loss_of(model, held_out)
        base.model.layers.close()
        local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(built_in_path()), folder)
        print(f"held-out loss {remote:.6f}, of the saved adapter on the local model {loss_of(local, held_out):.6f}")


if __name__ == "__main__":
    main()
