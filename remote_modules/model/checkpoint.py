"""Finding a checkpoint and deciding which of its files a span needs.

A model is named by a local folder, a hub id, or the name of the built-in model. Only safetensors are read. Of a model
on the hub only the wanted tensors are fetched (`model.hub`), by `huggingface_hub`'s conventions: its cache, revision,
token, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from remote_modules.errors import CheckpointError
from remote_modules.model.hub import HubModel, open_hub_model
from remote_modules.model.shard_header import tensor_names

__all__ = ["BUILT_IN", "Checkpoint", "built_in_draft_path", "built_in_path", "open_checkpoint"]

BUILT_IN = "pydoc-2m"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def built_in_path() -> Path:
    """The folder of the small model that ships with the package (its README.md says how it was trained)."""
    return Path(__file__).parent.parent / "assets" / BUILT_IN


def built_in_draft_path() -> Path:
    """The folder of the draft model for it (`examples/train_draft_model.py` made it)."""
    return built_in_path().with_name(f"{BUILT_IN}-draft")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose config and index are at hand; weights may still be remote.

    Attributes:
        name: what the user called it.
        folder: local folder of the config and of the files present so far.
        weight_map: tensor name to shard file name.
        hub: where missing weights are fetched from; None for a local folder.
    """

    name: str
    folder: Path
    weight_map: Mapping[str, str]
    hub: HubModel | None = None

    def shards(self, wanted: Callable[[str], bool]) -> dict[str, list[str]]:
        """Shard file names to the wanted tensor names in them, both in order."""
        shards: dict[str, list[str]] = {}
        for key in sorted(self.weight_map):
            if wanted(key):
                shards.setdefault(self.weight_map[key], []).append(key)
        return dict(sorted(shards.items()))

    def part(self, wanted: Callable[[str], bool]) -> dict[Path, list[str]]:
        """Local files to the wanted tensor names to take from them; fetches from the hub what is missing.

        Raises:
            CheckpointError: some cannot be had.
        """
        files: dict[Path, list[str]] = {}
        sizes = Counter(self.weight_map.values())
        for file_name, keys in self.shards(wanted).items():
            if self.hub is not None:
                _add(files, self.hub.files(file_name, keys, is_all=len(keys) == sizes[file_name]))
            elif (path := self.folder / file_name).exists():
                _add(files, {path: keys})
            else:
                raise CheckpointError(f"checkpoint {self.folder} lacks shard '{file_name}' that its index names")
        return files

    def local_part(self, wanted: Callable[[str], bool]) -> dict[Path, list[str]] | None:
        """As `part`, but fetches nothing: None if some wanted tensor is not on this machine."""
        files: dict[Path, list[str]] = {}
        for file_name, keys in self.shards(wanted).items():
            path = self.folder / file_name
            found = {path: keys} if path.exists() else None
            if found is None and self.hub is not None:
                found = self.hub.local_files(file_name, keys)
            if found is None:
                return None
            _add(files, found)
        return files


def _add(files: dict[Path, list[str]], more: Mapping[Path, list[str]]) -> None:
    """Two shards of the same content share their local files."""
    for path, keys in more.items():
        files[path] = files.get(path, []) + keys


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
        return dict.fromkeys(tensor_names(folder / SINGLE_NAME), SINGLE_NAME)
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


def _open_hub_checkpoint(name: str, revision: str | None, cache_dir: str | None, token: str | None) -> Checkpoint:
    hub = open_hub_model(name, revision, cache_dir, token)
    hub.small_file("generation_config.json")
    index = hub.small_file(INDEX_NAME)
    weight_map = dict.fromkeys(hub.tensor_names(SINGLE_NAME), SINGLE_NAME) if index is None else _read_index(index)
    return Checkpoint(name=name, folder=hub.snapshot, weight_map=weight_map, hub=hub)
