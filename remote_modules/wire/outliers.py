"""The codecs ``int8o`` and ``int4o``: blocks of values as in `wire.forms`, and a few outliers of each vector apart.

A vector's outliers travel as bfloat16 with their indices. Each block of other values has a step, one byte, counted down
from the vector's largest one. To code again what was decoded gives the same bytes: forms see to that for steps and
codes, and an outlier that would not be larger than all other values is made so.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from remote_modules.errors import RemoteProtocolError
from remote_modules.wire.forms import LEAST_STEP, STEPS_PER_OCTAVE, Array, Form, largest_of

__all__ = ["LIMIT", "MAX_VALUES", "decode", "encode", "num_bytes", "num_outliers"]

MAX_VALUES = 65_536  # of a vector: indices have 16 bits
MIN_OUTLIERS, MAX_OUTLIERS, VALUES_PER_OUTLIER = 4, 13, 512
LIMIT = {torch.float32: 2.0**120, torch.bfloat16: 2.0**120, torch.float16: 57_344.0}  # coded values are below
WIDE_BLOCK = 64
CHUNK = 2**17  # values at a time: what is worked on stays in the processor's cache

_LIMITS = {dtype: int(np.float32(limit).view(np.int32)) for dtype, limit in LIMIT.items()}  # as bits
_LEAST_FLOAT16 = np.float32(2.0**-24)
_TINY = np.float32(2.0**-120)  # its step is below all others


def num_outliers(length: int) -> int:
    """Of a vector of so many values."""
    return min(MAX_OUTLIERS, max(MIN_OUTLIERS, length // VALUES_PER_OUTLIER))


def num_bytes(form: Form, shape: tuple[int, ...]) -> int:
    """What a tensor takes: codes, a largest step for each vector, a byte for each block, outliers."""
    return math.prod(shape[:-1]) * sum(_widths(form, shape[-1]))


def _widths(form: Form, length: int) -> tuple[int, int, int, int, int]:
    """Bytes of a vector: its codes, largest step, steps, outliers, their indices."""
    count = num_outliers(length)
    return form.width(length), 2, -(-length // form.block), 2 * count, 2 * count


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
    block = form.block if keys.shape[1] % WIDE_BLOCK else WIDE_BLOCK  # the longer, the sooner looked through
    indices = _largest(keys, block, num_outliers(length))
    rows = np.arange(num_rows)[:, None]
    outliers = values[rows, indices].view(np.uint32)
    values[rows, indices] = 0.0
    blocks = values.reshape(num_rows, -1, form.block)
    largest = largest_of(np.abs(blocks))
    own = _step_of(form, largest)
    least = form.least_float16 if vectors.dtype is torch.float16 else LEAST_STEP
    bases = np.maximum(own.max(-1, keepdims=True), least)
    steps = np.maximum(own, np.maximum(bases - form.most_below, least))
    codes, marks, decoded = form.quantize(blocks, steps, largest, own == steps)
    return [
        form.pack(codes[:, :length]),
        bases.astype("<i2"),
        (bases - steps + marks).astype(np.uint8),
        _raised(outliers, decoded.max(-1, keepdims=True), vectors.dtype).astype("<u2"),
        indices.astype("<u2"),
    ]


def _largest(keys: Array, block: int, count: int) -> Array:
    """Indices of the outliers of each vector ``[R, count]``, rising; among equals the lower index comes first.

    Args:
        keys: bits of the magnitudes ``[R, N]``, of which the upper half counts and the lower one is free.
    """
    keys = keys | np.arange(0xFFFF, 0xFFFF - keys.shape[1], -1, dtype=np.int32)
    if keys.shape[1] > count * block:  # they lie in the blocks with the largest values
        blocks = keys.reshape(len(keys), -1, block)
        of_blocks = largest_of(blocks)
        chosen = _indices(of_blocks, count) // block
        keys = blocks[np.arange(len(keys))[:, None], chosen].reshape(len(keys), -1)
    return np.sort(_indices(keys, count), axis=-1)


def _indices(keys: Array, count: int) -> Array:
    """Of the ``count`` largest keys of each row, in any order."""
    return 0xFFFF - (np.partition(keys, keys.shape[1] - count, axis=-1)[:, keys.shape[1] - count :] & 0xFFFF)


def _step_of(form: Form, largest: Array) -> Array:
    """The least step, in eighths of octaves above one, of which ``largest`` is at most ``form.most_steps``."""
    mantissas, exponents = np.frexp(np.maximum(largest, _TINY))
    least, bounds = _bounds(form.most_steps)
    steps: Array = STEPS_PER_OCTAVE * exponents + least
    for bound in bounds:  # quicker than a search
        steps += mantissas > bound
    return steps


@functools.cache
def _bounds(most_steps: float) -> tuple[int, Array]:
    """The step where the exponent is zero; the mantissa adds one for each bound below it."""
    mantissa, octaves = math.frexp(most_steps)
    bounds = mantissa * np.exp2(np.arange(-STEPS_PER_OCTAVE, STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE)
    first = int((bounds < 0.5).sum())  # mantissas are above these
    least = first - STEPS_PER_OCTAVE * (octaves + 1)
    return least, bounds.astype(np.float32)[first : first + STEPS_PER_OCTAVE]


def _raised(outliers: Array, ordinary: Array, dtype: torch.dtype) -> Array:
    """``outliers`` from bits of float32 to those of bfloat16; larger than ``ordinary``, the largest other value."""
    if dtype is torch.float16:
        ordinary = ordinary.astype(np.float16).astype(np.float32)
        above = np.maximum(_above(ordinary.view(np.uint32)), ordinary + _LEAST_FLOAT16)
    else:
        bits = ordinary.view(np.uint32)
        above = _above(_to_bfloat16(bits) if dtype is torch.bfloat16 else bits)
    above = np.where(ordinary > 0, above, np.float32(0))
    # as bits they have the same order
    magnitudes: Array = np.maximum(_to_bfloat16(outliers & 0x7FFFFFFF), above.view(np.uint32))
    raised: Array = (magnitudes | outliers & 0x80000000) >> 16
    return raised


def _to_bfloat16(bits: Array) -> Array:
    """Of float32, rounded to the nearest, halves to even."""
    rounded: Array = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded


def _above(bits: Array) -> Array:
    """The least value of bfloat16 that is larger."""
    above: Array = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
    return above


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
    outliers = (outliers.astype(np.uint32) << 16).view(np.float32)
    decoded = torch.empty((num_rows, length), dtype=dtype)
    most = torch.finfo(dtype).max
    count = max(1, CHUNK // length)
    for start in range(0, num_rows, count):
        part = slice(start, start + count)
        values = np.zeros((len(codes[part]), -(-length // form.block) * form.block), np.float32)
        form.dequantize(codes[part], below[part], bases[part].astype(np.int32), values)
        values[np.arange(len(values))[:, None], indices[part]] = outliers[part]
        decoded[part] = torch.from_numpy(values)[:, :length].clamp_(-most, most)
    return decoded.reshape(shape)
