"""Adapters of remote blocks as they travel: to a peer once, then by name."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from remote_modules.model.adapter_reading import collect
from remote_modules.model.adapters import AdapterSet, encode_entries
from remote_modules.model.shadow import is_shadow
from remote_modules.spans import Span

__all__ = ["AdapterWatch", "CallAdapter", "HopAdapter", "note_change"]

Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class HopAdapter:
    """The adapters of one hop's blocks.

    Attributes:
        digest: names the content.
        tensors: ``adapter`` (the entries) and ``adapter.<n>``, as they travel.
        positions: of these tensors among all of the `AdapterSet`.
    """

    digest: str
    tensors: Named
    positions: tuple[int, ...]


@dataclass(slots=True)
class CallAdapter:
    """The adapters that one call of the model has.

    Args:
        adapters: with tensors on the CPU.
        seed: of their dropout, or None.
    """

    adapters: AdapterSet
    seed: int | None = None
    _parts: dict[Span, HopAdapter | None] = field(default_factory=dict)

    def part(self, blocks: Span) -> HopAdapter | None:
        """What the hop with these ``blocks`` needs; None if they have none."""
        if blocks not in self._parts:
            self._parts[blocks] = self._cut(blocks)
        return self._parts[blocks]

    def _cut(self, blocks: Span) -> HopAdapter | None:
        part = self.adapters.within(blocks.start, blocks.end)
        if part is None:
            return None
        number_of = {id(parameter): number for number, parameter in enumerate(self.adapters.parameters)}
        entries = torch.frombuffer(bytearray(encode_entries(part.entries)), dtype=torch.uint8)
        tensors = {"adapter": entries}
        tensors |= {f"adapter.{n}": tensor.detach().contiguous() for n, tensor in enumerate(part.parameters)}
        digest = hashlib.sha256()
        for tensor in tensors.values():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        positions = tuple(number_of[id(parameter)] for parameter in part.parameters)
        return HopAdapter(digest.hexdigest(), tensors, positions)


_changes = itertools.count(1)
_last_change = 0


def note_change() -> None:
    """Something was put into a remote block somewhere."""
    global _last_change
    _last_change = next(_changes)


class AdapterWatch:
    """Reads the adapters of one set of remote blocks, cheaply while there are none."""

    def __init__(self) -> None:
        self._seen = -1
        self._has_any = False
        self._last: tuple[Any, CallAdapter] | None = None

    def read(self, blocks_now: Callable[[], Mapping[int, nn.Module]]) -> CallAdapter | None:
        """The active adapters now; ``blocks_now`` is asked only while there can be some.

        Raises:
            UnsupportedCallError: one that is not carried.
        """
        if self._seen != _last_change:
            seen = _last_change
            self._has_any = any(not is_shadow(part) for block in blocks_now().values() for part in block.modules())
            self._seen = seen  # not before: a refusal must come again
        found = collect(blocks_now()) if self._has_any else None
        if found is None:
            self._last = None
            return None
        version = (found.entries, found.version)
        if self._last is None or self._last[0] != version or found.has_dropout:
            seed = secrets.randbits(48) if found.has_dropout else None
            self._last = (version, CallAdapter(found, seed))
        return self._last[1]
