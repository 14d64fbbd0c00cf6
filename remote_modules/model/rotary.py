"""Rotary tables that remember the longest text seen: each session has its own memory.

Modules of "dynamic" rope type grow their frequencies with the longest text so far and keep them for the next call, so
two sessions on one model would change each other's results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["RotaryMemory", "follows_length"]

_LENGTH_TYPES = ("dynamic", "longrope")
_ATTRIBUTES = ("inv_freq", "original_inv_freq", "max_seq_len_cached", "attention_scaling")  # also "<layer type>_..."

Memory = list[dict[str, Any]]


class RotaryMemory:
    """What the rotary modules below ``owner`` remember; as they are now is how each session begins."""

    def __init__(self, owner: nn.Module) -> None:
        self._modules = _dynamic_modules(owner)
        self.initial = self.read()

    def read(self) -> Memory:
        return [
            {name: _copy(getattr(module, name)) for name in _names(module) if hasattr(module, name)}
            for module in self._modules
        ]

    def write(self, memory: Memory) -> None:
        for module, values in zip(self._modules, memory, strict=True):
            for name, value in values.items():
                setattr(module, name, _copy(value))


def follows_length(owner: nn.Module) -> bool:
    """Whether results depend on how a text was divided into steps, since rotary tables follow its length."""
    return any(_is_of(module, _LENGTH_TYPES) for module in owner.modules())


def _dynamic_modules(owner: nn.Module) -> list[nn.Module]:
    return [module for module in owner.modules() if _is_of(module, _LENGTH_TYPES)]


def _is_of(module: nn.Module, kinds: tuple[str, ...]) -> bool:
    rope_type = getattr(module, "rope_type", None)
    named = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    return any(isinstance(name, str) and any(kind in name for kind in kinds) for name in named)


def _names(module: nn.Module) -> list[str]:
    rope_type = getattr(module, "rope_type", None)
    prefixes = [f"{kind}_" for kind in rope_type] if isinstance(rope_type, dict) else [""]
    return [prefix + name for prefix in prefixes for name in _ATTRIBUTES] + ["max_seq_len_cached", "attention_scaling"]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
