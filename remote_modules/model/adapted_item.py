"""One adapter entry together with the real module that it changes at a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Item"]


@dataclass(frozen=True, slots=True)
class Item:
    """One entry and the module that it changes."""

    entry: Any
    tensors: Sequence[torch.Tensor]
    module: Any
    number: int  # among those of the module
