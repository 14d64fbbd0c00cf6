"""Deep prompts: vectors that are added to what a block takes at the first positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapted_item import Batch, Item

__all__ = ["prompted_arguments"]


def prompted_arguments(
    items: Sequence[Item], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's arguments with all prompts in its hidden states.

    Raises:
        UnsupportedCallError: hidden states that a prompt does not fit.
    """
    hidden_states = args[0] if args else kwargs["hidden_states"]
    for item in items:
        hidden_states = _prompted(item, hidden_states, batch.position)
    return ((hidden_states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_states})


def _prompted(item: Item, hidden_states: torch.Tensor, position: int) -> torch.Tensor:
    prompt = item.tensors[0]
    if hidden_states.dim() != 3 or hidden_states.shape[-1] != prompt.shape[-1]:
        got, own = list(hidden_states.shape), list(prompt.shape)
        raise UnsupportedCallError(f"prompt of block {item.entry.block} is {own}, but hidden states are {got}")
    part = prompt[position : position + hidden_states.shape[1]].to(hidden_states.dtype)
    count = part.shape[0]
    if count == 0:
        return hidden_states
    return torch.cat([hidden_states[:, :count] + part, hidden_states[:, count:]], dim=1)
