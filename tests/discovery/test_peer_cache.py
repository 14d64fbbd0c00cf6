from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import pytest
from discovery_support import forge, make_signed
from records import make_identity, make_record

from remote_modules.config import ClientConfig, default_peer_cache
from remote_modules.discovery.peer_cache import MAX_CACHED, PeerCache
from remote_modules.identity import Identity

ALICE, BOB = make_identity(1), make_identity(2)


def note(cache: PeerCache, identity: Identity, *, via: str = "", **changes: object) -> None:
    cache.note(make_signed(identity, **changes), make_record(identity, **changes), via)


def filled(folder: Path) -> Path:
    """A file with two peers in it."""
    cache = PeerCache(folder)
    note(cache, ALICE, addresses=("127.0.0.1:1",))
    note(cache, BOB, addresses=("127.0.0.1:2", "127.0.0.1:3"))
    cache.save()
    return folder / "tiny-key.json"


def test_what_was_noted_is_found_by_the_next_process_latest_first(tmp_path: Path) -> None:
    assert filled(tmp_path / "new" / "folder").exists()
    assert PeerCache(tmp_path / "new" / "folder").addresses("tiny-key") == [
        ("127.0.0.1:2", "127.0.0.1:3"),
        ("127.0.0.1:1",),
    ]


def test_models_are_told_apart_and_all_are_found_without_a_key(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path)
    note(cache, ALICE, model_key="one", addresses=("127.0.0.1:1",))
    note(cache, BOB, model_key="../../two", addresses=("127.0.0.1:2",))
    cache.save()
    again = PeerCache(tmp_path)
    assert again.addresses("one") == [("127.0.0.1:1",)]
    assert again.addresses("../../two") == [("127.0.0.1:2",)]
    assert again.addresses("three") == []
    assert sorted(again.addresses(None)) == [("127.0.0.1:1",), ("127.0.0.1:2",)]
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_written_before_it_is_saved_nor_without_need(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.unlink()
    cache = PeerCache(tmp_path)
    cache.save()
    note(cache, ALICE)
    assert list(tmp_path.iterdir()) == []
    cache.save()
    path.unlink()
    note(cache, ALICE, sequence=2)  # the same addresses
    cache.save()
    assert list(tmp_path.iterdir()) == []


def test_forgotten_peer_is_gone_from_the_file(tmp_path: Path) -> None:
    filled(tmp_path)
    cache = PeerCache(tmp_path)
    cache.forget(make_record(ALICE))
    cache.forget(make_record(ALICE))
    cache.save()
    assert PeerCache(tmp_path).addresses("tiny-key") == [("127.0.0.1:2", "127.0.0.1:3")]


def test_file_is_capped_and_drops_whom_it_heard_of_least_recently(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path)
    for number in range(MAX_CACHED + 2):
        note(cache, make_identity(number + 1), addresses=(f"127.0.0.1:{number + 1}",))
    note(cache, make_identity(3), addresses=("127.0.0.1:3",))
    cache.save()
    found = PeerCache(tmp_path).addresses("tiny-key")
    assert found[0] == ("127.0.0.1:3",)
    assert len(found) == MAX_CACHED
    assert ("127.0.0.1:1",) not in found
    assert ("127.0.0.1:2",) not in found


def test_private_address_that_a_public_teller_named_is_not_dialled(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path)
    note(cache, ALICE, via="1.2.3.4", addresses=("192.168.0.9:31330", "8.8.8.8:31330"))
    cache.save()
    assert PeerCache(tmp_path).addresses("tiny-key") == [("8.8.8.8:31330",)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\x00" * len(text),
        lambda text: b'{"format":99,"peers":[]}',
        lambda text: b"[" * 100_000,
        lambda text: msgspec.json.encode(
            {"format": 1, "peers": [[forge(make_signed(BOB), make_record(BOB, end=8)), ""]]}
        ),
    ],
    ids=["empty", "cut", "zeros", "format", "nested", "forged"],
)
def test_damaged_file_is_one_warning_and_is_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    path = filled(tmp_path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    cache = PeerCache(tmp_path)
    assert cache.addresses("tiny-key") == []
    assert cache.addresses(None) == []
    (warning,) = [entry.message for entry in caplog.records if entry.levelno == logging.WARNING]
    assert warning.startswith(f"file of known peers {path} is ignored and will be written anew: ")
    assert warning.isprintable()
    note(cache, ALICE, addresses=("127.0.0.1:1",))
    cache.save()
    assert PeerCache(tmp_path).addresses("tiny-key") == [("127.0.0.1:1",)]


def test_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = PeerCache(tmp_path / "file")
    for sequence in (1, 2):
        note(cache, ALICE, addresses=(f"127.0.0.1:{sequence}",))
        cache.save()
    (warning,) = [entry.message for entry in caplog.records if entry.levelno == logging.WARNING]
    assert str(tmp_path / "file") in warning


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path)
    before = path.read_bytes()

    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    cache = PeerCache(tmp_path)
    note(cache, ALICE, addresses=("127.0.0.1:9",))
    cache.save()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"REMOTE_MODULES_PEER_CACHE": "off"}, None),
        ({"REMOTE_MODULES_PEER_CACHE": "/somewhere", "XDG_CACHE_HOME": "/xdg"}, Path("/somewhere")),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/remote-modules/peers")),
        ({"XDG_CACHE_HOME": "relative"}, Path("/home/me/.cache/remote-modules/peers")),
        ({}, Path("/home/me/.cache/remote-modules/peers")),
    ],
)
def test_default_folder_is_where_caches_are(
    environment: dict[str, str], folder: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REMOTE_MODULES_PEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert default_peer_cache() == folder
    assert ClientConfig().peer_cache == folder
