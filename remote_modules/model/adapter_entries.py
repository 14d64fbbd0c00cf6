"""What one adapter at one module of a block is, and what its tensors must look like: data that travels.

Each method is one kind of entry. Entries and tensors that came from outside are believed once they were checked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec
import torch

from remote_modules.errors import RemoteProtocolError

__all__ = ["Entry", "Ia3", "Lora", "ParameterLora", "check_entries", "check_tensors"]

MAX_ENTRIES = 65_536  # 1,024 blocks of 64 modules
MAX_RANK = 65_536  # of all experts of one parameter together

BlockIndex: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
ModulePath: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z", max_length=256)]
ParameterName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+\Z", max_length=64)]
Probability: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class Lora(msgspec.Struct, frozen=True, tag="lora", forbid_unknown_fields=True):
    """One LoRA on one linear layer.

    Tensors: A ``[r, in]``, B ``[out, r]``, and the magnitudes ``[out]`` if it is a DoRA.

    Attributes:
        module: path of the layer in its block, such as ``"self_attn.q_proj"``.
        scaling: factor of the update: alpha / r, or alpha / sqrt(r).
        dropout: probability, 0.0 outside of training.
        cast_input: whether the layer's input is cast to the dtype of A.
    """

    block: BlockIndex
    module: ModulePath
    scaling: float
    is_dora: bool = False
    dropout: Probability = 0.0
    cast_input: bool = True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B", "magnitude") if self.is_dora else ("A", "B")


class ParameterLora(msgspec.Struct, frozen=True, tag="parameter_lora", forbid_unknown_fields=True):
    """One LoRA on one parameter, such as the fused weights of all experts.

    Tensors: A ``[experts * r, in]``, B ``[out, experts * r]``.

    Attributes:
        module, parameter: path of the module in its block and the parameter's name there.
        scaling: factor of the update.
        num_experts: first size of a three-dimensional parameter, 1 for a matrix.
        is_in_out: experts are stored as ``[in, out]`` and not as ``[out, in]``.
    """

    block: BlockIndex
    module: ModulePath
    parameter: ParameterName
    scaling: float
    num_experts: Annotated[int, msgspec.Meta(ge=1, lt=2**16)]
    is_in_out: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B")


class Ia3(msgspec.Struct, frozen=True, tag="ia3", forbid_unknown_fields=True):
    """One IA3 vector: ``[1, in]``, applied to the layer's input, if feedforward; else ``[out, 1]``, to its output."""

    block: BlockIndex
    module: ModulePath
    is_feedforward: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("scale",)


Entry: TypeAlias = Lora | ParameterLora | Ia3


def check_entries(entries: Sequence[Entry]) -> None:
    """Raises: RemoteProtocolError: too many, or they contradict each other."""
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise RemoteProtocolError(f"adapter has {len(entries)} entries, expected 1 to {MAX_ENTRIES}")
    kinds: dict[tuple[int, str], type] = {}
    for entry in entries:
        if not isinstance(entry, Ia3) and not math.isfinite(entry.scaling):
            raise RemoteProtocolError(f"adapter of '{entry.module}' claims scaling {entry.scaling}")
        if kinds.setdefault((entry.block, entry.module), type(entry)) is not type(entry):
            raise RemoteProtocolError(f"adapters of '{entry.module}' of block {entry.block} are of several kinds")


def check_tensors(entry: Entry, tensors: Sequence[torch.Tensor]) -> None:
    """Raises: RemoteProtocolError: ``tensors`` cannot be those of ``entry``."""
    shapes = [list(tensor.shape) for tensor in tensors]
    if isinstance(entry, Ia3):
        is_right = len(shapes[0]) == 2 and shapes[0][0 if entry.is_feedforward else 1] == 1
    else:
        is_right = all(len(shape) == 2 for shape in shapes[:2]) and 1 <= shapes[0][0] == shapes[1][1] <= MAX_RANK
        is_right = is_right and (len(shapes) == 2 or shapes[2] == shapes[1][:1])
        if isinstance(entry, ParameterLora):
            is_right = is_right and shapes[0][0] % entry.num_experts == 0
    if not is_right or not all(tensor.numel() for tensor in tensors):
        raise RemoteProtocolError(f"adapter of '{entry.module}' of block {entry.block} claims shapes {shapes}")
    if not all(tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors):
        raise RemoteProtocolError(f"adapter of '{entry.module}' has dtype {tensors[0].dtype}, expected a float of it")
