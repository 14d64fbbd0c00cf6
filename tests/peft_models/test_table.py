"""Cells of docs/adapters.md; `python benchmarks/adapters.py` makes all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_modules.testing.inline_swarm import InlineSwarm

from .conftest import table

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following:RuntimeWarning"),
]

# Each method on some architecture, each architecture with some methods.
CELLS = {
    "llama": ["LoRA some layers", "rsLoRA", "LoRA dropout", "p-tuning", "LoHa", "deep prompts"],
    "gpt2": ["LoRA all-linear", "DoRA", "IA3", "prefix tuning", "modules_to_save"],
    "bloom": ["LoKr", "LoRA all-linear", "prompt tuning", "prefix tuning"],
    "gemma2": ["LoRA q/v", "deep prompts", "prefix tuning"],
    "qwen3_moe": ["LoRA experts", "LoRA all-linear"],
    "mixtral": ["LoRA experts", "IA3"],
    "falcon": ["LoRA dropout", "prefix tuning"],
    "qwen3": ["OFT", "LoRA q/v", "LoRA head, embeddings"],
    "phi3": ["DoRA"],
    "gpt_neox": ["IA3", "prefix tuning"],
}


@pytest.fixture(scope="module", params=list(CELLS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Any]]:
    folder = table.save_family(tmp_path_factory.mktemp(request.param), request.param)
    with InlineSwarm(folder, table.SPANS) as swarm:
        yield request.param, folder, swarm


def test_remote_blocks_train_as_local_ones(family: tuple[str, Path, InlineSwarm], tmp_path: Path) -> None:
    name, folder, swarm = family
    for method in CELLS[name]:
        row = table.compare(folder, swarm, name, method, tmp_path / method)
        assert row.is_right, f"{method}: {row}"
        assert row.gradient == 0.0
        assert bool(row.local_error) == (name == "falcon" and method == "prefix tuning")


def test_every_method_and_family_is_in_some_cell() -> None:
    assert set(CELLS) == set(table.FAMILIES)
    assert {method for methods in CELLS.values() for method in methods} == set(table.METHODS)


def test_a_wrong_cell_is_told_from_a_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = table.save_family(tmp_path / "llama", "llama")
    monkeypatch.setattr("remote_modules.model.adapted_ia3._ia3_scale", lambda items: torch.ones(()))
    with InlineSwarm(folder, ["0:4"]) as swarm:
        row = table.compare(folder, swarm, "llama", "IA3", tmp_path / "adapter")
    assert not row.is_right


def test_a_method_must_fail_on_both_sides_or_on_none() -> None:
    assert not table.Row(remote_error="no").is_right
    assert not table.Row(local_error="no").is_right
    assert table.Row(local_error="no", remote_error="no").is_right
