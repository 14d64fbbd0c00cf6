"""Named tensors to raw buffers and back, without copies.

A message lists its tensors as `TensorMeta`; the body of its frame holds their bytes in that order, row-major,
little-endian, each but perhaps the last padded with zeros to a multiple of 64 bytes. Some may be coded (`wire.codecs`);
no other modules of `wire` know torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from remote_modules.errors import LocalProtocolError, RemoteProtocolError
from remote_modules.wire import codecs
from remote_modules.wire.framing import Body, Buffer
from remote_modules.wire.parts import MAX_DIMENSIONS, TensorMeta

__all__ = ["DTYPES", "body_bytes", "decode_tensors", "decoded_bytes", "encode_tensors"]

ALIGNMENT_BYTES = 64
MAX_SHAPE_PRODUCT = 2**53  # sizes of zero counted as one: torch overflows on [0, 2**39, 2**39]

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PADDING = bytes(ALIGNMENT_BYTES)


def encode_tensors(
    tensors: Mapping[str, torch.Tensor], coded: Mapping[str, str] | None = None, *, pad_end: bool = True
) -> tuple[tuple[TensorMeta, ...], list[Buffer]]:
    """Describe ``tensors`` and expose their memory.

    The buffers alias CPU tensors: do not write to those until the frame is sent. Tensors elsewhere are copied
    to the CPU.

    Args:
        coded: codecs of `codecs.CODECS` by the names of the tensors for which they are used, where they can be.
        pad_end: whether the last tensor is padded too, as versions before 1.5 expect it.

    Raises:
        LocalProtocolError: a dtype that the protocol does not carry.
    """
    metas = []
    buffers: list[Buffer] = []
    num_bytes = 0
    for name, tensor in tensors.items():
        dtype = _NAMES.get(tensor.dtype)
        if dtype is None:
            raise LocalProtocolError(f"tensor '{name}' has dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        codec = "" if coded is None else coded.get(name, "")
        parts = codecs.encode(codec, tensor) if codec else None
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), "" if parts is None else codec))
        if tensor.numel() == 0:
            continue
        if parts is None:
            tensor = tensor.detach()
            parts = [(tensor if tensor.is_cpu else tensor.cpu()).contiguous().reshape(-1).view(torch.uint8)]
        if padding := -num_bytes % ALIGNMENT_BYTES:
            buffers.append(_PADDING[:padding])
        found = [part.numpy().data for part in parts]
        buffers += found
        num_bytes += padding + sum(map(len, found))
    if pad_end and (padding := -num_bytes % ALIGNMENT_BYTES):
        buffers.append(_PADDING[:padding])
    return tuple(metas), buffers


def decode_tensors(metas: Sequence[TensorMeta], body: Body) -> dict[str, torch.Tensor]:
    """Views of ``body``, or new tensors of those that are coded; every claim of ``metas`` is checked first.

    Raises:
        RemoteProtocolError: unknown dtype or codec, repeated name, bad shape, or sizes that do not add up to the body.
    """
    layout = []
    offset = end = 0
    names = set()
    for meta in metas:
        dtype = DTYPES.get(meta.dtype)
        if dtype is None:
            raise RemoteProtocolError(f"tensor '{meta.name}' claims unknown dtype '{meta.dtype}'")
        if meta.name in names:
            raise RemoteProtocolError(f"tensor '{meta.name}' is given twice")
        product = math.prod([size or 1 for size in meta.shape])
        if len(meta.shape) > MAX_DIMENSIONS or min(meta.shape, default=0) < 0 or product >= MAX_SHAPE_PRODUCT:
            raise RemoteProtocolError(f"tensor '{meta.name}' claims shape {list(meta.shape)[:9]}")
        names.add(meta.name)
        num_bytes = _coded_bytes(meta, dtype) if meta.codec else _plain_bytes(meta, dtype)
        layout.append((meta, dtype, offset, num_bytes))
        if num_bytes:
            end = offset + num_bytes
            offset = end + -end % ALIGNMENT_BYTES
    if len(body) not in (offset, end):
        raise RemoteProtocolError(f"tensors claim {offset} bytes, the body has {len(body)} bytes")
    return {meta.name: _read(body, meta, dtype, start, size) for meta, dtype, start, size in layout}


def decoded_bytes(metas: Sequence[TensorMeta]) -> int:
    """What tensors of these descriptions take in memory; those of unknown dtypes nothing, as they do not decode."""
    return sum(_plain_bytes(meta, DTYPES[meta.dtype]) for meta in metas if meta.dtype in DTYPES)


def body_bytes(metas: Sequence[TensorMeta]) -> int:
    """Of tensors that `decode_tensors` has taken, without what aligns them."""
    return sum(
        codecs.num_bytes(one.codec, one.shape) if one.codec else _plain_bytes(one, DTYPES[one.dtype]) for one in metas
    )


def _plain_bytes(meta: TensorMeta, dtype: torch.dtype) -> int:
    return math.prod(meta.shape) * dtype.itemsize


def _coded_bytes(meta: TensorMeta, dtype: torch.dtype) -> int:
    if meta.codec not in codecs.CODECS:
        raise RemoteProtocolError(f"tensor '{meta.name}' claims unknown codec '{meta.codec}'")
    if not codecs.fits(meta.codec, dtype, meta.shape):
        text = f"tensor '{meta.name}' claims {meta.dtype} {list(meta.shape)} in codec '{meta.codec}', which is for"
        most = codecs.CODECS[meta.codec].max_values
        raise RemoteProtocolError(f"{text} vectors of {codecs.MIN_VALUES} to {most} floats of 16 or 32 bits")
    return codecs.num_bytes(meta.codec, meta.shape)


def _read(body: Body, meta: TensorMeta, dtype: torch.dtype, start: int, num_bytes: int) -> torch.Tensor:
    if meta.codec and num_bytes:
        data = torch.frombuffer(body, dtype=torch.uint8, count=num_bytes, offset=start)
        return codecs.decode(meta.codec, data, meta.shape, dtype)
    return _view(body, meta.shape, dtype, start, num_bytes)


def _view(body: Body, shape: tuple[int, ...], dtype: torch.dtype, start: int, num_bytes: int) -> torch.Tensor:
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:  # any byte may come from outside, and a bool that is neither 0 nor 1 is undefined behaviour
        return torch.frombuffer(body, dtype=torch.uint8, count=num_bytes, offset=start).ne(0).reshape(shape)
    count = num_bytes // dtype.itemsize
    return torch.frombuffer(body, dtype=dtype, count=count, offset=start).reshape(shape)
