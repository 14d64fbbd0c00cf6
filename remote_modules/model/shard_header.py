"""The header of a safetensors file: which tensor lies where, and the header of a file that holds only some of them.

A file is eight bytes with the length of the header (little endian), the header (JSON), and the tensors' bytes. A
header from elsewhere is believed only if its tensors fill the rest of the file exactly: no holes, no overlaps, nothing
outside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError, safe_open

from remote_modules.errors import CheckpointError, first_line

__all__ = ["LENGTH_BYTES", "PartLayout", "ShardHeader", "StoredTensor", "parse_header", "parse_length", "tensor_names"]

LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as much as safetensors itself takes
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: ``start`` and ``end`` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def item_bytes(self) -> int:
        """Size of one element, rounded down: 0 for packed types and for empty tensors."""
        return (self.end - self.start) // max(math.prod(self.shape), 1)


@dataclass(frozen=True, slots=True)
class PartLayout:
    """A file that holds only some tensors of another.

    Attributes:
        header: its first bytes, up to the data.
        ranges: half-open byte ranges of the other file; one after the other they are the data.
    """

    header: bytes
    ranges: tuple[tuple[int, int], ...]

    @property
    def data_bytes(self) -> int:
        return sum(end - start for start, end in self.ranges)

    @property
    def name(self) -> str:
        """Of the header and the ranges: the same tensors of the same file have the same name."""
        return hashlib.sha256(self.header + repr(self.ranges).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ShardHeader:
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def part(self, keys: Iterable[str]) -> PartLayout:
        """The file of just these tensors.

        Raises:
            KeyError: a tensor is not in the header.
        """
        # The largest elements first keeps all aligned; safetensors writes files in this order, so that ranges merge.
        chosen = sorted(((key, self.tensors[key]) for key in keys), key=lambda item: _place(*item))
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        ranges: list[tuple[int, int]] = []
        at = 0
        for key, tensor in chosen:
            size = tensor.end - tensor.start
            entries[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
            if ranges and ranges[-1][1] == tensor.start:
                ranges[-1] = (ranges[-1][0], tensor.end)
            elif size:
                ranges.append((tensor.start, tensor.end))
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return PartLayout(header=len(text).to_bytes(LENGTH_BYTES, "little") + text, ranges=tuple(ranges))


def _place(key: str, tensor: StoredTensor) -> tuple[int, int, str]:
    return -tensor.item_bytes, tensor.start, key


def parse_length(data: bytes, file_bytes: int) -> int:
    """Length of the JSON text from the first eight bytes of a file of ``file_bytes``.

    Raises:
        CheckpointError: it cannot be true.
    """
    length = int.from_bytes(data, "little")
    if len(data) != LENGTH_BYTES or not 2 <= length <= min(file_bytes - LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise CheckpointError(f"not a safetensors file: a header of {length} bytes in a file of {file_bytes} bytes")
    return length


def parse_header(text: bytes, file_bytes: int) -> ShardHeader:
    """What the JSON text of the header of a file of ``file_bytes`` says.

    Raises:
        CheckpointError: it is not a header, or its tensors do not fill the rest of the file exactly.
    """
    try:
        raw = json.loads(text)
        metadata = raw.pop("__metadata__", None) or {}
        base = LENGTH_BYTES + len(text)
        tensors = {key: _parse_tensor(entry, base) for key, entry in raw.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"not a safetensors file: its header is not readable: {first_line(exc)}") from exc
    at = base
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at or tensor.end < at:
            text_of = f"tensor '{key[:80]!s}' has bytes {tensor.start}:{tensor.end}, the one before it ends at {at}"
            raise CheckpointError(f"not a safetensors file: {text_of}")
        at = tensor.end
    if at != file_bytes:
        raise CheckpointError(f"not a safetensors file: its tensors end at byte {at} of {file_bytes}")
    return ShardHeader(tensors=tensors, metadata=metadata)


def _parse_tensor(entry: Mapping[str, object], base: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets):
        raise ValueError("a tensor is not described by dtype, shape and data_offsets")
    start, end = offsets
    return StoredTensor(dtype=dtype, shape=tuple(shape), start=base + start, end=base + end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 64 and all(type(one) is int and 0 <= one < 2**63 for one in value)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a local file.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"weights {path} are not readable: {first_line(exc)}") from exc
