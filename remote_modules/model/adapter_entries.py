"""What one adapter at one place of a block is, and what its tensors must look like: data that travels.

Each method is one kind of entry. Entries and tensors that came from outside are believed once they were checked here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeAlias

import msgspec
import torch

from remote_modules.errors import RemoteProtocolError

__all__ = [
    "FIRST_METHODS",
    "MAX_NEUMANN_TERMS",
    "Entry",
    "Ia3",
    "LayerEntry",
    "LoHa",
    "LoKr",
    "Lora",
    "Oft",
    "ParameterLora",
    "Prompt",
    "RowLora",
    "check_entries",
    "check_tensors",
]

MAX_ENTRIES = 65_536  # 1,024 blocks of 64 modules
MAX_AT_PLACE = 16  # adapters of one module that are active at once
MAX_NEUMANN_TERMS = 64
MAX_RANK = 65_536  # of all experts of one parameter together, or tokens of a prompt

BlockIndex: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
ModulePath: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z", max_length=256)]
ParameterName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+\Z", max_length=64)]
Probability: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
Shapes: TypeAlias = Sequence[Sequence[int]]
Sizes: TypeAlias = tuple[int | None, int | None]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all kinds share.

    Each kind also has: ``place``, its path in the block, "" for the block itself; ``tensor_names``; and ``fits``:
    whether tensors of these shapes can belong to it and to each other. Kinds for linear layers have ``sizes``: output
    and input size of the layer, None for any.
    """

    takes_conv1d: ClassVar[bool] = False  # whether peft adapts transformers' transposed linear layer, too

    block: BlockIndex

    @property
    def is_random(self) -> bool:
        """Whether a pass needs a seed."""
        return False


class _AtModule(_Entry, frozen=True, forbid_unknown_fields=True):
    """One that changes a module of the block."""

    module: ModulePath

    @property
    def place(self) -> str:
        return self.module


class Lora(_AtModule, frozen=True, tag="lora", forbid_unknown_fields=True):
    """One LoRA on one linear layer.

    Tensors: A ``[r, in]``, B ``[out, r]``, and the magnitudes ``[out]`` if it is a DoRA.

    Attributes:
        module: path of the layer in its block, such as ``"self_attn.q_proj"``.
        scaling: factor of the update: alpha / r, or alpha / sqrt(r).
        dropout: probability, 0.0 outside of training.
        cast_input: whether the layer's input is cast to the dtype of A.
    """

    takes_conv1d: ClassVar[bool] = True

    scaling: float
    is_dora: bool = False
    dropout: Probability = 0.0
    cast_input: bool = True

    @property
    def is_random(self) -> bool:
        return self.dropout > 0

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B", "magnitude") if self.is_dora else ("A", "B")

    def fits(self, shapes: Shapes) -> bool:
        return _is_product(*reversed(shapes[:2])) and (not self.is_dora or shapes[2] == shapes[1][:1])

    def sizes(self, shapes: Shapes) -> Sizes:
        return shapes[1][0], shapes[0][1]


class RowLora(_AtModule, frozen=True, tag="row_lora", forbid_unknown_fields=True):
    """One LoRA on one linear layer for some rows of the batch: peft's ``adapter_names``.

    Tensors: A ``[r, in]``, B ``[out, r]``.

    Attributes:
        group: rows of this number in the request's ``adapter_rows``.
        scaling, cast_input: as of `Lora`.
    """

    takes_conv1d: ClassVar[bool] = True

    group: Annotated[int, msgspec.Meta(ge=1, lt=2**8)]
    scaling: float
    cast_input: bool = True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B")

    def fits(self, shapes: Shapes) -> bool:
        return _is_product(*reversed(shapes))

    def sizes(self, shapes: Shapes) -> Sizes:
        return shapes[1][0], shapes[0][1]


