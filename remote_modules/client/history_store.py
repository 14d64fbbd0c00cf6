"""Where a client keeps the histories of its sessions: in memory up to a budget, beyond that on disk."""

from __future__ import annotations

import logging
import tempfile
import threading
import zlib
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary, finalize

import torch

from remote_modules.errors import SessionError
from remote_modules.model.tensors import num_bytes

__all__ = ["HistoryStore", "StoredTensors"]

logger = logging.getLogger(__name__)

Named = dict[str, torch.Tensor]

INT8_BLOCK = 64  # values that share a scale
MIN_INT8_VALUES = 1024  # smaller tensors are not worth it


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One tensor as it is kept: itself, or int8 values ``[blocks, 64]`` with a float32 scale for each block."""

    values: torch.Tensor
    scales: torch.Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return num_bytes({"values": self.values} | ({} if self.scales is None else {"scales": self.scales}))

    def decode(self) -> torch.Tensor:
        if self.scales is None:
            return self.values
        flat = (self.values.to(torch.float32) * self.scales).flatten()
        size = torch.Size(self.shape).numel()
        return flat[:size].reshape(self.shape).to(self.dtype)


@dataclass(frozen=True, slots=True)
class _Extent:
    """Bytes of the file, and how to read the tensors in them: name, dtype and shape of values and scales."""

    start: int
    num_bytes: int
    crc32: int
    layout: tuple[tuple[str, _Encoded], ...]  # on the meta device


class StoredTensors:
    """Tensors in a `HistoryStore`, for as long as this object lives."""

    def __init__(self, store: HistoryStore, tensors: dict[str, _Encoded]) -> None:
        self.num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
        self._store = store
        self.place: dict[str, _Encoded] | _Extent = tensors

    def read(self) -> Named:
        """The tensors; those that were kept as int8 within half a 127th of the largest of 64 values.

        Raises:
            SessionError: the file was damaged.
        """
        place = self.place
        tensors = self._store.load(place) if isinstance(place, _Extent) else place
        return {name: tensor.decode() for name, tensor in tensors.items()}


class HistoryStore:
    """Tensors of all histories of one client.

    Args:
        memory_bytes: beyond these the oldest are written to a file.
        dtype: ``"compute"`` keeps them as they are; ``"int8"`` floats as blockwise int8, about a quarter of float32.
        folder: for the file, which has no name there and is gone with the process; None for the system's choice.
    """

    def __init__(self, *, memory_bytes: int, dtype: str = "compute", folder: Path | None = None) -> None:
        self._num_memory = 0
        self._num_disk = 0
        self._budget_bytes = memory_bytes
        self._is_int8 = dtype == "int8"
        self._folder = folder
        self._file: BinaryIO | None = None
        self._free: list[tuple[int, int]] = []  # start and length of holes in the file, by start
        self._file_end = 0
        self._is_full = False
        self._next_key = 0
        self._in_memory: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._stored: WeakValueDictionary[int, StoredTensors] = WeakValueDictionary()
        self._extents: dict[int, _Extent] = {}
        self._gone: deque[tuple[int, int]] = deque()  # key and bytes; objects die on any thread, at any moment
        self._lock = threading.Lock()

    @property
    def bytes_in_memory(self) -> int:
        """Of sealed chunks; the few newest tokens of each history are not counted."""
        with self._lock:
            self._forget()
            return self._num_memory

    @property
    def bytes_on_disk(self) -> int:
        with self._lock:
            self._forget()
            return self._num_disk

    def keep(self, tensors: Named) -> StoredTensors:
        """Take ``tensors`` (CPU), which must not change from now on."""
        stored = StoredTensors(self, {name: self._encode(tensor) for name, tensor in tensors.items()})
        with self._lock:
            self._forget()
            key, self._next_key = self._next_key, self._next_key + 1
            self._stored[key] = stored
            self._in_memory[key] = None
            self._num_memory += stored.num_bytes
            finalize(stored, self._gone.append, (key, stored.num_bytes)).atexit = False
            self._make_room()
        return stored

    def load(self, extent: _Extent) -> dict[str, _Encoded]:
        """Read what was written.

        Raises:
            SessionError: it is not what was written.
        """
        if self._file is None:
            raise SessionError("these remote blocks are closed; make new ones with from_swarm")
        with self._lock:
            self._file.seek(extent.start)
            data = bytearray(self._file.read(extent.num_bytes))
        if zlib.crc32(data) != extent.crc32:
            raise SessionError("the file with the session's history is damaged: start a new session")
        tensors = {}
        offset = 0
        for name, meta in extent.layout:
            values, offset = _tensor_of(data, offset, meta.values)
            scales = None
            if meta.scales is not None:
                scales, offset = _tensor_of(data, offset, meta.scales)
            tensors[name] = _Encoded(values, scales, meta.shape, meta.dtype)
        return tensors

    def close(self) -> None:
        """Give the file back; what is in it can be read no more. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _encode(self, tensor: torch.Tensor) -> _Encoded:
        shape = tuple(tensor.shape)
        if not self._is_int8 or not tensor.is_floating_point() or tensor.numel() < MIN_INT8_VALUES:
            return _Encoded(tensor, None, shape, tensor.dtype)
        flat = tensor.flatten().to(torch.float32)
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % INT8_BLOCK)).view(-1, INT8_BLOCK)
        scales = flat.abs().amax(dim=1, keepdim=True) / 127.0
        values = (flat / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return _Encoded(values, scales, shape, tensor.dtype)

    def _make_room(self) -> None:
        while self._num_memory > self._budget_bytes and self._in_memory and not self._is_full:
            key = next(iter(self._in_memory))
            stored = self._stored.get(key)
            if stored is None:
                return  # about to be forgotten
            try:
                extent = self._write(stored)
            except OSError as exc:
                self._is_full = True
                logger.warning("histories stay in memory beyond history_memory_bytes, the disk takes no more: %s", exc)
                return
            del self._in_memory[key]
            stored.place = extent
            self._extents[key] = extent
            self._num_memory -= stored.num_bytes
            self._num_disk += stored.num_bytes

    def _write(self, stored: StoredTensors) -> _Extent:
        tensors = stored.place
        assert isinstance(tensors, dict)
        parts = [part for tensor in tensors.values() for part in (tensor.values, tensor.scales) if part is not None]
        data = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="remote-modules-", buffering=0)
            finalize(self, self._file.close)
        start = self._allocate(len(data))
        try:
            self._file.seek(start)
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
        except OSError:
            self._release(start, len(data))
            raise
        layout = tuple((name, _meta(tensor)) for name, tensor in tensors.items())
        return _Extent(start, len(data), zlib.crc32(data), layout)

    def _allocate(self, length: int) -> int:
        """First fit."""
        for number, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[number : number + 1] = [(start + length, free - length)] if free > length else []
                return start
        start, self._file_end = self._file_end, self._file_end + length
        return start

    def _release(self, start: int, length: int) -> None:
        holes: list[tuple[int, int]] = []
        for hole in sorted([*self._free, (start, length)]):
            if holes and sum(holes[-1]) == hole[0]:
                holes[-1] = (holes[-1][0], holes[-1][1] + hole[1])
            else:
                holes.append(hole)
        if holes and sum(holes[-1]) == self._file_end:
            self._file_end = holes.pop()[0]
            if self._file is not None:
                self._file.truncate(self._file_end)
        self._free = holes

    def _forget(self) -> None:
        """The last histories that had these tensors are gone."""
        while self._gone:
            key, length = self._gone.popleft()
            self._in_memory.pop(key, None)
            extent = self._extents.pop(key, None)
            if extent is None:
                self._num_memory -= length
            else:
                self._num_disk -= length
                self._release(extent.start, extent.num_bytes)
                self._is_full = False


def _meta(tensor: _Encoded) -> _Encoded:
    scales = None if tensor.scales is None else tensor.scales.to("meta")
    return _Encoded(tensor.values.to("meta"), scales, tensor.shape, tensor.dtype)


def _tensor_of(data: bytearray, offset: int, meta: torch.Tensor) -> tuple[torch.Tensor, int]:
    size = meta.numel() * meta.itemsize
    if not size:
        return torch.empty(meta.shape, dtype=meta.dtype), offset
    flat = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)
    if (flat.data_ptr() % meta.itemsize) != 0:
        flat = flat.clone()
    return flat.view(meta.dtype).reshape(meta.shape), offset + size
