"""The codec ``int8`` of 1.3 and 1.4 (MXINT8 of the OCP microscaling formats): 1.03 bytes for a value.

Of each vector along the last dimension, every 32 values share a power of two and are whole multiples of it from -127 to
127. A power of two makes it exact to code again what was decoded.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

__all__ = ["decode", "encode", "num_bytes"]

BLOCK = 32  # values that share a power of two
EXPONENT_BIAS = 127
NOT_A_NUMBER = 255
LEAST_EXPONENT = {torch.float32: -127, torch.bfloat16: -127, torch.float16: -24}  # exact in the dtype
CHUNK = 2**17  # values at a time: what is worked on stays in the processor's cache

_SCALES = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - EXPONENT_BIAS).to(torch.float32)
_SCALES[NOT_A_NUMBER] = math.nan


def num_bytes(shape: tuple[int, ...]) -> int:
    """What a tensor takes: a byte for each value, and one for each block."""
    return math.prod(shape) + math.prod(shape[:-1]) * -(-shape[-1] // BLOCK)


def encode(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The bytes of ``tensor`` in parts; None if a value is not finite."""
    vectors = tensor.detach().to("cpu").reshape(-1, tensor.shape[-1])
    values = torch.empty(vectors.shape, dtype=torch.int8)
    exponents = torch.empty(len(vectors), -(-vectors.shape[1] // BLOCK), dtype=torch.uint8)
    count = max(1, CHUNK // vectors.shape[1])
    for part in zip(vectors.split(count), values.split(count), exponents.split(count), strict=True):
        if not _encode_into(*part):
            return None
    return [values.view(torch.uint8).reshape(-1), exponents.reshape(-1)]


def _encode_into(vectors: torch.Tensor, values: torch.Tensor, exponents: torch.Tensor) -> bool:
    """False if a value is not finite."""
    blocks = _blocks(vectors.to(torch.float32))
    largest = blocks.abs().amax(-1)
    if not math.isfinite(largest.max().item()):
        return False
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 7 + (mantissa > 127 / 128)  # the least with which the largest is at most 127
    exponent.clamp_(LEAST_EXPONENT[vectors.dtype], EXPONENT_BIAS)
    scaled = (blocks * _SCALES[EXPONENT_BIAS - exponent].unsqueeze(-1)).round_()
    values.copy_(scaled.flatten(-2)[:, : vectors.shape[1]])
    exponents.copy_(exponent.add_(EXPONENT_BIAS))
    return True


def decode(data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `encode` made ``data`` of (uint8, of `num_bytes`). Bytes may come from outside."""
    count = math.prod(shape)
    values, exponents = data[:count].view(torch.int8).reshape(-1, shape[-1]), data[count:]
    decoded = torch.empty(values.shape, dtype=dtype)
    size = max(1, CHUNK // shape[-1])
    scales = exponents.reshape(len(values), -1).split(size)
    for part, of_part, found in zip(values.split(size), scales, decoded.split(size), strict=True):
        blocks = _blocks(part) * _SCALES[of_part.to(torch.int32)].unsqueeze(-1)
        found.copy_(blocks.flatten(-2)[:, : shape[-1]].clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max))
    return decoded.reshape(shape)


def _blocks(tensor: torch.Tensor) -> torch.Tensor:
    """Its last dimension in blocks, the last one filled up with zeros."""
    missing = -tensor.shape[-1] % BLOCK
    if missing:
        tensor = pad(tensor, (0, missing))
    blocks: torch.Tensor = tensor.unflatten(-1, (-1, BLOCK))
    return blocks
