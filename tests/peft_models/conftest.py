"""A tiny llama on three spans, in one thread; the same model in one piece is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from remote_modules.testing.inline_swarm import InlineSwarm

SPANS = ["0:1", "1:3", "3:4"]
VOCABULARY = 96


table = load_benchmark("adapters")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = table.save_family(tmp_path_factory.mktemp("llama"), "llama")
    return folder


@pytest.fixture
def local(checkpoint: Path) -> PreTrainedModel:
    return whole(checkpoint)


@pytest.fixture
def swarm(checkpoint: Path) -> Iterator[InlineSwarm]:
    with InlineSwarm(checkpoint, SPANS) as swarm:
        yield swarm


@pytest.fixture
def doubled(checkpoint: Path) -> Iterator[InlineSwarm]:
    """Two peers for each span."""
    with InlineSwarm(checkpoint, [*SPANS, *SPANS]) as swarm:
        yield swarm


def whole(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    return model


def crash(swarm: InlineSwarm, peer_id: str) -> None:
    async def crash() -> None:
        swarm.swarm.peer_of(peer_id).crash()

    swarm.io.run(crash())


def lora(**changes: Any) -> LoraConfig:
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    return LoraConfig(**options)


def adapted(model: PreTrainedModel, config: Any = None, *, seed: int = 1) -> PeftModel:
    """With adapters of random values."""
    torch.manual_seed(seed)
    peft_model: Any = get_peft_model(model, copy.deepcopy(config or lora()))
    shake(peft_model)
    peft_model.eval()
    assert isinstance(peft_model, PeftModel)
    return peft_model


def layers_of(model: PeftModel) -> Any:
    """The list of blocks."""
    base: Any = model.get_base_model()
    return base.model.layers


def shake(model: nn.Module) -> None:
    """Change what is trained, the same way for equal random states."""
    with torch.no_grad():
        for parameter in table.trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model: nn.Module, tokens: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=table.prompt() if tokens is None else tokens, **kwargs).logits
    return output


def train_step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=table.prompt(), labels=table.prompt()).loss
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in table.trainable(model).items()}


def assert_equal(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert any(grad.abs().max() > 0 for grad in theirs[1].values())
    for name, grad in theirs[1].items():
        assert torch.equal(ours[1][name], grad), name
