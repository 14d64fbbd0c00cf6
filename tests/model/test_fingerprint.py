from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NUM_BLOCKS, WORKING, load_whole, save_tiny, tiny_config
from transformers import AutoConfig

from model.support import opened, opened_files, stack_of
from remote_modules.model.checkpoint import Checkpoint, open_checkpoint
from remote_modules.model.fingerprint import block_digests, model_key
from remote_modules.model.hub import HubModel
from remote_modules.model.loading import read_config
from remote_modules.model.stack import StackSpec

STACK = StackSpec(path="model.layers", num_blocks=NUM_BLOCKS)
ALL = range(NUM_BLOCKS)


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


def digests_of(folder: Path) -> dict[int, str]:
    return block_digests(open_checkpoint(str(folder)), STACK, ALL)


def shards_of(checkpoint: Checkpoint, block: int) -> set[str]:
    where = STACK.blocks_of_keys(checkpoint.weight_map)
    return set(checkpoint.shards(lambda key: where.get(key) == block))


def change_tensor(folder: Path, name: str, row: int) -> None:
    shard = folder / open_checkpoint(str(folder)).weight_map[name]
    tensors = load_file(shard)
    tensors[name][row] += 1
    save_file(tensors, shard, metadata={"format": "pt"})


# The key of an architecture


def test_key_is_the_same_for_folder_config_and_model(llama_folder: Path) -> None:
    _, config, _ = opened(llama_folder)
    key = model_key(config)
    assert model_key(tiny_config()) == key
    assert model_key(AutoConfig.from_pretrained(llama_folder)) == key
    assert model_key(load_whole(llama_folder).config) == key
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


def test_key_is_the_same_from_a_hub_cache(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = tmp_path / "models--someone--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40, "utf-8")
    shutil.copytree(llama_folder, root / "snapshots" / ("a" * 40))
    checkpoint = open_checkpoint("someone/tiny", cache_dir=str(tmp_path))
    assert model_key(read_config(checkpoint)) == model_key(tiny_config())
    assert block_digests(checkpoint, STACK, ALL) == digests_of(llama_folder)


def test_key_does_not_tell_fine_tunes_apart(llama_folder: Path, tmp_path: Path) -> None:
    assert model_key(opened(save_tiny(tmp_path, seed=1))[1]) == model_key(opened(llama_folder)[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 97},
        {"hidden_size": 64},
        {"num_hidden_layers": 5},
        {"num_attention_heads": 2},
        {"intermediate_size": 64},
    ],
    ids=str,
)
def test_other_dimensions_have_another_key(changes: dict[str, Any]) -> None:
    assert model_key(tiny_config(**changes)) != model_key(tiny_config())


def test_each_family_has_a_key_of_its_own() -> None:
    keys = {model_key(tiny_config(family)) for family in WORKING}
    assert len(keys) == len(WORKING)


def test_key_does_not_depend_on_what_a_release_adds_to_the_config() -> None:
    config = tiny_config()
    key = model_key(config)
    config.torch_dtype_of_a_later_release = "x"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert model_key(config) == key


# The digests of weights


def test_digests_are_of_the_wanted_blocks_and_repeat(llama_folder: Path) -> None:
    digests = digests_of(llama_folder)
    assert list(digests) == list(ALL)
    assert len(set(digests.values())) == NUM_BLOCKS
    assert {len(digest) for digest in digests.values()} == {12}
    assert digests_of(llama_folder) == digests
    checkpoint = open_checkpoint(str(llama_folder))
    assert block_digests(checkpoint, STACK, [2]) == {2: digests[2]}


def test_other_weights_have_other_digests_in_every_block(llama_folder: Path, tmp_path: Path) -> None:
    other = digests_of(save_tiny(tmp_path, seed=1))
    assert all(other[block] != digest for block, digest in digests_of(llama_folder).items())


def test_other_dtype_has_other_digests(llama_folder: Path, tmp_path: Path) -> None:
    other = digests_of(save_tiny(tmp_path, dtype="bfloat16"))
    assert all(other[block] != digest for block, digest in digests_of(llama_folder).items())


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"])
def test_change_in_one_tensor_changes_its_block_alone(copy: Path, name: str) -> None:
    before = digests_of(copy)
    change_tensor(copy, f"model.layers.2.{name}", 0)
    after = digests_of(copy)
    assert [block for block in ALL if after[block] != before[block]] == [2]


def test_digests_do_not_depend_on_how_a_checkpoint_is_sharded(llama_folder: Path, tmp_path: Path) -> None:
    digests = digests_of(llama_folder)
    whole = load_whole(llama_folder)
    whole.save_pretrained(tmp_path / "one")
    whole.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert digests_of(tmp_path / "one") == digests
    assert digests_of(tmp_path / "many") == digests


def test_digest_opens_only_the_shards_of_its_block(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(llama_folder))
    needed = shards_of(checkpoint, 0)
    assert needed < set(checkpoint.weight_map.values())
    with opened_files(monkeypatch) as names:
        block_digests(checkpoint, STACK, [0])
    assert names == needed


def test_block_whose_shard_is_not_here_has_no_digest_and_none_is_fetched(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    local = open_checkpoint(str(copy))
    before = digests_of(copy)
    gone = shards_of(local, 3) - shards_of(local, 0) - shards_of(local, 1)
    for name in gone:
        (copy / name).unlink()
    hub = Checkpoint(
        name="someone/tiny", folder=copy, weight_map=local.weight_map, hub=HubModel("someone/tiny", copy, "a" * 40)
    )
    digests = block_digests(hub, STACK, ALL)
    assert 3 not in digests
    assert {0, 1} <= set(digests)
    assert digests.items() <= before.items()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
def test_families_of_other_names_have_digests(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path, family)))
    digests = block_digests(checkpoint, stack_of(load_whole(tmp_path)), ALL)
    assert len(set(digests.values())) == NUM_BLOCKS


def test_scalar_and_tiny_float_tensors_are_digested(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.scale": torch.tensor(2.0),
        "model.layers.0.packed": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "model.layers.1.scale": torch.tensor(3.0),
        "model.layers.1.packed": torch.ones(2, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", "utf-8")
    digests = block_digests(open_checkpoint(str(tmp_path)), STACK, range(2))
    assert len(set(digests.values())) == 2
