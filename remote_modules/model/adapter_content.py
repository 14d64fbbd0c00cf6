"""An adapter by its content: parts that have names of their own, so that what did not change need not travel again.

The content of each adapted block is its entries (as JSON), and then their tensors. Each of these is a *part* and is
named by a digest of what it is; the adapter is named by the digest of its parts' names, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from remote_modules.errors import RemoteProtocolError
from remote_modules.model.adapter_entries import Entry
from remote_modules.model.adapters import Adapter, AdapterSet, decode_entries, encode_entries

__all__ = ["AdapterContent", "assemble", "content_name", "content_of", "part_digest"]

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """The content of some blocks' adapter.

    Attributes:
        parts: digests, in order.
        tensors: what they name; entries are uint8.
    """

    parts: tuple[bytes, ...]
    tensors: tuple[torch.Tensor, ...]

    @property
    def name(self) -> str:
        return content_name(self.parts)


def content_name(parts: Sequence[bytes]) -> str:
    """The name of an adapter with these parts: 64 hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def part_digest(tensor: torch.Tensor) -> bytes:
    """Of dtype, shape and bytes; SHA-256, of which 16 bytes are kept."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()[:DIGEST_BYTES]


def content_of(adapters: AdapterSet | Adapter, digests: dict[int, bytes] | None = None) -> AdapterContent:
    """The content of adapters, with tensors on the CPU.

    Args:
        digests: of tensors that are known already, by the ``id`` of each; the others are added.
    """
    digests = {} if digests is None else digests
    parts: list[bytes] = []
    tensors: list[torch.Tensor] = []
    for entries, own in _by_block(adapters):
        encoded = torch.frombuffer(bytearray(encode_entries(entries)), dtype=torch.uint8)
        parts.append(part_digest(encoded))
        tensors.append(encoded)
        for tensor in own:
            if id(tensor) not in digests:
                digests[id(tensor)] = part_digest(tensor)
            parts.append(digests[id(tensor)])
            tensors.append(tensor.detach().to("cpu").contiguous())
    return AdapterContent(tuple(parts), tuple(tensors))


def assemble(tensors: Sequence[torch.Tensor]) -> Adapter:
    """The adapter whose parts these are, in order; they come from outside.

    Raises:
        RemoteProtocolError: they do not make one.
    """
    entries: list[Entry] = []
    own: list[torch.Tensor] = []
    position = 0
    while position < len(tensors):
        encoded = tensors[position]
        if encoded.dtype is not torch.uint8 or encoded.dim() != 1:
            got = f"{encoded.dtype} {list(encoded.shape)}"
            raise RemoteProtocolError(f"part {position} of the adapter must be entries as uint8, got {got}")
        found = decode_entries(encoded.numpy().tobytes())
        count = sum(len(entry.tensor_names) for entry in found)
        own += tensors[position + 1 : position + 1 + count]
        entries += found
        position += 1 + count
    return Adapter.of(entries, own)


def _by_block(adapters: AdapterSet | Adapter) -> Iterator[tuple[list[Entry], list[torch.Tensor]]]:
    """Entries and tensors of each block."""
    pairs = adapters.items()
    for _, group in groupby(pairs, key=lambda pair: pair[0].block):
        found = list(group)
        yield [entry for entry, _ in found], [tensor for _, own in found for tensor in own]
