"""Codecs that make tensors smaller, at the cost of some of their bits. `wire.tensors` says where they may be used.

``int8o`` and ``int4o`` keep outliers apart (`wire.outliers`); ``int8`` is what peers of 1.3 and 1.4 speak
(`wire.mxint8`). With each, to code again what was decoded gives the same bytes, in every dtype and however the tensor
is cut along its other dimensions: recomputed, replayed and handed to another peer, a tensor has the same values as at
first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from remote_modules.wire import forms, mxint8, outliers

__all__ = [
    "CODECS",
    "CODED_DTYPES",
    "MIN_VALUES",
    "THIN_CODECS",
    "can_encode",
    "decode",
    "encode",
    "fits",
    "num_bytes",
    "rounded",
]

CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_VALUES = 32  # of a vector along the last dimension


@dataclass(frozen=True, slots=True)
class _Codec:
    """The functions of one codec, and the longest vectors that it takes."""

    max_values: int
    num_bytes: Callable[[tuple[int, ...]], int]
    encode: Callable[[torch.Tensor], list[torch.Tensor] | None]
    decode: Callable[[torch.Tensor, tuple[int, ...], torch.dtype], torch.Tensor]


def _with_outliers(form: forms.Form) -> _Codec:
    return _Codec(
        outliers.MAX_VALUES,
        partial(outliers.num_bytes, form),
        partial(outliers.encode, form),
        partial(outliers.decode, form),
    )


CODECS = {
    "int8": _Codec(2**53, mxint8.num_bytes, mxint8.encode, mxint8.decode),
    "int8o": _with_outliers(forms.INT8),
    "int4o": _with_outliers(forms.INT4),
}
THIN_CODECS = ("int8o", "int4o")  # who knows these reads a last tensor without padding


def num_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """What a tensor that `can_encode` takes."""
    return CODECS[codec].num_bytes(shape)


def can_encode(codec: str, tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` may travel so, if its values are finite: by its dtype and shape."""
    return tensor.numel() > 0 and fits(codec, tensor.dtype, tuple(tensor.shape))


def fits(codec: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether it is for such tensors."""
    return dtype in CODED_DTYPES and bool(shape) and MIN_VALUES <= shape[-1] <= CODECS[codec].max_values


def encode(codec: str, tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The bytes of ``tensor``, in parts.

    None where it is to travel as it is: another dtype, vectors too short or too long, or a value that is not finite
    (whoever scales a loss must see it) or nearly so.
    """
    return CODECS[codec].encode(tensor) if can_encode(codec, tensor) else None


def decode(codec: str, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `encode` made ``data`` of (uint8, of `num_bytes`). Bytes may come from outside.

    Raises:
        RemoteProtocolError: nothing that `encode` makes.
    """
    return CODECS[codec].decode(data, shape, dtype)


def rounded(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """What arrives of ``tensor`` at the other side of a wire that codes it."""
    parts = encode(codec, tensor)
    return tensor if parts is None else decode(codec, torch.cat(parts), tuple(tensor.shape), tensor.dtype)
