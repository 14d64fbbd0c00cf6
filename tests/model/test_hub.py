"""What is fetched of a model on the hub, and what comes of it when the hub, the network or the disk fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from tiny_models import NUM_BLOCKS, load_whole, save_tiny
from transformers import PreTrainedModel

from model.fake_hub import COMMIT, HUB_NAME, Answer, FakeHub, serving
from remote_modules.errors import CheckpointError
from remote_modules.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from remote_modules.model.classes import model_class
from remote_modules.model.fingerprint import block_digests
from remote_modules.model.hub import fetch_files
from remote_modules.model.loading import load_client_part, load_span, read_config
from remote_modules.model.partial import sha256_of
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span

STACK = StackSpec(path="model.layers", num_blocks=NUM_BLOCKS)
ALL = range(NUM_BLOCKS)


@pytest.fixture(scope="module")
def single_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of four blocks; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("single"), shard_size="1GB")


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of more than a block each; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("sharded"), shard_size="60KB")


@pytest.fixture
def hub(single_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(single_folder, monkeypatch) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(cache: Path) -> Checkpoint:
    return open_checkpoint(HUB_NAME, cache_dir=str(cache))


def span_of(checkpoint: Checkpoint, span: str) -> PreTrainedModel:
    cls, config = model_class(read_config(checkpoint))
    model, _ = load_span(checkpoint, config, cls, Span.parse(span))
    return model


def client_of(checkpoint: Checkpoint) -> PreTrainedModel:
    cls, config = model_class(read_config(checkpoint))
    model, _ = load_client_part(checkpoint, config, cls)
    return model


def check_equal(model: PreTrainedModel, folder: Path) -> None:
    whole = load_whole(folder).state_dict()
    weights = model.state_dict()
    assert weights
    for name, tensor in weights.items():
        assert tensor.dtype == whole[name].dtype
        assert torch.equal(tensor, whole[name]), name


def bytes_of(folder: Path, span: str) -> int:
    """Bytes of the tensors of these blocks."""
    blocks = Span.parse(span)
    weights = load_whole(folder).state_dict()
    where = STACK.blocks_of_keys(weights)
    return sum(tensor.nbytes for name, tensor in weights.items() if where.get(name) in blocks)


def shards_of(checkpoint: Checkpoint, block: int) -> dict[str, list[str]]:
    where = STACK.blocks_of_keys(checkpoint.weight_map)
    return checkpoint.shards(lambda key: where.get(key) == block)


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def check_fails(cache: Path, match: str, span: str = "1:2") -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        span_of(opened(cache), span)
    assert "\n" not in str(caught.value)


def finished_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("remote-modules/files/*/*.safetensors"))


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    huggingface_hub.close_session()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "create_connection", no_socket)


# What is fetched


@pytest.mark.parametrize("span", ["0:1", "1:3", "3:4"])
def test_single_file_moves_only_header_and_wanted_tensors(
    hub: FakeHub, single_folder: Path, cache: Path, span: str
) -> None:
    check_equal(span_of(opened(cache), span), single_folder)
    assert hub.sent_bytes() == header_bytes(single_folder / SINGLE_NAME) + bytes_of(single_folder, span)
    assert not list(cache.rglob(f"snapshots/*/{SINGLE_NAME}"))


def test_opening_moves_only_the_header(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    checkpoint = opened(cache)
    assert hub.sent_bytes() == header_bytes(single_folder / SINGLE_NAME)
    assert set(checkpoint.weight_map) == set(load_whole(single_folder).state_dict())
    opened(cache)
    assert hub.sent_bytes() == header_bytes(single_folder / SINGLE_NAME)


def test_client_part_of_a_single_file_is_fetched_alone(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    check_equal(client_of(opened(cache)), single_folder)
    expected = (single_folder / SINGLE_NAME).stat().st_size - bytes_of(single_folder, "0:4")
    assert hub.sent_bytes() == expected


def test_second_load_asks_for_no_weights(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    hub.answers.clear()
    check_equal(span_of(opened(cache), "1:2"), single_folder)
    assert not [answer for answer in hub.answers if answer.name.endswith(".safetensors")]


def test_span_that_grows_fetches_only_what_is_new(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    hub.answers.clear()
    check_equal(span_of(opened(cache), "0:3"), single_folder)
    assert hub.sent_bytes() == bytes_of(single_folder, "0:1") + bytes_of(single_folder, "2:3")
    hub.answers.clear()
    check_equal(span_of(opened(cache), "0:2"), single_folder)
    assert hub.sent_bytes() == 0


def test_only_a_part_of_a_shard_is_fetched(sharded_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_checkpoint(str(sharded_folder))
    shards = shards_of(local, 2)
    assert len(shards) < len(set(local.weight_map.values()))
    with serving(sharded_folder, monkeypatch) as hub:
        check_equal(span_of(opened(cache), "2:3"), sharded_folder)
    headers = sum(header_bytes(sharded_folder / name) for name in shards)
    assert hub.sent_bytes() == headers + bytes_of(sharded_folder, "2:3")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_other_families_are_equal_too(
    family: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "source", family, shard_size="1GB", dtype="bfloat16")
    with serving(folder, monkeypatch) as hub:
        check_equal(span_of(opened(cache), "1:2"), folder)
        check_equal(client_of(opened(cache)), folder)
    assert hub.sent_bytes() < 0.8 * (folder / SINGLE_NAME).stat().st_size


def test_most_of_a_shard_is_fetched_as_a_whole(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    assert bytes_of(single_folder, "0:4") > 0.8 * (single_folder / SINGLE_NAME).stat().st_size
    check_equal(span_of(opened(cache), "0:4"), single_folder)
    assert finished_files(cache) == []
    (whole,) = cache.rglob(f"snapshots/*/{SINGLE_NAME}")
    assert whole.read_bytes() == (single_folder / SINGLE_NAME).read_bytes()


def test_whole_shard_in_the_cache_is_used(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    huggingface_hub.hf_hub_download(HUB_NAME, SINGLE_NAME, cache_dir=str(cache))
    hub.answers.clear()
    check_equal(span_of(opened(cache), "1:2"), single_folder)
    assert hub.sent_bytes() == 0
    assert not list(cache.rglob("remote-modules/*"))


def test_parts_are_removed_with_the_model_from_the_cache(hub: FakeHub, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    info = huggingface_hub.scan_cache_dir(cache)
    assert not info.warnings
    info.delete_revisions(COMMIT).execute()
    assert finished_files(cache) == []


def test_later_commit_with_the_same_file_shares_its_parts(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    hub.answers.clear()
    hub.commit = "b" * 40
    checkpoint = opened(cache)
    assert checkpoint.folder.name == "b" * 40
    check_equal(span_of(checkpoint, "1:2"), single_folder)
    assert hub.sent_bytes() == 0


def test_later_commit_with_another_file_is_not_mixed_in(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    span_of(opened(cache), "1:2")
    other = save_tiny(tmp_path / "other", seed=1, shard_size="1GB")
    hub.folder, hub.commit = other, "b" * 40
    check_equal(span_of(opened(cache), "1:2"), other)


def test_file_that_changes_under_way_is_refused(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    checkpoint = opened(cache)
    hub.folder = save_tiny(tmp_path / "other", seed=1, shard_size="1GB")
    with pytest.raises(CheckpointError, match=rf"^cannot use '{SINGLE_NAME}' of '{HUB_NAME}': the file changed while "):
        span_of(checkpoint, "1:2")
    assert finished_files(cache) == []


# Servers without ranges, and interruptions


def test_server_without_ranges_gives_the_whole(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    hub.has_ranges = False
    checkpoint = opened(cache)
    check_equal(span_of(checkpoint, "1:2"), single_folder)
    assert finished_files(cache) == []
    assert list(cache.rglob(f"snapshots/*/{SINGLE_NAME}"))


def test_server_that_stops_serving_ranges_gives_the_whole(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    checkpoint = opened(cache)

    def drop_then_none(answer: Answer) -> None:
        if answer.range is not None:
            if hub.ranges[2:]:
                answer.status, answer.body = 416, b""
            answer.cut = 100

    hub.tamper = drop_then_none
    check_equal(span_of(checkpoint, "1:2"), single_folder)
    assert finished_files(cache) == []
    assert not list(cache.rglob("*.incomplete"))


def test_interrupted_load_goes_on_where_it_stopped(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    checkpoint = opened(cache)
    begun = hub.sent_bytes()

    def drop(answer: Answer) -> None:
        answer.cut = max(5000 - (hub.sent_bytes() - begun), 0)

    hub.tamper = drop
    with pytest.raises(CheckpointError, match=rf"^cannot get '{SINGLE_NAME}' of '{HUB_NAME}' from the hub: ") as caught:
        span_of(checkpoint, "1:2")
    assert "\n" not in str(caught.value)
    assert finished_files(cache) == []
    assert block_digests(checkpoint, STACK, [1]) == {}
    hub.tamper = lambda answer: None
    check_equal(span_of(opened(cache), "1:2"), single_folder)
    assert hub.sent_bytes() == begun + bytes_of(single_folder, "1:2")


def test_connection_drops_once_and_the_load_goes_on(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    checkpoint = opened(cache)

    def drop(answer: Answer) -> None:
        answer.cut = 3000 if len(hub.ranges) == 2 else None

    hub.tamper = drop
    check_equal(span_of(checkpoint, "1:2"), single_folder)
    assert hub.ranges[3][0] == hub.ranges[2][0] + 3000
    assert hub.sent_bytes() == header_bytes(single_folder / SINGLE_NAME) + bytes_of(single_folder, "1:2")


FETCH_BLOCK_1 = (
    "import sys; from remote_modules.model.checkpoint import open_checkpoint\n"
    "part = open_checkpoint(sys.argv[1]).part(lambda key: '.layers.1.' in key)\n"
    "print(sum(map(len, part.values())), *part)"
)


def test_two_processes_fetch_the_same_part_once(hub: FakeHub, single_folder: Path, tmp_path: Path) -> None:
    """The tensors are sent only when both have begun."""
    both_are_here = threading.Event()
    begun: list[Answer] = []
    begin = header_bytes(single_folder / SINGLE_NAME)

    def wait(answer: Answer) -> None:
        if (answer.method, answer.name) == ("HEAD", "config.json"):  # the first that a process asks
            begun.append(answer)
            if len(begun) == 2:
                both_are_here.set()
        if answer.range is not None and answer.range[0] >= begin:
            both_are_here.wait(60)

    hub.tamper = wait
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", FETCH_BLOCK_1, HUB_NAME]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=100)[0] for process in processes}
    (path,) = finished_files(tmp_path)
    assert outputs == {f"9 {path}\n"}
    assert both_are_here.is_set()
    of_data = [end - start for start, end in hub.ranges if start >= begin]
    assert of_data == [bytes_of(single_folder, "1:2")]


# Integrity


def test_damaged_part_is_fetched_again(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    (path,) = finished_files(cache)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    hub.answers.clear()
    check_equal(span_of(opened(cache), "1:2"), single_folder)
    assert hub.sent_bytes() == bytes_of(single_folder, "1:2")


def damage(answer: Answer) -> None:
    if answer.name.endswith(".safetensors") and answer.body:
        answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])


def test_whole_shard_damaged_on_the_way_is_removed(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    hub.has_ranges = False
    hub.tamper = damage
    text = rf"^cannot use '{SINGLE_NAME}' of '{HUB_NAME}': it arrived damaged and was removed: sha256 [0-9a-f]{{64}}, "
    check_fails(cache, text)
    assert not list(cache.rglob(f"snapshots/*/{SINGLE_NAME}"))
    hub.tamper = lambda answer: None
    check_equal(span_of(opened(cache), "1:2"), single_folder)


def test_whole_shard_is_checked_once(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.has_ranges = False
    checked: list[str] = []

    def counting(path: Path) -> str:
        checked.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("remote_modules.model.hub.sha256_of", counting)
    for _ in range(2):
        span_of(opened(cache), "1:2")
    assert checked == [SINGLE_NAME]


def test_whole_shard_whose_check_was_interrupted_is_checked_later(hub: FakeHub, cache: Path) -> None:
    hub.has_ranges = False
    checkpoint = opened(cache)
    (path,) = cache.rglob(f"snapshots/*/{SINGLE_NAME}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    mark = path.parents[2] / "remote-modules" / "refs" / COMMIT / f"{SINGLE_NAME}.unchecked"
    mark.touch()
    with pytest.raises(CheckpointError, match="it arrived damaged and was removed"):
        span_of(checkpoint, "1:2")


def test_unreadable_record_is_made_again(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    for record in cache.rglob("remote-modules/refs/*/*.json"):
        record.write_text("{", "utf-8")
    check_equal(span_of(opened(cache), "1:2"), single_folder)


# Offline


def test_offline_parts_load_without_a_socket(
    hub: FakeHub, single_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span_of(opened(cache), "1:3")
    go_offline(monkeypatch)
    checkpoint = opened(cache)
    check_equal(span_of(checkpoint, "1:3"), single_folder)
    check_equal(span_of(checkpoint, "2:3"), single_folder)
    check_fails(
        cache, rf"^'{SINGLE_NAME}' of '{HUB_NAME}' is not in the hub cache, and the hub cannot be asked: ", "0:3"
    )


def test_offline_parts_of_shards_load_from_a_cache_that_cannot_be_written(
    sharded_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(sharded_folder, monkeypatch):
        span_of(opened(cache), "2:3")
    before = sorted((path, path.lstat().st_mtime_ns) for path in cache.rglob("*"))
    with monkeypatch.context() as patch:
        go_offline(patch)
        check_equal(span_of(opened(cache), "2:3"), sharded_folder)
        with pytest.raises(CheckpointError, match="is not in the hub cache, and the hub cannot be asked: "):
            span_of(opened(cache), "0:1")
    assert sorted((path, path.lstat().st_mtime_ns) for path in cache.rglob("*")) == before


def test_hub_that_is_gone_is_not_needed_for_what_is_here(
    single_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(single_folder, monkeypatch):
        span_of(opened(cache), "1:2")
    check_equal(span_of(opened(cache), "1:2"), single_folder)
    with pytest.raises(CheckpointError, match=r"^cannot get 'model.safetensors' of '.*' from the hub: ") as caught:
        span_of(opened(cache), "0:1")
    assert "\n" not in str(caught.value)
    huggingface_hub.close_session()


def test_conventions_of_the_environment_hold(hub: FakeHub, single_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    for offline in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run(
            [sys.executable, "-c", FETCH_BLOCK_1, HUB_NAME],
            env=environment | offline,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        count, path = done.stdout.split()
        assert count == "9"
        assert Path(path).is_relative_to(tmp_path / "hub" / "models--someone--tiny-llama" / "remote-modules")
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert hub.sent_bytes() == header_bytes(single_folder / SINGLE_NAME) + bytes_of(single_folder, "1:2")


# Refusals and hostile files


@pytest.mark.parametrize(
    ("status", "headers", "match"),
    [
        (401, {}, rf"^cannot get '{SINGLE_NAME}' of .* from the hub: .*401.*; pass a token that may read it$"),
        (403, {}, rf"^cannot get '{SINGLE_NAME}' of .* from the hub: .*403.*; pass a token that may read it$"),
        (403, {"X-Error-Code": "GatedRepo"}, r"^'.*' is gated: ask for access on the hub, then pass a token that has"),
        (404, {"X-Error-Code": "EntryNotFound"}, rf"^'.*' has no '{SINGLE_NAME}' on the hub; only safetensors "),
        (404, {"X-Error-Code": "RepoNotFound"}, r"^'.*' is neither a local folder nor a model on the hub: "),
        (503, {}, rf"^cannot get '{SINGLE_NAME}' of .* from the hub: .*503"),
    ],
)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_refusal_is_told_in_one_line(
    hub: FakeHub, cache: Path, status: int, headers: dict[str, str], match: str, method: str
) -> None:
    def refuse(answer: Answer) -> None:
        if answer.name == SINGLE_NAME and answer.method == method:
            answer.status, answer.body = status, b""
            answer.headers.update(headers)

    hub.tamper = refuse
    check_fails(cache, match)
    assert finished_files(cache) == []


def put_header(folder: Path, entries: dict[str, Any], length: int | None = None) -> None:
    """Replace the header of the single file, of which the tensors' bytes stay."""
    path = folder / SINGLE_NAME
    text = json.dumps(entries).encode()
    data = path.read_bytes()[header_bytes(path) :]
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_hostile_header_is_refused_in_one_line(hub: FakeHub, single_folder: Path, cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single_folder, tmp_path / "copy"))
    hub.folder = copy
    path = single_folder / SINGLE_NAME
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    first, second = [key for key in entries if key != "__metadata__"][:2]
    overlapping = json.loads(json.dumps(entries))
    overlapping[second]["data_offsets"][0] -= 4
    outside = json.loads(json.dumps(entries))
    outside[first]["data_offsets"][1] = 2**40
    for number, (bad, length) in enumerate([(overlapping, None), (outside, None), (entries, 2**60), (entries, 10)]):
        put_header(copy, bad, length)
        check_fails(cache / str(number), rf"^cannot use '{SINGLE_NAME}' of '{HUB_NAME}': not a safetensors file: ")
        shutil.copyfile(path, copy / SINGLE_NAME)
        assert finished_files(cache) == []
        assert not list(cache.rglob("*.header"))


