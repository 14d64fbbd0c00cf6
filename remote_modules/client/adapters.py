"""Adapters of remote blocks as they travel: to a peer once, then by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from remote_modules.client.adapter_snapshots import Snapshots
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapter_content import AdapterContent, content_of
from remote_modules.model.adapter_entries import FIRST_METHODS, Entry
from remote_modules.model.adapter_reading import collect
from remote_modules.model.adapter_rows import groups_of
from remote_modules.model.adapters import AdapterSet, decode_entries, encode_entries
from remote_modules.model.shadow import is_shadow
from remote_modules.spans import Span
from remote_modules.wire.messages import ADAPTER_ROWS_SINCE_MINOR, MORE_METHODS_SINCE_MINOR
from remote_modules.wire.parts import MAX_ADAPTER_ROWS

__all__ = ["AdapterWatch", "CallAdapter", "HopAdapter", "note_change", "row_names"]

Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class HopAdapter:
    """The adapters of one hop's blocks.

    Attributes:
        name: of the content.
        tensors: ``adapter.<n>``, those that a gradient is returned for.
        positions: of these tensors among all of the `AdapterSet`.
        content: as it travels part by part; None for one that only peers have.
    """

    name: str
    tensors: Named
    positions: tuple[int, ...]
    content: AdapterContent | None

    def whole(self) -> Named:
        """As peers before protocol 1.3 take it."""
        assert self.content is not None
        entries = [entry for part in self.content.tensors if part.dtype is torch.uint8 for entry in _entries(part)]
        return {"adapter": _encoded(entries), **self.tensors}


@dataclass(slots=True)
class CallAdapter:
    """The adapters that one call of the model has.

    Args:
        adapters: with tensors on the CPU.
        seed: of their dropout, or None.
        offered: ``name@digest`` of one that peers offer, in the place of all that; or "".
        snapshots: of the tensors, from call to call.
        digests: of tensors of ``adapters`` that are known, by the ``id`` of each; others are computed when needed.
    """

    adapters: AdapterSet
    seed: int | None = None
    offered: str = ""
    snapshots: Snapshots = field(default_factory=Snapshots)
    digests: dict[int, bytes] = field(default_factory=dict)
    _parts: dict[Span, HopAdapter | None] = field(default_factory=dict, init=False)

    @property
    def row_names(self) -> tuple[str, ...]:
        """Of each row the name of its adapter, where they have different ones."""
        return self.adapters.row_names

    @classmethod
    def named(cls, offered: str) -> CallAdapter:
        return cls(AdapterSet((), ()), offered=offered)

    def taken(self, parameters: Sequence[torch.Tensor]) -> CallAdapter:
        """The same with what ``parameters`` hold now, in the place of its own, and hashed. On the caller's thread."""
        found = self.snapshots.take(parameters)
        adapters = replace(self.adapters, parameters=tuple(snapshot.tensor for snapshot in found))
        digests = {id(snapshot.tensor): snapshot.digest for snapshot in found}
        return replace(self, adapters=adapters, digests=digests)

    @property
    def minor(self) -> int:
        """The version of the protocol that peers must speak at least to know all of its methods."""
        if self.row_names:
            return ADAPTER_ROWS_SINCE_MINOR
        is_old = all(isinstance(entry, FIRST_METHODS) for entry in self.adapters.entries)
        return 0 if is_old else MORE_METHODS_SINCE_MINOR

    def rows(self, names: Sequence[str]) -> bytes:
        """The rows that have these adapters, as they travel: the group of each."""
        groups = groups_of(self.row_names)
        return bytes(groups[name] for name in names)

    def part(self, blocks: Span) -> HopAdapter | None:
        """What the hop with these ``blocks`` needs; None if they have none."""
        if blocks not in self._parts:
            self._parts[blocks] = self._cut(blocks)
        return self._parts[blocks]

    def _cut(self, blocks: Span) -> HopAdapter | None:
        if self.offered:
            return HopAdapter(self.offered, {}, (), None)
        part = self.adapters.within(blocks.start, blocks.end)
        if part is None:
            return None
        number_of = {id(parameter): number for number, parameter in enumerate(self.adapters.parameters)}
        content = content_of(part, self.digests)
        tensors = {f"adapter.{n}": tensor.detach().to("cpu").contiguous() for n, tensor in enumerate(part.parameters)}
        positions = tuple(number_of[id(parameter)] for parameter in part.parameters)
        return HopAdapter(content.name, tensors, positions, content)


def row_names(adapter: CallAdapter | None, num_rows: int) -> tuple[str, ...]:
    """Of each row of a call the name of its adapter; empty where all rows have the same.

    Raises:
        UnsupportedCallError: there are more or fewer names than rows, or too many.
    """
    names = () if adapter is None else adapter.row_names
    if names and len(names) != num_rows:
        raise UnsupportedCallError(f"adapter_names must have one name for each of {num_rows} rows, got {len(names)}")
    if len(names) > MAX_ADAPTER_ROWS:
        raise UnsupportedCallError(f"adapter_names are carried for {MAX_ADAPTER_ROWS} rows, got {len(names)}")
    return names


def _entries(part: torch.Tensor) -> list[Entry]:
    return decode_entries(part.numpy().tobytes())


def _encoded(entries: list[Entry]) -> torch.Tensor:
    return torch.frombuffer(bytearray(encode_entries(entries)), dtype=torch.uint8)


_changes = itertools.count(1)
_last_change = 0


def note_change() -> None:
    """Something was put into a remote block somewhere."""
    global _last_change
    _last_change = next(_changes)


def _new_seed() -> int:
    """From torch's generator, where a local model would draw its masks: `torch.manual_seed` makes a run repeatable."""
    return int(torch.randint(2**48, (), dtype=torch.int64, device="cpu"))


class AdapterWatch:
    """Reads the adapters of one set of remote blocks, cheaply while there are none."""

    def __init__(self) -> None:
        self._seen = -1
        self._has_any = False
        self._last: tuple[Any, CallAdapter] | None = None
        self._snapshots = Snapshots()

    def read(self, blocks_now: Callable[[], Mapping[int, nn.Module]]) -> CallAdapter | None:
        """The active adapters now; ``blocks_now`` is asked only while there can be some.

        A write through ``.data`` alone is seen by passes, which take the tensors again, and by no step of a session.

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
        version = (found.entries, found.version, found.row_names)
        if self._last is None or self._last[0] != version or found.has_dropout:
            seed = _new_seed() if found.has_dropout else None
            taken = self._snapshots.take(found.parameters)  # hashed here, on the caller's thread
            known = zip(found.parameters, taken, strict=True)
            digests = {id(parameter): snapshot.digest for parameter, snapshot in known}
            self._last = (version, CallAdapter(found, seed, snapshots=self._snapshots, digests=digests))
        return self._last[1]
