"""The codecs ``int8o`` and ``int4o``: blockwise integers, and a few outliers of each vector apart.

A vector's outliers travel as bfloat16 with their indices. Of the other values each block shares a step, of which they are
whole multiples: an eighth of an octave apart from the next, one byte, counted down from the vector's largest step. To
code again what was decoded gives the same bytes: the largest multiple of a block says which step it had (the bounds leave
room for the rounding of bfloat16), and an outlier that would not be larger than all other values is made so.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remote_modules.errors import RemoteProtocolError

__all__ = ["INT4", "INT8", "MAX_VALUES", "Form", "decode", "encode", "num_bytes", "num_outliers"]

Array = NDArray[Any]

MAX_VALUES = 65_536  # of a vector: indices have 16 bits
MIN_OUTLIERS, MAX_OUTLIERS, VALUES_PER_OUTLIER = 4, 16, 512
STEPS_PER_OCTAVE = 8
LEAST_STEP = {torch.float32: -800, torch.bfloat16: -800, torch.float16: -176}  # 2**-100 and 2**-22
LARGEST_STEP = 960  # 2**120
MOST_BELOW = 255  # steps of a vector are at most so many eighths below its largest one
LIMIT = {torch.float32: 2.0**120, torch.bfloat16: 2.0**120, torch.float16: 57_344.0}  # coded values are below
CHUNK = 2**17  # values at a time: what is worked on stays in the processor's cache

_FRACTIONS = np.exp2(np.arange(STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE).astype(np.float32)
_LIMITS = {dtype: int(np.float32(limit).view(np.int32)) for dtype, limit in LIMIT.items()}  # as bits
_LEAST_FLOAT16 = np.float32(2.0**-24)
_TINY = np.float32(2.0**-120)  # its step is below all others


@dataclass(frozen=True, slots=True)
class Form:
    """How large the parts of a codec are.

    Attributes:
        block: values that share a step.
        largest: code, which is symmetric around zero.
        most_steps: of a block's largest value; rounds to ``largest`` and still does so in bfloat16, an eighth of an
            octave below to more than half of the codes.
        codes_per_byte: 1 or 2.
    """

    block: int
    largest: int
    most_steps: float
    codes_per_byte: int


INT8 = Form(block=64, largest=126, most_steps=127.06, codes_per_byte=1)
INT4 = Form(block=32, largest=7, most_steps=7.2, codes_per_byte=2)


def num_outliers(length: int) -> int:
    """Of a vector of so many values."""
    return min(MAX_OUTLIERS, max(MIN_OUTLIERS, length // VALUES_PER_OUTLIER))


def num_bytes(form: Form, shape: tuple[int, ...]) -> int:
    """What a tensor takes: codes, a largest step for each vector, a byte for each block, outliers."""
    return math.prod(shape[:-1]) * sum(_widths(form, shape[-1]))


def _widths(form: Form, length: int) -> tuple[int, int, int, int, int]:
    """Bytes of a vector: its codes, largest step, steps, outliers, their indices."""
    count = num_outliers(length)
    return -(-length // form.codes_per_byte), 2, -(-length // form.block), 2 * count, 2 * count


# -------------------------------------------------------------------------------- encode


def encode(form: Form, tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The bytes of ``tensor`` in parts; None if a value is not finite, or nearly so large."""
    vectors = tensor.detach().to("cpu").reshape(-1, tensor.shape[-1])
    chunks = []
    for chunk in vectors.split(max(1, CHUNK // vectors.shape[1])):
        found = _encode(form, chunk)
        if found is None:
            return None
        chunks.append(found)
    parts = chunks[0] if len(chunks) == 1 else [np.concatenate(part) for part in zip(*chunks, strict=True)]
    return [torch.from_numpy(part.reshape(-1).view(np.uint8)) for part in parts]


def _encode(form: Form, vectors: torch.Tensor) -> list[Array] | None:
    """The five parts of these vectors."""
    num_rows, length = vectors.shape
    values = np.zeros((num_rows, -(-length // form.block) * form.block), np.float32)
    torch.from_numpy(values)[:, :length] = vectors
    keys = values.view(np.int32) & 0x7FFF0000
    if int(keys.max()) >= _LIMITS[vectors.dtype]:
        return None
    indices = _largest(keys, form.block, num_outliers(length))
    rows = np.arange(num_rows)[:, None]
    outliers = values[rows, indices].view(np.uint32)
    values[rows, indices] = 0.0
    blocks = values.reshape(num_rows, -1, form.block)
    largest = torch.from_numpy(blocks).abs().amax(-1).numpy()
    steps = np.maximum(_step_of(form, largest), LEAST_STEP[vectors.dtype])
    bases = steps.max(-1, keepdims=True)
    steps = np.maximum(steps, bases - MOST_BELOW)
    scales = _scale_of(steps)
    inverses = 1 / scales
    blocks *= inverses[..., None]
    np.rint(blocks, out=blocks)
    np.clip(blocks, -form.largest, form.largest, out=blocks)
    ordinary = (np.minimum(np.rint(largest * inverses), form.largest) * scales).max(-1, keepdims=True)
    codes = values.astype(np.int8).view(np.uint8)[:, :length]
    return [
        _pack(codes) if form.codes_per_byte == 2 else np.ascontiguousarray(codes),
        bases.astype("<i2"),
        (bases - steps).astype(np.uint8),
        _raised(outliers, ordinary, vectors.dtype).astype("<u2"),
        indices.astype("<u2"),
    ]


def _largest(keys: Array, block: int, count: int) -> Array:
    """Indices of the outliers of each vector ``[R, count]``, rising; among equals those come first whose index is lower.

    Args:
        keys: bits of the magnitudes ``[R, N]``, of which the upper half counts and the lower one is free.
    """
    keys = keys | np.arange(0xFFFF, 0xFFFF - keys.shape[1], -1, dtype=np.int32)
    if keys.shape[1] > count * block:  # they lie in the blocks with the largest values
        blocks = keys.reshape(len(keys), -1, block)
        of_blocks = torch.from_numpy(blocks).amax(-1).numpy()
        chosen = _indices(of_blocks, count) // block
        keys = blocks[np.arange(len(keys))[:, None], chosen].reshape(len(keys), -1)
    return np.sort(_indices(keys, count), axis=-1)


def _indices(keys: Array, count: int) -> Array:
    """Of the ``count`` largest keys of each row, in any order."""
    return 0xFFFF - (np.partition(keys, keys.shape[1] - count, axis=-1)[:, keys.shape[1] - count :] & 0xFFFF)


def _step_of(form: Form, largest: Array) -> Array:
    """The least step, in eighths of octaves above one, of which ``largest`` is at most ``form.most_steps``."""
    mantissas, exponents = np.frexp(np.maximum(largest, _TINY))
    octaves, bounds = _bounds(form.most_steps)
    steps: Array = STEPS_PER_OCTAVE * (exponents - octaves) + np.searchsorted(bounds, mantissas)
    return steps


@functools.cache
def _bounds(most_steps: float) -> tuple[int, Array]:
    """How many octaves the steps are below the largest value, less what its mantissa adds: one for each bound below it."""
    mantissa, octaves = math.frexp(most_steps)
    bounds = mantissa / 2 * np.exp2(np.arange(STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)
    return octaves + 1, bounds.astype(np.float32)


def _scale_of(steps: Array) -> Array:
    scales: Array = np.ldexp(_FRACTIONS[steps & (STEPS_PER_OCTAVE - 1)], steps >> 3)
    return scales


def _raised(outliers: Array, ordinary: Array, dtype: torch.dtype) -> Array:
    """``outliers``, given as bits of float32, as bits of bfloat16; larger than ``ordinary``, the largest other value."""
    if dtype is torch.float16:
        ordinary = ordinary.astype(np.float16).astype(np.float32)
        above = np.maximum(_above(ordinary.view(np.uint32)), ordinary + _LEAST_FLOAT16)
    else:
        bits = ordinary.view(np.uint32)
        above = _above(_to_bfloat16(bits) if dtype is torch.bfloat16 else bits)
    above = np.where(ordinary > 0, above, np.float32(0))
    magnitudes = np.maximum(
        _to_bfloat16(outliers & 0x7FFFFFFF), above.view(np.uint32)
    )  # as bits they have the same order
    return (magnitudes | outliers & 0x80000000) >> 16


def _to_bfloat16(bits: Array) -> Array:
    """Of float32, rounded to the nearest, halves to even."""
    rounded: Array = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded


def _above(bits: Array) -> Array:
    """The least value of bfloat16 that is larger."""
    above: Array = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
    return above


def _pack(codes: Array) -> Array:
    """Two of four bits in each byte, the first in the lower half."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    packed: Array = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return packed


# -------------------------------------------------------------------------------- decode


def decode(form: Form, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `encode` made ``data`` of (uint8, of `num_bytes`). Bytes may come from outside.

    Raises:
        RemoteProtocolError: an outlier has an index beyond its vector.
    """
    length, num_rows = shape[-1], math.prod(shape[:-1])
    raw, parts = data.numpy(), []
    offset = 0
    for width, kind in zip(_widths(form, length), ("u1", "<i2", "u1", "<u2", "<u2"), strict=True):
        size = num_rows * width
        parts.append(np.frombuffer(raw[offset : offset + size], kind).reshape(num_rows, -1))
        offset += size
    codes, bases, below, outliers, indices = parts
    if int(indices.max()) >= length:
        raise RemoteProtocolError(f"outlier has index {int(indices.max())}, in a vector of {length} values")
    steps = np.clip(bases.astype(np.int32) - below, LEAST_STEP[torch.float32], LARGEST_STEP)
    outliers = (outliers.astype(np.uint32) << 16).view(np.float32)
    decoded = torch.empty((num_rows, length), dtype=dtype)
    most = torch.finfo(dtype).max
    count = max(1, CHUNK // length)
    for start in range(0, num_rows, count):
        part = slice(start, start + count)
        values = _values(form, codes[part], length) * _scale_of(steps[part])[..., None]
        values = values.reshape(len(values), -1)
        values[np.arange(len(values))[:, None], indices[part]] = outliers[part]
        decoded[part] = torch.from_numpy(values)[:, :length].clamp_(-most, most)
    return decoded.reshape(shape)


def _values(form: Form, codes: Array, length: int) -> Array:
    """Codes as floats, in whole blocks ``[R, blocks, block]``."""
    values = np.zeros((len(codes), -(-length // form.block) * form.block), np.float32)
    if form.codes_per_byte == 1:
        values[:, :length] = codes.view(np.int8)
    else:
        width = codes.shape[1]
        values[:, 0 : 2 * width : 2] = (codes << 4).view(np.int8) >> 4
        values[:, 1 : 2 * width : 2] = codes.view(np.int8) >> 4
    return values.reshape(len(codes), -1, form.block)
