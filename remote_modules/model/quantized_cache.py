"""Quantized blocks on disk, so that a peer that starts again neither reads its checkpoint nor quantizes.

One safetensors file for each block, ``<root>/quantized/<key>/block-<i>.safetensors``; the key is a digest of all that
the contents depend on, and peers of other spans of the model share them. A file is written under another name and
renamed when whole. Reading checks a digest of all tensors: what is truncated, changed or of another model is not used.
Nothing here raises: without a cache a peer only starts slower. Least recently used files go when all together exceed
``max_bytes``; the whole folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from remote_modules.model.checkpoint import Checkpoint

__all__ = ["MAX_BYTES", "QuantizedCache", "cache_root", "model_digest"]

MAX_BYTES = 256 * 1024**3
_FORMAT = "1"  # of the files; another one makes another key
_PACKAGES = ("bitsandbytes", "transformers")
_STALE_S = 24 * 3600.0  # a half-written file so old is a crashed process's

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """``$REMOTE_MODULES_CACHE``, or ``~/.cache/remote-modules``; read when called."""
    return Path(os.environ.get("REMOTE_MODULES_CACHE") or Path.home() / ".cache" / "remote-modules").expanduser()


def model_digest(
    checkpoint: Checkpoint, config: PreTrainedConfig, *, quantization: str, dtype: torch.dtype | str
) -> str:
    """32 hex characters; of hub checkpoints the commit counts, of folders the names, sizes and times of files."""
    if checkpoint.hub is not None:
        identity: object = [checkpoint.hub.name, checkpoint.hub.commit]
    else:
        paths = [checkpoint.folder / name for name in sorted(set(checkpoint.weight_map.values()))]
        stats = [(path.name, path.stat()) for path in paths if path.exists()]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        identity = [str(checkpoint.folder.resolve()), files]
    versions = [version(name) for name in _PACKAGES]
    parts = [_FORMAT, versions, identity, config.to_dict(), quantization, str(dtype)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class QuantizedCache:
    """The stored blocks of one model in one quantization.

    Args:
        key: from `model_digest`.
        root: where the caches of all models are; None for `cache_root`.
        max_bytes: of all models' files together, more than those of this model that were used here.

    Attributes:
        digests: of the blocks read or written so far, the digest of the original weights (`model.fingerprint`).
    """

    def __init__(self, key: str, root: Path | None = None, *, max_bytes: int = MAX_BYTES) -> None:
        self._root = (cache_root() if root is None else root) / "quantized"
        self._key = key
        self._max_bytes = max_bytes
        self._used: set[Path] = set()
        self.digests: dict[int, str] = {}

    def path(self, block: int) -> Path:
        return self._root / self._key / f"block-{block}.safetensors"

    def read(self, block: int) -> dict[str, torch.Tensor] | None:
        """The tensors that `write` got, on the CPU; None if there are none, or if they are not intact."""
        path = self.path(block)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as exc:
            logger.warning("cached block %s is not readable and is made again: %s", path, exc)
            return None
        origin = {"key": self._key, "block": str(block), "digest": metadata.get("digest", "")}
        if metadata != {**origin, "sha256": _checksum(origin, tensors)}:
            logger.warning("cached block %s is damaged or not ours, and is made again", path)
            return None
        self._touch(path)
        self.digests[block] = origin["digest"]
        return tensors

    def write(self, block: int, tensors: Mapping[str, torch.Tensor], digest: str) -> None:
        """Store a block; when that fails, such as for a full disk, log it and go on.

        Args:
            digest: of the original weights, kept for `digests`.
        """
        self.digests[block] = digest
        path = self.path(block)
        own = _own_storage(tensors)
        metadata = {"key": self._key, "block": str(block), "digest": digest}
        metadata["sha256"] = _checksum(metadata, own)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
                part = Path(folder) / path.name
                save_file(own, str(part), metadata=metadata)
                part.replace(path)
        except (OSError, SafetensorError) as exc:
            logger.warning("block %d is not kept in %s and will be quantized again next time: %s", block, path, exc)
            return
        self._used.add(path)
        try:
            self._evict()
        except OSError as exc:  # another process tidies at the same time
            logger.debug("%s is not tidied now: %s", self._root, exc)

    def _touch(self, path: Path) -> None:
        self._used.add(path)
        try:
            os.utime(path)
        except OSError as exc:  # a cache that is only readable is still of use
            logger.debug("time of use of %s is not noted: %s", path, exc)

    def _evict(self) -> None:
        stats = {path: path.stat() for path in self._root.glob("*/block-*.safetensors")}
        excess = sum(stat.st_size for stat in stats.values()) - self._max_bytes
        for path in sorted(stats, key=lambda path: stats[path].st_mtime_ns):
            if excess <= 0:
                break
            if path not in self._used:
                path.unlink(missing_ok=True)
                excess -= stats[path].st_size
        for folder in self._root.glob("*/.writing-*"):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _checksum(origin: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _own_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same on the CPU, contiguous, none sharing memory: what safetensors can write."""
    own: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    return own
