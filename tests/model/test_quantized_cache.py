from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

from model.support import opened
from remote_modules.model import quantized_cache
from remote_modules.model.checkpoint import Checkpoint
from remote_modules.model.hub import HubModel
from remote_modules.model.loading import load_span
from remote_modules.model.quantization import block_state
from remote_modules.model.quantized_cache import QuantizedCache, cache_root, model_digest
from remote_modules.spans import Span

BASE = torch.arange(24.0)
TENSORS = {
    "view": BASE[3:9].view(2, 3),
    "same memory": BASE,
    "transposed": torch.arange(6).view(2, 3).T,
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4, 2),
    "codes": torch.tensor([1, 255], dtype=torch.uint8),
}


def written(root: Path, key: str = "key", block: int = 1) -> Path:
    cache = QuantizedCache(key, root)
    cache.write(block, TENSORS, "digest")
    return cache.path(block)


def test_block_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert written(tmp_path) == tmp_path / "quantized" / "key" / "block-1.safetensors"
    cache = QuantizedCache("key", tmp_path)
    state = cache.read(1)
    assert state is not None
    assert state.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    assert cache.digests == {1: "digest"}
    assert [path.name for path in (tmp_path / "quantized" / "key").iterdir()] == ["block-1.safetensors"]


def test_block_that_was_never_written_is_none(tmp_path: Path) -> None:
    written(tmp_path)
    assert QuantizedCache("key", tmp_path).read(0) is None
    assert QuantizedCache("other", tmp_path).read(1) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def put_another_models(path: Path) -> None:
    written(path.parents[2], "other").replace(path)


def put_another_block(path: Path) -> None:
    written(path.parents[2], block=2).replace(path)


def make_a_folder_of_it(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip_one_bit, put_another_models, put_another_block, make_a_folder_of_it]
)
def test_damaged_or_foreign_block_is_not_used(damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path)
    damage(path)
    cache = QuantizedCache("key", tmp_path)
    assert cache.read(1) is None
    assert cache.digests == {}
    assert str(path) in caplog.text


@pytest.mark.parametrize("damage", [truncate, flip_one_bit])
def test_damaged_block_is_quantized_again(damage: Any, llama_folder: Path, tmp_path: Path) -> None:
    checkpoint, config, cls = opened(llama_folder)
    states = []
    for _ in range(2):
        cache = QuantizedCache("key", tmp_path)
        model, stack = load_span(checkpoint, config, cls, Span(1, 2), quantization="nf4", quantized_cache=cache)
        states.append(block_state(stack.blocks(model)[1]))
        del model
        size = cache.path(1).stat().st_size
        damage(cache.path(1))
    first, second = states
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert cache.path(1).stat().st_size in (size, size - 1)


def test_unwritable_folder_is_logged_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "quantized").write_text("a file where the folder should be")
    cache = QuantizedCache("key", tmp_path)
    cache.write(1, TENSORS, "digest")
    assert cache.read(1) is None
    assert "block 1 is not kept in" in caplog.text
    assert cache.digests == {1: "digest"}, "the peer announces it all the same"


def test_full_disk_is_logged_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_half(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(quantized_cache, "save_file", write_half)
    cache = QuantizedCache("key", tmp_path)
    cache.write(1, TENSORS, "digest")
    assert "No space left on device" in caplog.text
    assert list(cache.path(1).parent.iterdir()) == []


def test_least_recently_used_blocks_of_others_go_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    paths = [written(tmp_path, key) for key in ("a", "b", "c")]
    for age, path in enumerate(paths):
        os.utime(path, (1000.0 + age, 1000.0 + age))
    assert QuantizedCache("a", tmp_path).read(1) is not None  # so it is used last
    size = paths[0].stat().st_size
    cache = QuantizedCache("d", tmp_path, max_bytes=3 * size)
    cache.write(1, TENSORS, "digest")
    assert [path.exists() for path in (*paths, cache.path(1))] == [True, False, True, True]
    cache.write(2, TENSORS, "digest")
    cache.write(3, TENSORS, "digest")
    cache.write(4, TENSORS, "digest")
    assert [path.exists() for path in paths] == [False, False, False]
    assert all(cache.path(block).exists() for block in (1, 2, 3, 4)), "a span that is served is kept whole"


def test_leftovers_of_a_crash_are_removed_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "quantized" / "key"
    for name in (".writing-old", ".writing-new"):
        (folder / name).mkdir(parents=True)
        (folder / name / "block-1.safetensors").write_bytes(b"half")
    os.utime(folder / ".writing-old", (0.0, 0.0))
    written(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [".writing-new", "block-1.safetensors"]


def test_folder_is_what_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_MODULES_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setenv("REMOTE_MODULES_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root() == Path("/home/someone/.cache/remote-modules")


def digest_of(checkpoint: Checkpoint, config: Any, quantization: str = "int8", dtype: Any = "auto") -> str:
    return model_digest(checkpoint, config, quantization=quantization, dtype=dtype)


def test_key_changes_with_all_that_the_contents_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "one")
    checkpoint, config, _ = opened(folder)
    keys = [digest_of(checkpoint, config)]
    assert digest_of(*opened(folder)[:2]) == keys[0]
    keys += [digest_of(checkpoint, config, "nf4"), digest_of(checkpoint, config, dtype=torch.float16)]
    for commit in ("a" * 40, "b" * 40):
        hub = HubModel("someone/model", folder, commit)
        keys.append(digest_of(replace(checkpoint, hub=hub), config))
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    os.utime(shard, (1.0, 1.0))
    keys.append(digest_of(checkpoint, config))
    config.rms_norm_eps *= 2
    keys.append(digest_of(checkpoint, config))
    monkeypatch.setattr(quantized_cache, "version", lambda name: "0")
    keys.append(digest_of(checkpoint, config))
    assert len(set(keys)) == len(keys)
