from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.fake_hub import COMMIT, HUB_NAME, Answer, FakeHub, serving
from remote_modules.errors import CheckpointError
from remote_modules.model.partial import PartialFiles, sha256_of, write_atomically
from remote_modules.model.ranges import HTTP_ERROR, RemoteFile, find_remote
from remote_modules.model.shard_header import ShardHeader

NAME = "x.safetensors"
TENSORS = {f"t{number}": torch.randn(100, 10) for number in range(6)}
TENSOR_BYTES = 4000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "source").mkdir()
    save_file(TENSORS, tmp_path / "source" / NAME, metadata={"format": "pt"})
    with serving(tmp_path / "source", monkeypatch) as hub:
        yield hub


@pytest.fixture
def remote(hub: FakeHub) -> RemoteFile:
    found = find_remote(f"{hub.url}/{HUB_NAME}/resolve/{COMMIT}/{NAME}", None)
    assert found is not None
    return found


@pytest.fixture
def parts(tmp_path: Path) -> PartialFiles:
    parts = PartialFiles(tmp_path / "parts")
    with parts.locked():
        pass
    return parts


@pytest.fixture
def header(hub: FakeHub, parts: PartialFiles, remote: RemoteFile) -> ShardHeader:
    found = parts.fetch_header(remote)
    hub.answers.clear()
    return found


def fetch(parts: PartialFiles, remote: RemoteFile, header: ShardHeader, keys: list[str]) -> Path:
    return parts.fetch(remote, header.part(keys), "x")


def check_equal(path: Path, keys: list[str]) -> None:
    loaded = load_file(path)
    assert sorted(loaded) == keys
    assert all(torch.equal(loaded[key], TENSORS[key]) for key in keys)


def incomplete_files(folder: Path) -> list[Path]:
    return list((folder / "parts").glob("*.incomplete"))


def test_header_is_fetched_exactly_and_kept(
    hub: FakeHub, parts: PartialFiles, remote: RemoteFile, tmp_path: Path
) -> None:
    assert parts.header(remote.size) is None
    header = parts.fetch_header(remote)
    assert hub.sent_bytes() == remote.size - 6 * TENSOR_BYTES
    assert PartialFiles(tmp_path / "parts").header(remote.size) == header


def test_damaged_header_is_removed(
    parts: PartialFiles, remote: RemoteFile, header: ShardHeader, tmp_path: Path
) -> None:
    (path,) = (tmp_path / "parts").glob("*.header")
    path.write_bytes(path.read_bytes().replace(b"F32", b"I32"))
    assert PartialFiles(tmp_path / "parts").header(remote.size) is None
    assert not path.exists()


def test_part_has_the_tensors_and_only_their_bytes_are_sent(
    hub: FakeHub, parts: PartialFiles, remote: RemoteFile, header: ShardHeader
) -> None:
    path = fetch(parts, remote, header, ["t1", "t2", "t5"])
    check_equal(path, ["t1", "t2", "t5"])
    assert len(hub.ranges) == 2  # t1 and t2 are neighbours
    assert hub.sent_bytes() == 3 * TENSOR_BYTES
    assert path.stem == sha256_of(path)


def test_find_names_each_tensor_once(parts: PartialFiles, remote: RemoteFile, header: ShardHeader) -> None:
    paths = [fetch(parts, remote, header, keys) for keys in (["t1", "t2"], ["t2", "t3"])]
    found = parts.find(["t1", "t2", "t3", "t4"], is_verified=True)
    assert sorted(key for keys in found.values() for key in keys) == ["t1", "t2", "t3"]
    assert set(found) == set(paths)
    assert parts.find(["t4"], is_verified=True) == {}
    assert parts.find(["t1"], is_verified=True) == {paths[0]: ["t1"]}


@pytest.mark.parametrize("cut", [0, 1, 3999, 4000, 4001, 7000])
def test_interrupted_fetch_goes_on_at_the_byte_where_it_stopped(
    hub: FakeHub, parts: PartialFiles, remote: RemoteFile, header: ShardHeader, cut: int, tmp_path: Path
) -> None:
    """Two ranges, t1 and t4:t5; the connection dies for good after ``cut`` bytes of data."""

    def drop(answer: Answer) -> None:
        answer.cut = max(cut - hub.sent_bytes(), 0)

    hub.tamper = drop
    with pytest.raises(HTTP_ERROR):
        fetch(parts, remote, header, ["t1", "t4", "t5"])
    assert parts.find(["t1"], is_verified=True) == {}
    assert len(incomplete_files(tmp_path)) == 1
    assert hub.sent_bytes() == cut
    hub.answers.clear()
    hub.tamper = lambda answer: None
    path = fetch(PartialFiles(tmp_path / "parts"), remote, header, ["t1", "t4", "t5"])
    check_equal(path, ["t1", "t4", "t5"])
    assert hub.sent_bytes() == 3 * TENSOR_BYTES - cut
    begin = header.tensors["t1"].start + cut if cut < TENSOR_BYTES else header.tensors["t4"].start + cut - TENSOR_BYTES
    assert hub.ranges[0][0] == begin
    assert incomplete_files(tmp_path) == []


