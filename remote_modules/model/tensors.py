"""Named tensors that cross between spans, and which of their dimensions are batch rows and tokens.

Hidden states are ``[B, T, D]`` in most architectures, ``[2, B, T, D]`` or ``[B, T, 4, D]`` in some; others carry
routing decisions or per-layer embeddings along. A `TensorSpec` says what a tensor's dimensions mean, so that history
and cache operations need not know the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

__all__ = ["TensorSpec", "concat", "concat_all", "num_bytes", "owner_spec", "select_rows", "slice_tokens"]

Named = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """The dimensions of one tensor.

    Attributes:
        dims: for each dimension ``"B"`` (rows), ``"T"`` (tokens), ``"4H"`` (that multiple of the hidden size),
            ``"<number>"`` (always so many) or ``"?"`` (varies).
        is_float: floating point, or integers.
        is_exact: whether a tensor must have all these sizes, or only those of rows and tokens.
    """

    dims: tuple[str, ...]
    is_float: bool = True
    is_exact: bool = True

    @cached_property
    def batch(self) -> int | None:
        return self.dims.index("B") if "B" in self.dims else None

    @cached_property
    def time(self) -> int | None:
        return self.dims.index("T") if "T" in self.dims else None

    def shape(self, rows: int, num_tokens: int, hidden_size: int) -> tuple[int, ...]:
        """The shape for such a batch; -1 where it varies."""
        return _shape(self.dims, rows, num_tokens, hidden_size)

    def text(self, hidden_size: int) -> str:
        """``[B, T, 64]``, for messages."""
        return "[" + ", ".join(str(_size(dim, 0, 0, hidden_size)) if dim[-1] == "H" else dim for dim in self.dims) + "]"

    def fits(self, tensor: torch.Tensor, rows: int, num_tokens: int, hidden_size: int) -> bool:
        """Whether ``tensor`` can be one of these."""
        expected = self.shape(rows, num_tokens, hidden_size)
        got = tensor.shape
        if len(got) != len(expected) or tensor.is_floating_point() != self.is_float or tensor.numel() == 0:
            return False
        if got == expected:
            return True
        known = ("B", "T") if not self.is_exact else self.dims
        return all(
            size in (-1, got) or dim not in known for dim, size, got in zip(self.dims, expected, got, strict=True)
        )


@lru_cache(maxsize=1024)
def _shape(dims: tuple[str, ...], rows: int, num_tokens: int, hidden_size: int) -> tuple[int, ...]:
    return tuple(_size(dim, rows, num_tokens, hidden_size) for dim in dims)


def _size(dim: str, rows: int, num_tokens: int, hidden_size: int) -> int:
    if dim == "B":
        return rows
    if dim == "T":
        return num_tokens
    if dim == "?":
        return -1
    return int(dim[:-1]) * hidden_size if dim.endswith("H") else int(dim)


def owner_spec(tensor: torch.Tensor, num_tokens: int) -> TensorSpec:
    """Of an argument of the owner: ``[..., B, T]`` such as positions and token types, else something constant."""
    if tensor.dim() >= 2 and tensor.shape[-1] == num_tokens:
        leading = tuple(str(size) for size in tensor.shape[:-2])
        return TensorSpec((*leading, "B", "T"), tensor.is_floating_point())
    return TensorSpec(("?",) * tensor.dim(), tensor.is_floating_point())


def slice_tokens(tensor: torch.Tensor, spec: TensorSpec, start: int, end: int | None = None) -> torch.Tensor:
    """Tokens ``[start, end)``, as slices count; a tensor without tokens stays as it is."""
    if spec.time is None:
        return tensor
    return tensor[(slice(None),) * spec.time + (slice(start, end),)]


def select_rows(tensor: torch.Tensor, spec: TensorSpec, indices: torch.Tensor) -> torch.Tensor:
    """Rows at ``indices`` ``[B']``; a tensor without rows, or with one for all, stays as it is."""
    if spec.batch is None or (tensor.shape[spec.batch] == 1 and int(indices.max()) > 0):
        return tensor
    return tensor.index_select(spec.batch, indices)


def concat(tensors: Sequence[torch.Tensor], spec: TensorSpec) -> torch.Tensor:
    """One after the other along the tokens; rows are expanded where some have one for all.

    Integers of a varying size are sets of indices (the tokens that a sparse attention chose): smaller sets repeat
    their last member.
    """
    if spec.time is None or len(tensors) == 1:
        return tensors[-1]
    if spec.batch is not None:
        rows = max(tensor.shape[spec.batch] for tensor in tensors)
        tensors = [_expanded(tensor, spec.batch, rows) for tensor in tensors]
    if not spec.is_float and spec.dims[-1] == "?":
        width = max(tensor.shape[-1] for tensor in tensors)
        tensors = [_widened(tensor, width) for tensor in tensors]
    return torch.cat(list(tensors), dim=spec.time)


def concat_all(parts: Sequence[Named], specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """`concat` of each name; all parts have the same names, and without parts there are none."""
    if len(parts) < 2:
        return dict(parts[0]) if parts else {}
    return {name: concat([part[name] for part in parts], specs[name]) for name in parts[0]}


def _expanded(tensor: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    if tensor.shape[dim] == rows:
        return tensor
    sizes = list(tensor.shape)
    sizes[dim] = rows
    return tensor.expand(sizes)


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - tensor.shape[-1]
    return torch.cat([tensor, tensor[..., -1:].expand(*tensor.shape[:-1], missing)], dim=-1) if missing else tensor


def num_bytes(tensors: Named) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