class ParameterLora(_AtModule, frozen=True, tag="parameter_lora", forbid_unknown_fields=True):
    """One LoRA on one parameter, such as the fused weights of all experts.

    Tensors: A ``[experts * r, in]``, B ``[out, experts * r]``.

    Attributes:
        module, parameter: path of the module in its block and the parameter's name there.
        scaling: factor of the update.
        num_experts: first size of a three-dimensional parameter, 1 for a matrix.
        is_in_out: experts are stored as ``[in, out]`` and not as ``[out, in]``.
    """

    parameter: ParameterName
    scaling: float
    num_experts: Annotated[int, msgspec.Meta(ge=1, lt=2**16)]
    is_in_out: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B")

    def fits(self, shapes: Shapes) -> bool:
        return _is_product(*reversed(shapes)) and shapes[0][0] % self.num_experts == 0


class Ia3(_AtModule, frozen=True, tag="ia3", forbid_unknown_fields=True):
    """One IA3 vector: ``[1, in]``, applied to the layer's input, if feedforward; else ``[out, 1]``, to its output."""

    takes_conv1d: ClassVar[bool] = True

    is_feedforward: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("scale",)

    def fits(self, shapes: Shapes) -> bool:
        return len(shapes[0]) == 2 and shapes[0][0 if self.is_feedforward else 1] == 1

    def sizes(self, shapes: Shapes) -> Sizes:
        size = math.prod(shapes[0])
        return (None, size) if self.is_feedforward else (size, None)


class _Lycoris(_AtModule, frozen=True, forbid_unknown_fields=True):
    """What LoHa and LoKr share.

    Attributes:
        scaling: factor of the update.
        rank_dropout: probability that an output of the update is left out, 0.0 outside of training.
        cast_input: whether the layer's input is cast to the dtype of the update.
    """

    scaling: float
    rank_dropout: Probability = 0.0
    cast_input: bool = True

    @property
    def is_random(self) -> bool:
        return self.rank_dropout > 0


class LoHa(_Lycoris, frozen=True, tag="loha", forbid_unknown_fields=True):
    """One LoHa on one linear layer: the elementwise product of two products of low rank.

    Tensors: ``w1_a [out, r]``, ``w1_b [r, in]``, ``w2_a [out, r]``, ``w2_b [r, in]``.
    """

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("w1_a", "w1_b", "w2_a", "w2_b")

    def fits(self, shapes: Shapes) -> bool:
        return _is_product(*shapes[:2]) and shapes[:2] == shapes[2:]

    def sizes(self, shapes: Shapes) -> Sizes:
        return shapes[0][0], shapes[1][1]


class LoKr(_Lycoris, frozen=True, tag="lokr", forbid_unknown_fields=True):
    """One LoKr on one linear layer: the Kronecker product of two matrices, each whole or a product of low rank.

    Tensors: ``w1 [a, c]`` or ``w1_a [a, r]`` and ``w1_b [r, c]``; ``w2 [b, d]`` or ``w2_a [b, r]`` and ``w2_b [r, d]``;
    the layer has ``a * b`` outputs and ``c * d`` inputs.

    Attributes:
        is_w1_whole, is_w2_whole: which tensors there are.
        scales_dropout: whether the outputs that stay grow accordingly.
    """

    is_w1_whole: bool = True
    is_w2_whole: bool = False
    scales_dropout: bool = False

    @property
    def tensor_names(self) -> tuple[str, ...]:
        first = ("w1",) if self.is_w1_whole else ("w1_a", "w1_b")
        return first + (("w2",) if self.is_w2_whole else ("w2_a", "w2_b"))

    def fits(self, shapes: Shapes) -> bool:
        return all(_is_product(*part) if len(part) == 2 else len(part[0]) == 2 for part in self._parts(shapes))

    def sizes(self, shapes: Shapes) -> Sizes:
        parts = self._parts(shapes)
        return math.prod(part[0][0] for part in parts), math.prod(part[-1][1] for part in parts)

    def _parts(self, shapes: Shapes) -> tuple[Shapes, Shapes]:
        count = 1 if self.is_w1_whole else 2
        return shapes[:count], shapes[count:]


