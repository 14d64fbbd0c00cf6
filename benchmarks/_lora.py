"""LoRA on the built-in model: the text, the adapter and the steps that several benchmarks share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoTokenizer

from remote_modules.model.checkpoint import built_in_path

__all__ = ["Curve", "Task", "adapted", "adapter_difference", "prose", "relative", "token_ids", "train"]

DOCS = Path(__file__).parents[1] / "docs"
MIN_PARAGRAPH = 200  # characters
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what; everything random follows from the seed."""

    seed: int = 0
    steps: int = 200
    rows: int = 4
    num_tokens: int = 64
    rank: int = 8
    rate: float = 1e-3

    def batch(self, ids: torch.Tensor, step: int) -> torch.Tensor:
        """Windows ``[rows, num_tokens]`` of the text."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        starts = torch.randint(len(ids) - self.num_tokens, (self.rows,), generator=generator)
        return torch.stack([ids[start : start + self.num_tokens] for start in starts.tolist()])


@dataclass(slots=True)
class Curve:
    """What training gave."""

    losses: list[float] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


def prose() -> str:
    """The paragraphs of this project's documentation: English that the built-in model was not trained on."""
    paragraphs: list[str] = []
    for path in sorted(DOCS.glob("*.md")):
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
        paragraphs += [" ".join(part.split()) for part in text.split("\n\n") if part.strip()[:1].isalpha()]
    return "\n\n".join(part for part in paragraphs if len(part) >= MIN_PARAGRAPH)


def token_ids() -> torch.Tensor:
    """Of `prose`."""
    return torch.tensor(AutoTokenizer.from_pretrained(built_in_path())(prose(), verbose=False)["input_ids"])


def adapted(model: Any, task: Task) -> Any:
    """``model`` with a fresh adapter of the task."""
    torch.manual_seed(task.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        return get_peft_model(model, LoraConfig(r=task.rank, lora_alpha=16, target_modules=TARGETS))


def train(
    model: Any, task: Task, ids: torch.Tensor, *, before_step: Callable[[int], object] = lambda step: None
) -> Curve:
    """Run the task's steps on the adapter of ``model``; ``before_step`` is called with the number of each."""
    curve = Curve()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.rate)
    for step in range(task.steps):
        before_step(step)
        batch = task.batch(ids, step)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(float(loss.detach()))
    curve.adapter = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return curve


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of ``theirs``, all tensors as one vector."""
    if list(ours) != list(theirs):
        raise SystemExit(f"expected tensors {sorted(theirs)[:3]}..., got {sorted(ours)[:3]}...")
    difference = sum(float((ours[name].double() - theirs[name].double()).pow(2).sum()) for name in theirs)
    return float((difference / sum(float(tensor.double().pow(2).sum()) for tensor in theirs.values())) ** 0.5)


def adapter_difference(ours: Curve, theirs: Curve) -> float:
    """`relative` of the final adapters."""
    return relative(ours.adapter, theirs.adapter)
