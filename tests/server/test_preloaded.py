"""Names of adapters; what a peer does with their files is tested with peft in tests/peft_models/test_preloaded.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from remote_modules.model.adapter_entries import Lora
from remote_modules.server.preloaded import Preloaded, split_source


def save(folder: Path, fill: float = 1.0) -> str:
    """A LoRA of rank 2 on one layer of block 1."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.1.proj.lora_"
    tensors = {f"{name}A.weight": torch.full((2, 8), fill), f"{name}B.weight": torch.ones(4, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def block() -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(8, 4), "other": nn.Linear(4, 8)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/some/folder/pirate", ("pirate", "/some/folder/pirate")),
        ("./pirate/", ("pirate", "./pirate/")),
        ("someone/pirate-lora", ("someone/pirate-lora", "someone/pirate-lora")),
        ("pirate=/x/y", ("pirate", "/x/y")),
    ],
)
def test_name_of_a_source(text: str, expected: tuple[str, str]) -> None:
    assert split_source(text) == expected


@pytest.mark.parametrize("text", ["", "=", "a=", "=b", "a b=c", "a@b=c"])
def test_source_without_a_plain_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="adapter must be a folder, a hub id or NAME=SOURCE"):
        split_source(text)


def test_adapters_are_known_by_name_and_content(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two", fill=2.0)
    found = Preloaded([one, f"b={one}", two], "model.layers").of_blocks({0: block(), 1: block()})
    names, digests = zip(*(name.split("@") for name in found), strict=True)
    assert names == ("one", "b", "two")
    assert digests[0] == digests[1] != digests[2]
    (entry,) = found[f"one@{digests[0]}"].entries
    assert isinstance(entry, Lora)
    assert (entry.block, entry.module) == (1, "proj")


def test_peer_without_the_adapted_blocks_offers_it_all_the_same(tmp_path: Path) -> None:
    found = Preloaded([save(tmp_path / "one")], "model.layers").of_blocks({0: block()})
    (adapter,) = found.values()
    assert adapter.entries == adapter.tensors == ()


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one")
    with pytest.raises(ValueError, match="two adapters have the name 'one'; write NAME=SOURCE to give another one"):
        Preloaded([one, one], "model.layers")


def test_no_more_than_a_record_can_name_are_taken() -> None:
    with pytest.raises(ValueError, match="a peer offers at most 16 adapters, got 17"):
        Preloaded([f"a{number}=./x" for number in range(17)], "model.layers")
