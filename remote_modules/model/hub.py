"""A model on the hub, of which only the wanted tensors are fetched.

Whole files lie in `huggingface_hub`'s cache and come through it. A shard of which less is wanted than
`_WHOLE_SHARE` is read in byte ranges into local parts (`model.partial`); they lie beside the whole files, in the folder
``remote-modules`` of the model's folder in the same cache, so that ``hf cache`` removes both together::

    refs/<commit>/<file>.json           version (etag) and size of a file at that commit
    refs/<commit>/<file>.unchecked      a whole download began here, and its sha256 is not checked yet
    files/<digest of the etag>/         the parts of one version of a file
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from remote_modules.errors import CheckpointError, first_line
from remote_modules.model.partial import PartialFiles, sha256_of, write_atomically
from remote_modules.model.ranges import HTTP_ERROR, NoRangesError, RemoteFile, find_remote
from remote_modules.model.shard_header import ShardHeader, tensor_names

__all__ = ["HubModel", "fetch_files", "open_hub_model"]

logger = logging.getLogger(__name__)

_WHOLE_SHARE = 0.8  # above it the whole is fetched: other programs can use that, and the hub knows its sha256
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """One commit of a model on the hub.

    Attributes:
        snapshot: the commit's folder in the hub cache; what was fetched whole is there.
        commit: what the revision meant when it was opened; a branch may move on before the last shard is fetched.
        cache_dir, token: as `hf_hub_download` takes them.
    """

    name: str
    snapshot: Path
    commit: str
    cache_dir: str | None = None
    token: str | None = None
    _parts: dict[str, PartialFiles] = field(default_factory=dict, compare=False)  # by etag; as many as shards

    def small_file(self, file_name: str) -> Path | None:
        """A file fetched whole, or None if the model has none of that name."""
        cached = try_to_load_from_cache(self.name, file_name, cache_dir=self.cache_dir, revision=self.commit)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None  # else a sentinel: it is known to have none
        with _plain_errors(self.name, file_name):
            try:
                return self._download(file_name)
            except EntryNotFoundError:  # also of an offline cache
                return None

    def tensor_names(self, file_name: str) -> list[str]:
        """Names of the tensors in a shard, of which no more than the header is fetched.

        Raises:
            CheckpointError: it cannot be had, or is not a safetensors file.
        """
        whole = self.snapshot / file_name
        if not whole.exists():
            with _plain_errors(self.name, file_name):
                header = self._header(file_name)
            if header is not None:
                return list(header.tensors)
            whole = self._whole(file_name)
        return tensor_names(whole)

    def files(self, file_name: str, keys: list[str], *, is_all: bool) -> dict[Path, list[str]]:
        """Local files to the ones of ``keys`` that they hold, of one shard; fetches what is missing.

        Args:
            is_all: the shard has no other tensors.

        Raises:
            CheckpointError: they cannot be had.
        """
        if not (self.snapshot / file_name).exists():
            with _plain_errors(self.name, file_name):
                found = self._partial_files(file_name, keys, is_all=is_all)
            if found is not None:
                return found
        return {self._whole(file_name): keys}

    def local_files(self, file_name: str, keys: list[str]) -> dict[Path, list[str]] | None:
        """As `files`, but fetches nothing and verifies nothing: None if some tensor is not here."""
        whole = self.snapshot / file_name
        if whole.exists():
            return {whole: keys}
        with _plain_errors(self.name, file_name):
            remote = self._recorded(file_name)
            found = {} if remote is None else self._parts_of(remote).find(keys, is_verified=False)
        return found if _num_keys(found) == len(keys) else None

    # Parts

    def _partial_files(self, file_name: str, keys: list[str], *, is_all: bool) -> dict[Path, list[str]] | None:
        """None if the whole is to be used."""
        remote = self._remote(file_name)
        if remote is None:
            return None
        parts = self._parts_of(remote)
        found = parts.find(keys, is_verified=True)
        if _num_keys(found) == len(keys):
            return found
        if constants.HF_HUB_OFFLINE or (is_all and not found):
            return None
        with parts.locked():
            found = parts.find(keys, is_verified=True)  # again: another process may have fetched them meanwhile
            missing = sorted(set(keys).difference(*found.values()))
            if not missing:
                return found
            try:
                header = parts.header(remote.size) or parts.fetch_header(remote)
                absent = [key for key in missing if key not in header.tensors]
                if absent:
                    raise CheckpointError(f"it lacks tensor '{absent[0]}', which the index says it has")
                layout = header.part(missing)
                if layout.data_bytes > _WHOLE_SHARE * remote.size:
                    return None
                logger.info("fetching %d of the %d bytes of %s", layout.data_bytes, remote.size, file_name)
                return found | {parts.fetch(remote, layout, file_name): missing}
            except NoRangesError as exc:
                logger.info("fetching the whole of %s, as the server gives no ranges: %s", file_name, exc)
                return None

    def _header(self, file_name: str) -> ShardHeader | None:
        """None if only the whole shard can tell."""
        remote = self._remote(file_name)
        if remote is None:
            return None
        parts = self._parts_of(remote)
        header = parts.header(remote.size)
        if header is not None or constants.HF_HUB_OFFLINE:
            return header
        with parts.locked():
            try:
                return parts.fetch_header(remote)
            except NoRangesError as exc:
                logger.info("fetching the whole of %s, as the server gives no ranges: %s", file_name, exc)
                return None

    def _remote(self, file_name: str) -> RemoteFile | None:
        """Version and size of a shard; None if that is not known, and cannot be asked."""
        remote = self._recorded(file_name)
        if remote is None and not constants.HF_HUB_OFFLINE:
            remote = find_remote(hf_hub_url(self.name, file_name, revision=self.commit), self.token)
            if remote is not None:
                record = json.dumps({"etag": remote.etag, "size": remote.size})
                write_atomically(self._ref(file_name, "json"), record.encode())
        return remote

    def _recorded(self, file_name: str) -> RemoteFile | None:
        try:
            record = json.loads(self._ref(file_name, "json").read_text("utf-8"))
            url = hf_hub_url(self.name, file_name, revision=self.commit)
            return RemoteFile(url, str(record["etag"]), int(record["size"]), self.token)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as exc:
            logger.warning("the record of %s is not readable, and made again: %s", file_name, first_line(exc))
            return None

    def _parts_of(self, remote: RemoteFile) -> PartialFiles:
        folder = self._store / "files" / hashlib.sha256(remote.etag.encode()).hexdigest()[:40]
        return self._parts.setdefault(remote.etag, PartialFiles(folder))

    @property
    def _store(self) -> Path:
        return self.snapshot.parent.parent / "remote-modules"

    def _ref(self, file_name: str, suffix: str) -> Path:
        return self._store / "refs" / self.commit / f"{file_name}.{suffix}"

    # Whole files

    def _whole(self, file_name: str) -> Path:
        """A shard fetched whole, and compared once with the sha256 that the hub names large files by."""
        path = self.snapshot / file_name
        mark = self._ref(file_name, "unchecked")
        with _plain_errors(self.name, file_name):
            if not path.exists():
                if not constants.HF_HUB_OFFLINE:
                    write_atomically(mark, b"")
                path = self._download(file_name)
            if mark.exists():
                self._check(path, file_name)
                if (remote := self._recorded(file_name)) is not None:
                    self._parts_of(remote).drop_incomplete()
                mark.unlink(missing_ok=True)
        return path

    def _check(self, path: Path, file_name: str) -> None:
        blob = path.resolve()
        recorded = self._recorded(file_name)
        expected = recorded.etag if recorded is not None else blob.name
        if not _SHA256.fullmatch(expected):
            return  # a small file, named by git's hash, or an unusual server: its length alone is known
        digest = sha256_of(path)
        if digest != expected:
            path.unlink()
            if blob.parent == self.snapshot.parent.parent / "blobs":
                blob.unlink(missing_ok=True)
            raise CheckpointError(f"it arrived damaged and was removed: sha256 {digest}, the hub says {expected}")

    def _download(self, file_name: str) -> Path:
        return Path(
            hf_hub_download(self.name, file_name, revision=self.commit, cache_dir=self.cache_dir, token=self.token)
        )


def open_hub_model(name: str, revision: str | None, cache_dir: str | None, token: str | None) -> HubModel:
    """Find out which commit ``revision`` is, by fetching the config.

    Raises:
        CheckpointError: no such model, or it can be neither fetched nor found in the cache.
    """
    with _plain_errors(name, "config.json"):
        path = Path(hf_hub_download(name, "config.json", revision=revision, cache_dir=cache_dir, token=token))
    return HubModel(name, snapshot=path.parent, commit=path.parent.name, cache_dir=cache_dir, token=token)


def fetch_files(name: str, file_names: Sequence[str], *, cache_dir: str | None, token: str | None) -> Path:
    """The folder in the cache with some files, whole.

    Raises:
        CheckpointError: there is no such repository or file, or it can be neither asked nor found in the cache.
    """
    folder: Path | None = None
    for file_name in file_names:
        with _plain_errors(name, file_name):
            path = Path(hf_hub_download(name, file_name, cache_dir=cache_dir, token=token))
            folder = path.parent
    assert folder is not None
    return folder


def _num_keys(files: dict[Path, list[str]]) -> int:
    return sum(len(keys) for keys in files.values())


@contextmanager
def _plain_errors(name: str, file_name: str) -> Iterator[None]:
    """Errors of the hub, the disk and the file, said in one line."""
    try:
        yield
    except CheckpointError as exc:
        raise CheckpointError(f"cannot use '{file_name}' of '{name}': {exc}") from exc
    except GatedRepoError as exc:
        raise CheckpointError(f"'{name}' is gated: ask for access on the hub, then pass a token that has it") from exc
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as exc:
        raise CheckpointError(f"'{name}' is neither a local folder nor a model on the hub: {first_line(exc)}") from exc
    except LocalEntryNotFoundError as exc:
        text = f"'{file_name}' of '{name}' is not in the hub cache, and the hub cannot be asked: {first_line(exc)}"
        raise CheckpointError(text) from exc
    except EntryNotFoundError as exc:
        raise CheckpointError(f"'{name}' has no '{file_name}' on the hub; only safetensors are loaded") from exc
    except HfHubHTTPError as exc:
        may_need_token = getattr(exc.response, "status_code", 0) in (401, 403)
        hint = "; pass a token that may read it" if may_need_token else ""
        raise CheckpointError(f"cannot get '{file_name}' of '{name}' from the hub: {first_line(exc)}{hint}") from exc
    except (HTTP_ERROR, OSError, RuntimeError) as exc:  # RuntimeError: of the downloader for large files, hf_xet
        raise CheckpointError(f"cannot get '{file_name}' of '{name}' from the hub: {first_line(exc)}") from exc
