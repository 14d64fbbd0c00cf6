"""`DeepPrompts`: trainable vectors at the first positions of what every remote block takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from remote_modules.client.sequential import RemoteSequential
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.block_prompt import BlockPrompt

__all__ = ["DeepPrompts"]

_NAME = "deep_prompt"


class DeepPrompts(nn.Module):
    """Vectors ``[P, D]`` for each remote block, added to what it takes at the first P positions; zeros at first.

    They are parameters here and are applied at the peers, in training and with a KV cache: only what lies at positions
    below P is changed, however the tokens are split into calls. Positions are those of the tensors: with padding at
    the left, the first P are padding in some rows. Give the prompt places of its own there with input prompts
    (peft's ``PromptTuningConfig(num_virtual_tokens=P)``), which then are in front of the padding.

    Each remote block holds its own as ``deep_prompt.weight``, so that a model's ``parameters()`` and ``state_dict()``
    contain them; those of this module are the same ones, for an optimizer and a file of their own. peft freezes what
    is there before: call `get_peft_model` first.

    Args:
        layers: all remote blocks, or a slice of them.
        num_tokens: P.
        dtype, device: of the parameters; they are rounded to the dtype of the hidden states when they are added.

    Raises:
        ValueError: ``num_tokens`` is not positive, or a block has a deep prompt already.
        UnsupportedCallError: hidden states of this architecture are not ``[B, T, D]``.

    Source: deep prompt tuning as in Petals' ``deep_ptune`` (arXiv 2209.01188), additive.
    """

    def __init__(
        self,
        layers: RemoteSequential,
        num_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be positive, got {num_tokens}")
        size = layers.hidden_size
        if layers.hidden_dims != ("B", "T", "1H"):
            raise UnsupportedCallError(f"deep prompts need hidden states [B, T, D], here they are {layers.hidden_dims}")
        blocks = layers.remote_blocks()
        taken = [index for index, block in blocks.items() if _NAME in block._modules]
        if taken:
            raise ValueError(f"block {taken[0]} has a deep prompt already; remove() that one first")
        prompts = [BlockPrompt(num_tokens, size, dtype=dtype, device=device) for _ in blocks]
        self._blocks: tuple[Any, ...] = tuple(blocks.values())  # in a tuple: no submodules of this one
        self.prompts = nn.ModuleList(prompts)
        for block, prompt in zip(self._blocks, prompts, strict=True):
            block.add_module(_NAME, prompt)

    def remove(self) -> None:
        """Take them out of the blocks; idempotent. The parameters stay here."""
        for block, prompt in zip(self._blocks, self.prompts, strict=True):
            if block._modules.get(_NAME) is prompt:
                del block._modules[_NAME]
