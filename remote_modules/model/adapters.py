"""Adapters as data: entries and tensors together, as they are held at the client, travel, and are held at a peer.

`encode` and `decode` turn them into bytes and back. Reading them off the client's blocks is in `model.adapter_reading`,
what a peer does with them in `model.adapted`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from remote_modules.errors import RemoteProtocolError, first_line
from remote_modules.model.adapter_entries import Entry, check_entries, check_tensors

__all__ = ["Adapter", "AdapterSet", "content_hash", "decode", "decode_entries", "encode", "encode_entries"]

MAX_BYTES = 2**31
MAX_HEADER_BYTES = 2**25  # safetensors describes each tensor in about 80 bytes, msgspec each entry in about 150


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The adapters of some blocks at the client.

    Attributes:
        entries: in the order of blocks, modules, and of peft's active adapters at each.
        parameters: the live parameters, for each entry those of its ``tensor_names``.
        row_names: of each row of the batch the name of its adapter, where they have different ones.
    """

    entries: tuple[Entry, ...]
    parameters: tuple[torch.Tensor, ...]
    row_names: tuple[str, ...] = ()

    @property
    def has_dropout(self) -> bool:
        """Whether a pass needs a seed."""
        return any(entry.is_random for entry in self.entries)

    @property
    def version(self) -> tuple[tuple[int, int], ...]:
        """Equal for as long as nothing was assigned to a parameter or written in place, except through ``.data``."""
        return tuple((id(parameter), parameter._version) for parameter in self.parameters)

    def items(self) -> Iterator[tuple[Entry, Sequence[torch.Tensor]]]:
        return _with_tensors(self.entries, self.parameters)

    def within(self, start: int, end: int) -> AdapterSet | None:
        """Those of blocks ``[start, end)``, for one hop; None if there are none."""
        kept = [
            (entry, tensors)
            for entry, tensors in _with_tensors(self.entries, self.parameters)
            if start <= entry.block < end
        ]
        if not kept:
            return None
        return AdapterSet(tuple(entry for entry, _ in kept), tuple(tensor for _, tensors in kept for tensor in tensors))


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapters of some blocks at a peer; entries and tensors fit each other.

    Attributes:
        tensors: for each entry those of its ``tensor_names``.
    """

    entries: tuple[Entry, ...]
    tensors: tuple[torch.Tensor, ...]

    @staticmethod
    def of(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> Adapter:
        """For tensors that came from outside.

        Raises:
            RemoteProtocolError: they do not belong to these entries.
        """
        check_entries(entries)
        count = sum(len(entry.tensor_names) for entry in entries)
        if len(tensors) != count:
            raise RemoteProtocolError(f"adapter has {len(tensors)} tensors, its {len(entries)} entries need {count}")
        for entry, own in _with_tensors(entries, tensors):
            check_tensors(entry, own)
        if not all(math.isfinite(torch.linalg.vector_norm(tensor, math.inf)) for tensor in tensors):  # reads it once
            raise RemoteProtocolError("adapter holds values that are not finite; did the training diverge?")
        return Adapter(tuple(entries), tuple(tensors))

    def leaves(self, device: torch.device | str, *, requires_grad: bool = False) -> Adapter:
        """A copy on ``device`` whose tensors are leaves of a new graph."""
        tensors = tuple(tensor.detach().to(device).requires_grad_(requires_grad) for tensor in self.tensors)
        return Adapter(self.entries, tensors)

    def items(self) -> Iterator[tuple[Entry, Sequence[torch.Tensor]]]:
        return _with_tensors(self.entries, self.tensors)


def _with_tensors(
    entries: Sequence[Entry], tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[Entry, Sequence[torch.Tensor]]]:
    position = 0
    for entry in entries:
        count = len(entry.tensor_names)
        yield entry, tensors[position : position + count]
        position += count


# --- as bytes -------------------------------------------------------------------------------------------------------


_encoder = msgspec.json.Encoder()
_entries_decoder = msgspec.json.Decoder(list[Entry])
_METADATA_KEY = "remote_modules.adapter"


class _Header(msgspec.Struct):
    """Of a safetensors file, without its tensors."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


_header_decoder = msgspec.json.Decoder(_Header)


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """As JSON, for a request that carries its tensors in another way."""
    return _encoder.encode(entries)


def decode_entries(data: bytes | str) -> list[Entry]:
    """Raises: RemoteProtocolError: they are none, or too many, or one of them is out of bounds."""
    if len(data) > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"adapter entries have {len(data)} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        entries = _entries_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise RemoteProtocolError(f"adapter entries are malformed: {first_line(exc)}") from exc
    check_entries(entries)
    return entries


def encode(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> bytes:
    """A safetensors file, the same bytes for the same values. Tensors are ``"<entry>.<name>"``."""
    named = {
        f"{number}.{name}": tensor.detach().to("cpu").contiguous()
        for number, (entry, own) in enumerate(_with_tensors(entries, tensors))
        for name, tensor in zip(entry.tensor_names, own, strict=True)
    }
    return safetensors_torch.save(named, {_METADATA_KEY: encode_entries(entries).decode()})


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Adapter:
    """What `encode` wrote, every claim of it checked.

    Raises:
        RemoteProtocolError: it is too large, malformed, or its tensors do not belong to its entries.
    """
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"adapter has {len(data)} bytes, at most {max_bytes} are taken")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(len(data) - 8, MAX_HEADER_BYTES):
        raise RemoteProtocolError(f"adapter of {len(data)} bytes claims a header of {header_bytes} bytes")
    try:
        metadata = _header_decoder.decode(data[8 : 8 + header_bytes]).metadata
        named = safetensors_torch.load(data)
    except (msgspec.MsgspecError, SafetensorError, UnicodeDecodeError, KeyError, ValueError, RuntimeError) as exc:
        raise RemoteProtocolError(f"adapter is no readable safetensors file: {first_line(exc)}") from exc
    entries = decode_entries(metadata.get(_METADATA_KEY, ""))
    names = [f"{number}.{name}" for number, entry in enumerate(entries) for name in entry.tensor_names]
    if named.keys() != set(names):
        raise RemoteProtocolError(f"adapter has {len(named)} tensors, expected {len(names)} that are named by entry")
    return Adapter.of(entries, [named[name] for name in names])


def content_hash(data: bytes) -> str:
    """SHA-256 in hexadecimal: the name of an adapter in a peer's cache."""
    return hashlib.sha256(data).hexdigest()
