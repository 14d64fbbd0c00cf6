"""Known peers on disk: whom to ask when trackers and the local network say nothing.

One file for each model, of signed records that are verified when read. It says where peers were, never that they live:
whoever is found here is asked (`discovery.exchange`), and no record is handed on from it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

import msgspec

from remote_modules.discovery.addresses import usable_addresses
from remote_modules.errors import RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord

__all__ = ["MAX_CACHED", "PeerCache"]

logger = logging.getLogger(__name__)

MAX_CACHED = 64  # peers of one model: 150 KB, and 10 ms to verify
MAX_MODELS = 16  # files looked through when no model is named
MAX_FILE_BYTES = 4 * 1024 * 1024
FORMAT = 1

_PLAIN_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}\Z")


class _Entry(msgspec.Struct, frozen=True):
    """``via``: the IP address that told of it, by which its addresses are judged; empty for the peer itself."""

    signed: SignedRecord
    via: str = ""


class _File(msgspec.Struct):
    format: int
    peers: list[_Entry]  # heard of latest first


_decoder = msgspec.json.Decoder(_File)


class PeerCache:
    """The files in ``folder``, which need not exist. Nothing here raises: a cache that fails is logged, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, dict[str, tuple[_Entry, tuple[str, ...]]]] = {}  # key, peer id; latest last
        self._unsaved: set[str] = set()
        self._has_warned = False

    def note(self, signed: SignedRecord, record: PeerRecord, via: str) -> None:
        """Remember a verified record."""
        peers = self._peers(record.model_key)
        known = peers.pop(record.peer_id, None)
        addresses = _addresses(record, via)
        peers[record.peer_id] = (_Entry(signed, via), addresses)
        if known is None or known[1] != addresses:
            self._unsaved.add(record.model_key)
        if len(peers) > MAX_CACHED:
            del peers[next(iter(peers))]

    def forget(self, record: PeerRecord) -> None:
        """Drop a peer that is gone for good."""
        if self._peers(record.model_key).pop(record.peer_id, None) is not None:
            self._unsaved.add(record.model_key)

    def addresses(self, model_key: str | None) -> list[tuple[str, ...]]:
        """Where the peers of a model were, those heard of latest first."""
        if model_key is not None:
            return [addresses for _, addresses in reversed(self._peers(model_key).values())]
        paths = sorted(self._folder.glob("*.json"))[:MAX_MODELS] if self._folder.is_dir() else []
        found = [addresses for path in paths for _, addresses in reversed(self._read(path).values())]
        return list(dict.fromkeys(found))

    def save(self) -> None:
        """Write what changed since the last time."""
        unsaved, self._unsaved = self._unsaved, set()
        for model_key in unsaved:
            entries = [entry for entry, _ in reversed(self._models[model_key].values())]
            try:
                self._write(self._path(model_key), msgspec.json.encode(_File(FORMAT, entries)))
            except OSError as exc:
                self._warn(f"known peers are not kept in {self._folder}: {exc.strerror or exc}")

    def _peers(self, model_key: str) -> dict[str, tuple[_Entry, tuple[str, ...]]]:
        peers = self._models.get(model_key)
        if peers is None:
            peers = self._models[model_key] = self._read(self._path(model_key))
        return peers

    def _path(self, model_key: str) -> Path:
        is_plain = _PLAIN_KEY.match(model_key) is not None
        return self._folder / f"{model_key if is_plain else hashlib.sha256(model_key.encode()).hexdigest()}.json"

    def _read(self, path: Path) -> dict[str, tuple[_Entry, tuple[str, ...]]]:
        try:
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
            found = _decoder.decode(text)
            if found.format != FORMAT:
                raise ValueError(f"format {found.format} instead of {FORMAT}")
            records = [verify_record(entry.signed) for entry in found.peers[:MAX_CACHED]]
        except FileNotFoundError:
            return {}
        except (msgspec.DecodeError, RemoteProtocolError, OSError, ValueError) as exc:
            self._warn(f"file of known peers {path} is ignored and will be written anew: {exc}")
            return {}
        pairs = list(zip(records, found.peers, strict=False))
        return {record.peer_id: (entry, _addresses(record, entry.via)) for record, entry in reversed(pairs)}

    def _write(self, path: Path, text: bytes) -> None:
        """Whole or not at all, for whoever reads at the same time or after a crash."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=".peers-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _warn(self, text: str) -> None:
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "%s", text)


def _addresses(record: PeerRecord, via: str) -> tuple[str, ...]:
    return usable_addresses(record.addresses, via) if via else record.addresses
