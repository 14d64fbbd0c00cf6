"""What the table needs on the local side: dropout with a peer's masks, and deep prompts by hooks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from _adapter_cases import NUM_VIRTUAL
from torch import nn
from transformers.cache_utils import Cache

from remote_modules import DeepPrompts, RemoteSequential
from remote_modules.model.block_prompt import BlockPrompt
from remote_modules.model.stack import find_stack

__all__ = ["add_deep_prompts", "deep_prompts", "same_dropout"]


def add_deep_prompts(model: Any) -> None:
    """Prompts of zeros in all blocks, local or remote, with parameters of the same names."""
    blocks = find_stack(model, model.config).blocks(model)
    if isinstance(blocks, RemoteSequential):
        DeepPrompts(blocks, NUM_VIRTUAL)
        return
    for index, block in enumerate(blocks):
        block.deep_prompt = BlockPrompt(NUM_VIRTUAL, model.config.hidden_size, dtype=torch.float32, device=None)
        block.register_forward_pre_hook(_adding(index), with_kwargs=True)


def deep_prompts(model: nn.Module) -> list[torch.Tensor]:
    """Their parameters, in the order of blocks."""
    return [module.weight for module in model.modules() if isinstance(module, BlockPrompt)]


def _adding(layer: int) -> Any:
    def add(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        position = 0 if cache is None else cache.get_seq_length(layer)
        part = block.deep_prompt.weight[position : position + hidden.shape[1]].to(hidden.dtype)
        hidden = torch.cat([hidden[:, : len(part)] + part, hidden[:, len(part) :]], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    return add


class _SameDropout(nn.Dropout):
    """Draws the mask that a peer draws for the same layer."""

    def __init__(self, p: float, path: str, seed: int) -> None:
        super().__init__(p)
        self.text = f"{seed} {path} 0"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.stack([self._draw(row, x.shape[1:]) for row in range(len(x))]) >= self.p
        return x * keep / (1.0 - self.p)

    def _draw(self, row: int, shape: torch.Size) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.text} {row}".encode()).digest()
        return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))


_BLOCK_PATH = re.compile(r"\.(\d+)\.(.+)")  # the first number in a name is the block's


@contextmanager
def same_dropout(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Inside, the dropouts of local LoRA layers draw the masks that peers draw."""
    kept: list[tuple[nn.ModuleDict, str, nn.Module]] = []
    for path, layer in model.named_modules():
        for name, dropout in dict(getattr(layer, "lora_dropout", {})).items():
            match = _BLOCK_PATH.search(path)
            if isinstance(dropout, nn.Dropout) and dropout.training and match is not None:
                kept.append((layer.lora_dropout, name, dropout))
                layer.lora_dropout[name] = _SameDropout(dropout.p, f"{match[1]} {match[2]}", seed)
    with patch("remote_modules.client.adapters._new_seed", return_value=seed):
        yield
    for place, name, dropout in kept:
        place[name] = dropout
