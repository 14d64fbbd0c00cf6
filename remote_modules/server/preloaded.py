"""Adapters that a peer offers: read from files when it starts, and known by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from remote_modules.model.adapter_files import AdapterFiles, FrozenAdapter, open_adapter
from remote_modules.peers import ADAPTER_NAME, MAX_ADAPTERS

__all__ = ["Preloaded", "split_source"]


def split_source(text: str) -> tuple[str, str]:
    """Name and source of ``SOURCE`` or ``NAME=SOURCE``; a folder without a name has that of its last part.

    Raises:
        ValueError: no name can be made of it.
    """
    name, is_named, source = text.partition("=")
    if not is_named:
        source = text
        is_folder = Path(text).expanduser().is_dir() or text.startswith((".", "/", "~"))
        name = Path(text).expanduser().resolve().name if is_folder else text
    if not re.fullmatch(ADAPTER_NAME, name) or not source:
        raise ValueError(f"adapter must be a folder, a hub id or NAME=SOURCE with a plain name, got {text!r}")
    return name, source


class Preloaded:
    """The adapters of one peer, for whatever blocks it holds.

    Raises:
        ValueError: two of the same name, or too many.
        CheckpointError: one cannot be read.
    """

    def __init__(
        self, sources: Sequence[str], list_path: str, *, cache_dir: str | None = None, token: str | None = None
    ) -> None:
        self._files: dict[str, AdapterFiles] = {}
        if len(sources) > MAX_ADAPTERS:
            raise ValueError(f"a peer offers at most {MAX_ADAPTERS} adapters, got {len(sources)}")
        for name, source in map(split_source, sources):
            if name in self._files:
                raise ValueError(f"two adapters have the name '{name}'; write NAME=SOURCE to give another one")
            self._files[name] = open_adapter(source, list_path, cache_dir=cache_dir, token=token)

    def of_blocks(self, blocks: Mapping[int, nn.Module]) -> dict[str, FrozenAdapter]:
        """What each adapter has for ``blocks``, by the name that is announced, ``name@digest``.

        Raises:
            CheckpointError, UnsupportedCallError: one does not fit.
        """
        return {f"{name}@{files.digest}": files.of_blocks(blocks) for name, files in self._files.items()}