def test_file_shorter_than_its_header_is_refused(
    hub: FakeHub, single_folder: Path, cache: Path, tmp_path: Path
) -> None:
    hub.folder = Path(shutil.copytree(single_folder, tmp_path / "copy"))
    (hub.folder / SINGLE_NAME).write_bytes((single_folder / SINGLE_NAME).read_bytes()[:100])
    check_fails(cache, rf"^cannot use '{SINGLE_NAME}' of '{HUB_NAME}': not a safetensors file: a header of ")


def test_tensor_that_the_shard_lacks_is_named(
    sharded_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(sharded_folder, tmp_path / "copy"))
    index = json.loads((copy / INDEX_NAME).read_text("utf-8"))
    index["weight_map"]["model.layers.2.more"] = index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    (copy / INDEX_NAME).write_text(json.dumps(index), "utf-8")
    with serving(copy, monkeypatch):
        check_fails(cache, r"it lacks tensor 'model.layers.2.more', which the index says it has$", "2:3")


# Digests


def test_digests_of_parts_equal_those_of_the_whole(hub: FakeHub, single_folder: Path, cache: Path) -> None:
    whole = block_digests(open_checkpoint(str(single_folder)), STACK, ALL)
    checkpoint = opened(cache)
    assert block_digests(checkpoint, STACK, ALL) == {}
    span_of(checkpoint, "1:2")
    span_of(checkpoint, "1:3")
    hub.answers.clear()
    assert block_digests(checkpoint, STACK, ALL) == {1: whole[1], 2: whole[2]}
    assert block_digests(opened(cache), STACK, [2]) == {2: whole[2]}
    assert hub.sent_bytes() == 0


