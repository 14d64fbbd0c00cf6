"""Finding a checkpoint and deciding which of its files a span needs.

A model is named by a local folder, a hub id, or the name of the built-in model. Only safetensors are read; hub files
come through `huggingface_hub`, so its cache, revision, token and ``HF_HUB_OFFLINE`` conventions hold, and only the
shards that hold wanted tensors are downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from remote_modules.errors import CheckpointError, first_line

__all__ = ["BUILT_IN", "Checkpoint", "built_in_path", "open_checkpoint"]

BUILT_IN = "pydoc-2m"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SMALL_FILES = ("config.json", "generation_config.json")


def built_in_path() -> Path:
    """The folder of the small model that ships with the package (its README.md says how it was trained)."""
    return Path(__file__).parent.parent / "assets" / BUILT_IN


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose config and index are at hand; shards may still be remote.

    Attributes:
        name: what the user called it.
        folder: local folder of the config and of the files present so far.
        weight_map: tensor name to shard file name.
        repository: hub id when missing shards can be fetched, else None.
        revision, cache_dir, token: hub options; of a hub model, the revision is the commit that its config came from.
    """

    name: str
    folder: Path
    weight_map: Mapping[str, str]
    repository: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = None

    def shards(self, wanted: Callable[[str], bool]) -> dict[str, list[str]]:
        """Shard file names to the wanted tensor names in them, both in order."""
        shards: dict[str, list[str]] = {}
        for key in sorted(self.weight_map):
            if wanted(key):
                shards.setdefault(self.weight_map[key], []).append(key)
        return dict(sorted(shards.items()))

    def shard_path(self, file_name: str) -> Path:
        """Where a shard lies, fetching it from the hub if need be.

        Raises:
            CheckpointError: it is missing.
        """
        path = self.folder / file_name
        if path.exists():
            return path
        if self.repository is None:
            raise CheckpointError(f"checkpoint {self.folder} lacks shard '{file_name}' that its index names")
        return _hub_file(self.repository, file_name, self.revision, self.cache_dir, self.token)


def open_checkpoint(
    name: str, *, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Checkpoint:
    """Resolve ``name`` and read its index; no weights are read.

    Raises:
        CheckpointError: not found, or not in safetensors format.
    """
    folder = built_in_path() if name == BUILT_IN else Path(name).expanduser()
    if folder.is_dir():
        return Checkpoint(name=name, folder=folder, weight_map=_local_weight_map(folder))
    if folder.is_absolute() or name.startswith((".", "~")):
        raise CheckpointError(f"checkpoint folder {name} does not exist")
    return _open_hub_checkpoint(name, revision, cache_dir, token)


def _local_weight_map(folder: Path) -> dict[str, str]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"checkpoint {folder} has no config.json")
    if (folder / INDEX_NAME).is_file():
        return _read_index(folder / INDEX_NAME)
    if (folder / SINGLE_NAME).is_file():
        return _read_single(folder / SINGLE_NAME)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"checkpoint {folder} has only pickled weights ({pickled[0]}), which are never loaded; "
            "save it with save_pretrained to get safetensors"
        )
    raise CheckpointError(f"checkpoint {folder} has neither {INDEX_NAME} nor {SINGLE_NAME}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"index {path} is not readable: {exc!r}") from exc
    for key, file_name in items.items():
        if not isinstance(file_name, str) or file_name in ("", "..") or Path(file_name).name != file_name:
            raise CheckpointError(f"index {path} maps '{key}' outside its folder: {file_name!r}")
    return items


def _read_single(path: Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict.fromkeys(file.keys(), path.name)
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"weights {path} are not readable: {exc}") from exc


def _open_hub_checkpoint(name: str, revision: str | None, cache_dir: str | None, token: str | None) -> Checkpoint:
    config_path = _hub_file(name, _SMALL_FILES[0], revision, cache_dir, token)
    revision = config_path.parent.name  # the commit: a branch may move on before the last shard is fetched
    for optional in _SMALL_FILES[1:]:
        _hub_file_if_present(name, optional, revision, cache_dir, token)
    index = _hub_file_if_present(name, INDEX_NAME, revision, cache_dir, token)
    if index is not None:
        weight_map = _read_index(index)
    else:
        weight_map = _read_single(_hub_file(name, SINGLE_NAME, revision, cache_dir, token))
    return Checkpoint(
        name=name,
        folder=config_path.parent,
        weight_map=weight_map,
        repository=name,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
    )


def _hub_file_if_present(
    name: str, file_name: str, revision: str | None, cache_dir: str | None, token: str | None
) -> Path | None:
    try:
        return Path(
            huggingface_hub.hf_hub_download(name, file_name, revision=revision, cache_dir=cache_dir, token=token)
        )
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def _hub_file(name: str, file_name: str, revision: str | None, cache_dir: str | None, token: str | None) -> Path:
    try:
        path = huggingface_hub.hf_hub_download(name, file_name, revision=revision, cache_dir=cache_dir, token=token)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as exc:
        raise CheckpointError(f"'{name}' is neither a local folder nor a model on the hub: {first_line(exc)}") from exc
    except LocalEntryNotFoundError as exc:
        raise CheckpointError(
            f"'{file_name}' of '{name}' is not in the hub cache, and the hub cannot be asked: {first_line(exc)}"
        ) from exc
    except EntryNotFoundError as exc:
        raise CheckpointError(f"'{name}' has no '{file_name}' on the hub; only safetensors are loaded") from exc
    except (HfHubHTTPError, OSError) as exc:
        raise CheckpointError(f"cannot get '{file_name}' of '{name}' from the hub: {first_line(exc)}") from exc
    return Path(path)
