"""The deep prompt of one block at the client: a module inside of a shadow block that holds the parameter."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["BlockPrompt"]


class BlockPrompt(nn.Module):
    """``weight`` ``[P, D]`` is added to what the block takes at the first P positions; zeros at first."""

    def __init__(
        self, num_tokens: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        num_tokens, hidden_size = self.weight.shape
        return f"num_tokens={num_tokens}, hidden_size={hidden_size}"