def test_digest_of_a_block_in_parts_of_two_shards(
    sharded_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = open_checkpoint(str(sharded_folder))
    split = [block for block in ALL if len(shards_of(local, block)) > 1]
    assert split
    with serving(sharded_folder, monkeypatch):
        checkpoint = opened(cache)
        span_of(checkpoint, f"{split[0]}:{split[0] + 1}")
    expected = block_digests(local, STACK, split[:1])
    assert {
        block: digest for block, digest in block_digests(checkpoint, STACK, ALL).items() if block in split[:1]
    } == expected


def test_parts_are_plain_safetensors(hub: FakeHub, cache: Path) -> None:
    span_of(opened(cache), "1:2")
    (path,) = finished_files(cache)
    with safe_open(str(path), framework="pt") as file:
        where = STACK.blocks_of_keys(file.keys())
        assert {where.get(key) for key in file.keys()} == {1}
        assert file.metadata() == {"format": "pt"}


# -------------------------------------------------------------------------------- adapters


def test_files_of_an_adapter_are_fetched_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([number]) * 9)
    with serving(tmp_path, monkeypatch) as hub:
        folder = fetch_files(HUB_NAME, names, cache_dir=str(cache), token=None)
        assert [(folder / name).read_bytes() for name in names] == [b"\0" * 9, b"\1" * 9]
        hub.error = "EntryNotFound"
        with pytest.raises(CheckpointError, match="has no 'other' on the hub"):
            fetch_files(HUB_NAME, ("other",), cache_dir=str(cache), token=None)