@pytest.mark.parametrize("data", [b"", b"x" * 50, b"x" * 100_000])
def test_begun_file_of_something_else_is_begun_again(
    parts: PartialFiles, remote: RemoteFile, header: ShardHeader, data: bytes, tmp_path: Path
) -> None:
    layout = header.part(["t3"])
    (tmp_path / "parts" / f"{layout.name}.incomplete").write_bytes(data)
    check_equal(parts.fetch(remote, layout, "x"), ["t3"])


def test_damaged_part_is_removed_and_not_found(
    parts: PartialFiles, remote: RemoteFile, header: ShardHeader, tmp_path: Path
) -> None:
    path = fetch(parts, remote, header, ["t1"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert PartialFiles(tmp_path / "parts").find(["t1"], is_verified=False) == {path: ["t1"]}
    assert PartialFiles(tmp_path / "parts").find(["t1"], is_verified=True) == {}
    assert not path.exists()


@pytest.mark.parametrize("data", [b"", b"x" * 100])
def test_part_cut_short_is_removed_and_not_found(
    parts: PartialFiles, remote: RemoteFile, header: ShardHeader, data: bytes, tmp_path: Path
) -> None:
    path = fetch(parts, remote, header, ["t1"])
    path.write_bytes(data)
    assert PartialFiles(tmp_path / "parts").find(["t1"], is_verified=False) == {}
    assert not path.exists()


def test_full_disk_is_told_before_anything_is_fetched(
    hub: FakeHub,
    parts: PartialFiles,
    remote: RemoteFile,
    header: ShardHeader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("remote_modules.model.partial.shutil.disk_usage", lambda path: SimpleNamespace(free=3999))
    with pytest.raises(CheckpointError, match=r"^4000 bytes are to be fetched into .*parts, 3999 are free$"):
        fetch(parts, remote, header, ["t1"])
    assert hub.answers == []


def test_disk_that_fills_up_on_the_way_leaves_nothing_usable_and_goes_on_later(
    hub: FakeHub, parts: PartialFiles, remote: RemoteFile, header: ShardHeader, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            fetch(parts, remote, header, ["t1", "t4"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert parts.find(["t1"], is_verified=True) == {}
    (begun,) = incomplete_files(tmp_path)
    assert begun.stat().st_size == 6000
    hub.answers.clear()
    check_equal(fetch(parts, remote, header, ["t1", "t4"]), ["t1", "t4"])
    assert hub.sent_bytes() == len(header.part(["t1", "t4"]).header) + 8000 - 6000


def test_what_is_no_safetensors_file_in_the_end_is_removed(
    parts: PartialFiles, remote: RemoteFile, header: ShardHeader, tmp_path: Path
) -> None:
    layout = header.part(["t1"])
    broken = type(layout)(layout.header.replace(b"F32", b"F99"), layout.ranges)
    with pytest.raises(CheckpointError, match=r"^not a safetensors file: what came was removed: ") as caught:
        parts.fetch(remote, broken, "x")
    assert "\n" not in str(caught.value)
    assert incomplete_files(tmp_path) == []
    assert parts.find(["t1"], is_verified=True) == {}


def test_what_was_begun_can_be_dropped(parts: PartialFiles, tmp_path: Path) -> None:
    (tmp_path / "parts" / "x.incomplete").write_bytes(b"x")
    parts.drop_incomplete()
    assert incomplete_files(tmp_path) == []


def test_lock_is_held_by_one_at_a_time(parts: PartialFiles, tmp_path: Path) -> None:
    got_it = threading.Event()

    def other() -> None:
        with PartialFiles(tmp_path / "parts").locked():
            got_it.set()

    with parts.locked():
        thread = threading.Thread(target=other)
        thread.start()
        assert not got_it.wait(0.3)
    assert got_it.wait(10)
    thread.join()


def test_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    write_atomically(path, b"1")
    write_atomically(path, b"2")
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]