class Oft(_AtModule, frozen=True, tag="oft", forbid_unknown_fields=True):
    """One OFT at one linear layer: a rotation of its input, in groups of features.

    Tensor: ``R [in / size, size * (size - 1) / 2]``, of each group the upper triangle of a skew-symmetric matrix;
    ``[1, ...]`` if all groups share one.

    Attributes:
        size: features of each group.
        num_inputs: of the layer.
        is_shared: whether all groups are rotated alike.
        neumann_terms: terms of the series that stands for the inverse in Cayley's formula; 0: the inverse itself.
        cast_input: whether the layer's input is cast to the dtype of R beforehand.
    """

    size: Annotated[int, msgspec.Meta(ge=2, lt=2**24)]
    num_inputs: Annotated[int, msgspec.Meta(ge=2, lt=2**24)]
    is_shared: bool = False
    neumann_terms: Annotated[int, msgspec.Meta(ge=0, le=MAX_NEUMANN_TERMS)] = 5
    cast_input: bool = True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("R",)

    def fits(self, shapes: Shapes) -> bool:
        groups = 1 if self.is_shared else self.num_inputs // self.size
        is_divided = self.num_inputs % self.size == 0
        return is_divided and list(shapes[0]) == [groups, self.size * (self.size - 1) // 2]

    def sizes(self, shapes: Shapes) -> Sizes:
        return None, self.num_inputs


class Prompt(_Entry, frozen=True, tag="prompt", forbid_unknown_fields=True):
    """One deep prompt: ``[P, D]``, added to what the block takes at the first P positions of the KV cache."""

    @property
    def place(self) -> str:
        return ""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("prompt",)

    def fits(self, shapes: Shapes) -> bool:
        return len(shapes[0]) == 2 and shapes[0][0] <= MAX_RANK


LayerEntry: TypeAlias = Lora | RowLora | Ia3 | LoHa | LoKr | Oft
Entry: TypeAlias = LayerEntry | ParameterLora | Prompt

FIRST_METHODS = (Lora, ParameterLora, Ia3)  # that peers of every version know


def _is_product(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether ``[m, r]`` and ``[r, n]`` can be multiplied, and the rank is within bounds."""
    return len(left) == len(right) == 2 and 1 <= left[1] == right[0] <= MAX_RANK


def check_entries(entries: Sequence[Entry]) -> None:
    """Raises: RemoteProtocolError: too many, or they contradict each other."""
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise RemoteProtocolError(f"adapter has {len(entries)} entries, expected 1 to {MAX_ENTRIES}")
    kinds: dict[tuple[int, str], type] = {}
    most = max(Counter((entry.block, entry.place) for entry in entries).values())
    if most > MAX_AT_PLACE:  # each may be computed as a matrix of the layer's size
        raise RemoteProtocolError(f"adapter has {most} entries at one place, expected at most {MAX_AT_PLACE}")
    for entry in entries:
        if not math.isfinite(getattr(entry, "scaling", 0.0)):
            raise RemoteProtocolError(f"adapter of '{entry.place}' claims scaling {getattr(entry, 'scaling', 0.0)}")
        if kinds.setdefault((entry.block, entry.place), type(entry)) is not type(entry):
            raise RemoteProtocolError(f"adapters of '{entry.place}' of block {entry.block} are of several kinds")


def check_tensors(entry: Entry, tensors: Sequence[torch.Tensor]) -> None:
    """Raises: RemoteProtocolError: ``tensors`` cannot be those of ``entry``."""
    shapes = [list(tensor.shape) for tensor in tensors]
    if not entry.fits(shapes) or not all(tensor.numel() for tensor in tensors):
        raise RemoteProtocolError(f"adapter of '{entry.place}' of block {entry.block} claims shapes {shapes}")
    if not all(tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors):
        raise RemoteProtocolError(f"adapter of '{entry.place}' has dtype {tensors[0].dtype}, expected a float of it")
