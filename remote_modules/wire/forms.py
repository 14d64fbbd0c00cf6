"""How blocks of values become codes, and codes values again: as whole multiples of a step, or as levels of four bits.

A block is described by its *step*: eighths of octaves above one. What was decoded must give the same step and codes
again, in each dtype: the largest value of a block is decoded to where no other step would be chosen, though bfloat16
rounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "INT4",
    "INT8",
    "LEVELS",
    "STEPS_PER_OCTAVE",
    "Array",
    "Form",
    "Integers",
    "Levels",
    "largest_of",
    "scale_of",
]

Array = NDArray[Any]

STEPS_PER_OCTAVE = 8
SHORT_BLOCK = 16
LEAST_STEP = -800  # 2**-100
LEVELS = (-128, -105, -85, -67, -50, -33, -17, 0, 13, 26, 40, 54, 68, 84, 100, 118)  # 128ths of a block's largest value
GRID = 120  # the values from 0 to 1 of which the nearest level is known; so many above fit into a byte

_FRACTIONS = np.exp2(np.arange(STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE).astype(np.float32)


def scale_of(steps: Array) -> Array:
    """Their values."""
    scales: Array = np.ldexp(_FRACTIONS[steps & (STEPS_PER_OCTAVE - 1)], steps >> 3)
    return scales


def largest_of(blocks: Array) -> Array:
    """Of each block ``[R, blocks, block]``."""
    tensor = torch.from_numpy(blocks)
    if blocks.shape[-1] > SHORT_BLOCK:
        found: Array = tensor.amax(-1).numpy()
        return found
    while half := tensor.shape[-1] // 2:  # short rows are quicker in halves; blocks are powers of two
        tensor = torch.maximum(tensor[..., :half], tensor[..., half:])
    return tensor[..., 0].numpy()


class Form(Protocol):
    """One way.

    Attributes:
        block: values that share a step.
        most_steps: of a block's largest value; with the next lower step it would have more.
        most_below: steps of a vector are at most so far below its largest one.
        least_float16: the least step of float16; other dtypes have `LEAST_STEP`.
    """

    @property
    def block(self) -> int: ...

    @property
    def most_steps(self) -> float: ...

    @property
    def most_below(self) -> int: ...

    @property
    def least_float16(self) -> int: ...

    def width(self, length: int) -> int:
        """Bytes of the codes of a vector."""

    def quantize(self, blocks: Array, steps: Array, largest: Array, is_own: Array) -> tuple[Array, Array, Array]:
        """Codes ``[R, N]`` of ``blocks`` ``[R, blocks, block]``, which change; marks of the blocks ``[R, blocks]``, to
        add to their steps on the wire; the largest value that is decoded in each block.

        Args:
            largest: magnitude in each block.
            is_own: whether the step is that of the block, and not a larger one.
        """

    def pack(self, codes: Array) -> Array:
        """Bytes of codes ``[R, length]``."""

    def dequantize(self, packed: Array, below: Array, bases: Array, values: Array) -> None:
        """Put what is decoded into ``values`` ``[R, N]``, zeros in whole blocks.

        Args:
            below: steps as they are on the wire, below ``bases`` ``[R, 1]``.
        """


@dataclass(frozen=True, slots=True)
class Integers:
    """Signed bytes: multiples of a step, up to ``largest``."""

    block: int
    largest: int
    most_steps: float
    most_below: int = 255
    least_float16: int = -176  # 2**-22: multiples are told apart, as float16 has those of 2**-24

    def width(self, length: int) -> int:
        return length

    def quantize(self, blocks: Array, steps: Array, largest: Array, is_own: Array) -> tuple[Array, Array, Array]:
        scales = scale_of(steps)
        inverses = 1 / scales
        blocks *= inverses[..., None]
        np.rint(blocks, out=blocks)
        np.clip(blocks, -self.largest, self.largest, out=blocks)
        codes = blocks.reshape(len(blocks), -1).astype(np.int8).view(np.uint8)
        return codes, np.zeros_like(steps), np.minimum(np.rint(largest * inverses), self.largest) * scales

    def pack(self, codes: Array) -> Array:
        return np.ascontiguousarray(codes)

    def dequantize(self, packed: Array, below: Array, bases: Array, values: Array) -> None:
        values[:, : packed.shape[1]] = packed.view(np.int8)
        blocks = values.reshape(len(values), -1, self.block)
        blocks *= scale_of(_clipped(bases - below))[..., None]


@dataclass(frozen=True, slots=True)
class Levels:
    """Four bits: `LEVELS` times a scale, which is negative where the largest value of the block is positive."""

    block: int
    most_steps: float = 2 ** (0.5 / STEPS_PER_OCTAVE)  # it is decoded to one
    most_below: int = 127
    least_float16: int = -144  # 2**-18: the levels are told apart

    def width(self, length: int) -> int:
        return -(-length // 2)

    def quantize(self, blocks: Array, steps: Array, largest: Array, is_own: Array) -> tuple[Array, Array, Array]:
        scales = scale_of(steps)
        is_positive = is_own & (largest_of(blocks) >= largest)
        blocks *= (np.where(is_positive, np.float32(-GRID), np.float32(GRID)) / scales)[..., None]
        np.rint(blocks, out=blocks)
        multiples = blocks.astype(np.int8).tobytes().translate(_NEAREST_LEVEL)  # the quickest table
        codes = np.frombuffer(multiples, np.uint8).reshape(len(blocks), -1)
        return codes, is_positive * np.int32(128), np.where(largest > 0, scales, np.float32(0))

    def pack(self, codes: Array) -> Array:
        if codes.shape[1] % 2:
            codes = np.pad(codes, ((0, 0), (0, 1)))
        pairs = np.ascontiguousarray(codes).view("<u2")
        packed: Array = (pairs | pairs >> 4).astype(np.uint8)
        return packed

    def dequantize(self, packed: Array, below: Array, bases: Array, values: Array) -> None:
        values[:, : 2 * packed.shape[1]] = _PAIRS.take(packed).view(np.float32)
        blocks = values.reshape(len(values), -1, self.block)
        blocks *= (scale_of(_clipped(bases - (below & 127))) * np.where(below & 128, np.float32(-1), np.float32(1)))[
            ..., None
        ]


INT8 = Integers(block=64, largest=126, most_steps=127.06)
INT4 = Levels(block=8)

_VALUES = np.array(LEVELS, np.float32) / 128
_GRID_VALUES = np.concatenate([np.arange(128), np.arange(-128, 0)]) / GRID  # by the byte of two's complement
_NEAREST_LEVEL = np.abs(_GRID_VALUES[:, None] - _VALUES.astype(np.float64)).argmin(-1).astype(np.uint8).tobytes()
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], -1).view(np.complex64)[:, 0]  # by two codes in a byte


def _clipped(steps: Array) -> Array:
    """From outside they may be any; these are finite."""
    return np.clip(steps, LEAST_STEP, 960)
