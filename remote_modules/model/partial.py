"""Local files that hold some tensors of a file on the hub, and fetching more of them.

All files of one folder are parts of one version of one remote file. A finished part is named by the sha256 of its
content, so it is whole and undamaged if its content still has that name. What is being fetched lies in a file
``.incomplete``: it grows from its start to its end, its length says where to go on, and one rename finishes it.
Writers hold the folder's lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub.utils import WeakFileLock, tqdm  # type: ignore[attr-defined]  # lazy

from remote_modules.errors import CheckpointError
from remote_modules.model.ranges import RemoteFile
from remote_modules.model.shard_header import (
    LENGTH_BYTES,
    PartLayout,
    ShardHeader,
    parse_header,
    parse_length,
    tensor_names,
)

__all__ = ["PartialFiles", "sha256_of", "write_atomically"]

logger = logging.getLogger(__name__)


class PartialFiles:
    """The parts of one version of one remote file that are on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._verified: set[Path] = set()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held against other processes, which wait for as long as this one fetches; freed if it dies."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self._folder / "lock"):
            yield

    def find(self, keys: list[str], *, is_verified: bool) -> dict[Path, list[str]]:
        """Files that hold some of these tensors, each tensor named once.

        Args:
            is_verified: compare the content with the file's name, once in this process; a damaged file is removed.
        """
        found: dict[Path, list[str]] = {}
        left = set(keys)
        for path in sorted(self._folder.glob("*.safetensors")):
            if held := left & set(self._names(path)):
                if is_verified and not self._is_intact(path):
                    continue
                found[path] = sorted(held)
                left -= held
        return found

    def _names(self, path: Path) -> list[str]:
        try:
            return tensor_names(path)
        except CheckpointError:
            self._is_intact(path)  # removes it if it is not
            return []

    def header(self, file_bytes: int) -> ShardHeader | None:
        """The remote file's header, if it has been fetched."""
        for path in self._folder.glob("*.header"):
            if self._is_intact(path):
                return parse_header(path.read_bytes(), file_bytes)
        return None

    def fetch_header(self, remote: RemoteFile) -> ShardHeader:
        """
        Raises:
            CheckpointError: it is no safetensors header, or see `RemoteFile.stream`.
        """
        length = parse_length(remote.read(0, LENGTH_BYTES), remote.size)
        text = remote.read(LENGTH_BYTES, LENGTH_BYTES + length)
        header = parse_header(text, remote.size)
        write_atomically(self._folder / f"{hashlib.sha256(text).hexdigest()}.header", text)
        return header

    def fetch(self, remote: RemoteFile, layout: PartLayout, title: str) -> Path:
        """Fetch a part, going on where an earlier attempt ended.

        Args:
            title: of the progress bar.

        Raises:
            CheckpointError: the disk is full, what came is no safetensors file, or see `RemoteFile.stream`.
            OSError: the disk fails.
        """
        incomplete = self._folder / f"{layout.name}.incomplete"
        with incomplete.open("a+b") as file:
            arrived = _start_or_resume(file, layout)
            self._check_space(layout.data_bytes - arrived)
            _append(file, remote, layout, arrived, title)
            file.flush()
            os.fsync(file.fileno())
        try:
            tensor_names(incomplete)
        except CheckpointError as exc:
            incomplete.unlink()
            raise CheckpointError(f"not a safetensors file: what came was removed: {exc}") from exc
        path = self._folder / f"{sha256_of(incomplete)}.safetensors"
        incomplete.replace(path)
        self._verified.add(path)
        return path

    def drop_incomplete(self) -> None:
        """Forget what was begun: the whole file is here."""
        for path in self._folder.glob("*.incomplete"):
            path.unlink(missing_ok=True)

    def _check_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < num_bytes:
            raise CheckpointError(f"{num_bytes} bytes are to be fetched into {self._folder}, {free} are free")

    def _is_intact(self, path: Path) -> bool:
        if path not in self._verified:
            if sha256_of(path) != path.stem:
                logger.warning("removed %s, which is damaged; its tensors are fetched again", path)
                path.unlink(missing_ok=True)
                return False
            self._verified.add(path)
        return True


def _start_or_resume(file: BinaryIO, layout: PartLayout) -> int:
    """Make ``file`` begin with the header; how many bytes of data follow it already."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    arrived = size - len(layout.header)
    if not (0 <= arrived <= layout.data_bytes and file.read(len(layout.header)) == layout.header):
        file.truncate(0)
        file.write(layout.header)
        arrived = 0
    return arrived


def _append(file: BinaryIO, remote: RemoteFile, layout: PartLayout, arrived: int, title: str) -> None:
    skipped = arrived
    open_bar: Any = tqdm  # it has no types
    with open_bar(total=layout.data_bytes, initial=arrived, unit="B", unit_scale=True, desc=title) as bar:
        for start, end in layout.ranges:
            first = min(start + skipped, end)
            skipped -= first - start
            with closing(remote.stream(first, end)) as pieces:
                for piece in pieces:
                    file.write(piece)
                    bar.update(len(piece))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.incomplete")
    temporary.write_bytes(data)
    temporary.replace(path)
