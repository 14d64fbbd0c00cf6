from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tiny_models import load_whole, save_tiny

from model.fake_hub import COMMIT, HUB_NAME, serving
from model.support import opened, opened_files
from remote_modules.errors import CheckpointError
from remote_modules.model.checkpoint import (
    BUILT_IN,
    INDEX_NAME,
    SINGLE_NAME,
    built_in_draft_path,
    built_in_path,
    open_checkpoint,
)
from remote_modules.model.classes import model_class
from remote_modules.model.loading import load_span, read_config
from remote_modules.spans import Span

LATER_COMMIT = "b" * 40


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def check_refused(name: str | Path, match: str, **options: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(str(name), **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to break."""
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


# Local folders


def test_sharded_folder_maps_each_tensor_to_its_file(llama_folder: Path) -> None:
    checkpoint = open_checkpoint(str(llama_folder))
    assert len(shard_names(llama_folder)) > 2
    assert sorted(set(checkpoint.weight_map.values())) == shard_names(llama_folder)
    assert set(checkpoint.weight_map) == set(load_whole(llama_folder).state_dict())
    assert checkpoint.hub is None


def test_single_file_folder_maps_all_tensors_to_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path, shard_size="1GB")))
    assert set(checkpoint.weight_map.values()) == {SINGLE_NAME}
    assert set(checkpoint.weight_map) == set(load_whole(tmp_path).state_dict())


def test_shards_are_those_of_the_wanted_tensors_in_order(llama_folder: Path) -> None:
    checkpoint = open_checkpoint(str(llama_folder))
    shards = checkpoint.shards(lambda key: ".mlp." in key)
    assert list(shards) == sorted(shards)
    assert sorted(key for keys in shards.values() for key in keys) == sorted(
        key for key in checkpoint.weight_map if ".mlp." in key
    )
    for file_name, keys in shards.items():
        assert keys == sorted(keys)
        assert {checkpoint.weight_map[key] for key in keys} == {file_name}
    assert checkpoint.shards(lambda key: False) == {}


def test_opening_reads_no_weights_of_a_sharded_folder(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened_files(monkeypatch) as names:
        open_checkpoint(str(llama_folder))
    assert not names


def test_missing_shard_is_named_when_it_is_needed(copy: Path) -> None:
    missing = shard_names(copy)[0]
    (copy / missing).unlink()
    checkpoint = open_checkpoint(str(copy))
    with pytest.raises(CheckpointError, match=rf"^checkpoint .*copy lacks shard '{missing}' that its index names$"):
        checkpoint.part(lambda key: checkpoint.weight_map[key] == missing)


def test_pickled_weights_alone_are_refused(copy: Path) -> None:
    for name in [*shard_names(copy), INDEX_NAME]:
        (copy / name).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    check_refused(copy, r"has only pickled weights \(pytorch_model.bin\), which are never loaded; save it with ")


def test_folder_without_weights_is_refused(copy: Path) -> None:
    for name in [*shard_names(copy), INDEX_NAME]:
        (copy / name).unlink()
    check_refused(copy, rf"has neither {INDEX_NAME} nor {SINGLE_NAME}$")


@pytest.mark.parametrize(
    "file_name",
    ["../weights.safetensors", "/etc/passwd", "sub/weights.safetensors", "..", ".", "", 3, None, ["x"]],
    ids=repr,
)
def test_index_that_leaves_its_folder_is_refused(copy: Path, file_name: object) -> None:
    index = {"weight_map": {"model.norm.weight": file_name}}
    (copy / INDEX_NAME).write_text(json.dumps(index), "utf-8")
    check_refused(copy, r"maps 'model.norm.weight' outside its folder: ")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"{}", b'{"weight_map": [1]}', b'{"weight_map": null}', b"\xff\xfe\x00"], ids=repr
)
def test_index_of_garbage_is_refused(copy: Path, text: bytes) -> None:
    (copy / INDEX_NAME).write_bytes(text)
    check_refused(copy, r"^index .* is not readable: ")


@pytest.mark.parametrize("data", [b"", b"x" * 100, (2**62).to_bytes(8, "little") + b"{}"], ids=repr)
def test_single_file_of_garbage_is_refused(copy: Path, data: bytes) -> None:
    (copy / INDEX_NAME).unlink()
    (copy / SINGLE_NAME).write_bytes(data)
    check_refused(copy, r"^weights .*model.safetensors are not readable: ")


def test_folder_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    check_refused(copy, r"^checkpoint .* has no config.json$")


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "~/no-such-folder-of-remote-modules"])
def test_path_that_is_no_folder_is_refused(name: str) -> None:
    check_refused(name, r"^checkpoint folder .* does not exist$")


def test_file_in_place_of_a_folder_is_refused(copy: Path) -> None:
    check_refused(copy / "config.json", r"^checkpoint folder .*config.json does not exist$")


def test_built_in_name_is_a_folder_of_the_package() -> None:
    assert built_in_path().parts[-3:] == ("remote_modules", "assets", BUILT_IN)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a draft model must have the same tokens
        assert (built_in_draft_path() / name).read_bytes() == (built_in_path() / name).read_bytes()


# The hub's cache, laid out by hand


def cached(folder: Path, cache_dir: Path, names: list[str], commit: str = COMMIT) -> Path:
    """Put these files of ``folder`` into a hub cache as ``HUB_NAME``."""
    root = cache_dir / ("models--" + HUB_NAME.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit, "utf-8")
    for name in names:
        shutil.copyfile(folder / name, snapshot / name)
    return snapshot


def load_blocks(checkpoint_name: str, span: str, cache_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(checkpoint_name, cache_dir=str(cache_dir))
    cls, config = model_class(read_config(checkpoint))
    model, _ = load_span(checkpoint, config, cls, Span.parse(span))
    return dict(model.state_dict())


def needed_shards(folder: Path, span: str) -> list[str]:
    checkpoint = open_checkpoint(str(folder))
    blocks = Span.parse(span)
    return list(checkpoint.shards(lambda key: any(f"layers.{block}." in key for block in blocks)))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_offline_cache_with_just_the_needed_shards_loads(llama_folder: Path, tmp_path: Path) -> None:
    shards = needed_shards(llama_folder, "1:2")
    assert len(shards) < len(shard_names(llama_folder))
    cached(llama_folder, tmp_path, ["config.json", INDEX_NAME, *shards])
    weights = load_blocks(HUB_NAME, "1:2", tmp_path)
    whole = load_whole(llama_folder).state_dict()
    assert weights
    for name, tensor in weights.items():
        assert torch.equal(tensor, whole[name])


@pytest.mark.usefixtures("offline")
def test_offline_cache_without_a_needed_shard_names_it(llama_folder: Path, tmp_path: Path) -> None:
    cached(llama_folder, tmp_path, ["config.json", INDEX_NAME, *needed_shards(llama_folder, "0:1")])
    missing = min(set(needed_shards(llama_folder, "3:4")) - set(needed_shards(llama_folder, "0:1")))
    with pytest.raises(CheckpointError, match=rf"^'{missing}' of '{HUB_NAME}' is not in the hub cache, and ") as caught:
        load_blocks(HUB_NAME, "3:4", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_offline_single_file_in_the_cache_loads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source", shard_size="1GB")
    cached(folder, tmp_path, ["config.json", SINGLE_NAME])
    assert load_blocks(HUB_NAME, "0:1", tmp_path)


@pytest.mark.usefixtures("offline")
def test_offline_and_not_cached_is_refused_in_one_line(tmp_path: Path) -> None:
    check_refused(HUB_NAME, rf"^'config.json' of '{HUB_NAME}' is not in the hub cache, and ", cache_dir=str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["a/b/c", "no spaces", "x" * 200])
def test_name_that_is_no_hub_id_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check_refused(name, r"^'.*' is neither a local folder nor a model on the hub: ", cache_dir=str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_branch_moves_on_shards_of_the_later_commit_are_not_mixed_in(llama_folder: Path, tmp_path: Path) -> None:
    cached(llama_folder, tmp_path, ["config.json", INDEX_NAME])
    checkpoint = open_checkpoint(HUB_NAME, cache_dir=str(tmp_path))
    assert checkpoint.hub is not None
    assert checkpoint.hub.commit == COMMIT
    shard = shard_names(llama_folder)[0]
    cached(llama_folder, tmp_path, ["config.json", INDEX_NAME, shard], LATER_COMMIT)
    with pytest.raises(CheckpointError, match=rf"^'{shard}' of '{HUB_NAME}' is not in the hub cache"):
        checkpoint.part(lambda key: checkpoint.weight_map[key] == shard)


def test_offline_by_environment_and_not_cached_is_refused_in_one_line(tmp_path: Path) -> None:
    script = "import sys; from remote_modules.model.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, HUB_NAME],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            f"remote_modules.errors.CheckpointError: 'config.json' of '{HUB_NAME}' is not in the hub cache, and "
        )
    )


# A hub on the loopback; test_hub.py has how it is read


def test_hub_model_has_only_its_needed_shards_fetched_once(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(llama_folder, monkeypatch) as hub:
        load_blocks(HUB_NAME, "1:2", tmp_path)
        once = len(hub.fetched)
        weights = load_blocks(HUB_NAME, "1:2", tmp_path)
    assert len(hub.fetched) == once
    shards = needed_shards(llama_folder, "1:2")
    assert set(hub.fetched) == {"config.json", "generation_config.json", INDEX_NAME, *shards}
    assert len(shards) < len(shard_names(llama_folder))
    whole = load_whole(llama_folder).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("error", ["RepoNotFound", "RevisionNotFound"])
def test_hub_does_not_know_the_model_is_refused_in_one_line(
    error: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(llama_folder, monkeypatch) as hub:
        hub.error = error
        match = rf"^'{HUB_NAME}' is neither a local folder nor a model on the hub: "
        check_refused(HUB_NAME, match, cache_dir=str(tmp_path))


def test_hub_model_without_safetensors_is_refused(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*shard_names(copy), INDEX_NAME]:
        (copy / name).unlink()
    with serving(copy, monkeypatch):
        match = rf"^'{HUB_NAME}' has no '{SINGLE_NAME}' on the hub; only safetensors are loaded$"
        check_refused(HUB_NAME, match, cache_dir=str(tmp_path / "cache"))


def test_opened_local_checkpoint_is_ready_to_load(llama_folder: Path) -> None:
    checkpoint, config, cls = opened(llama_folder)
    assert (checkpoint.name, config.model_type, cls.__name__) == (str(llama_folder), "llama", "LlamaForCausalLM")
