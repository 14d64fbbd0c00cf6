"""All modes of calling a model, on families of each kind: what `benchmarks/modes.py` does for many more."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.testing.inline_swarm import InlineSwarm

FOLDER = Path(__file__).parents[2] / "benchmarks"
NOT_ASSISTED = frozenset({"prompt lookup", "assisted", "assisted by itself"})  # refused by transformers
ROUNDED = frozenset(
    {"static cache", "forked cache"}
)  # see `SAME_AS`; how the local model rounds depends on the machine
# Other modes that end with a note rather than with 0.0.
NOTED: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "gemma2": frozenset(),
    "gemma3n_text": frozenset({"hidden states"}),
    "qwen3_next": NOT_ASSISTED,
    "mixtral": frozenset(),
    "deepseek_v3": frozenset(),
    "bloom": frozenset({"4D bool mask"}),
    "mamba2": frozenset({"chunked prefill"}) | NOT_ASSISTED,
}


@pytest.fixture(scope="module")
def modes() -> Iterator[ModuleType]:
    transformers_logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("benchmark_modes", FOLDER / "modes.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        gc.freeze()  # collections after each mode are cheap
        yield module
        gc.unfreeze()


@pytest.fixture(scope="module")
def sides(modes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A local llama, and a remote one."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model(tiny_config("llama")).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with InlineSwarm(folder, ["0:1", "1:3", "3:4"]) as swarm:
        yield modes.Side(model, model), modes.Side(swarm.load(), model, swarm)


@pytest.mark.parametrize("family", NOTED)
def test_modes_are_exact(modes: ModuleType, family: str) -> None:
    row = modes.run_family(family)
    assert row.cells.keys() == modes.MODES.keys()
    assert [f"{name}: {cell.note}" for name, cell in row.cells.items() if cell.is_wrong] == []
    assert {name for name, cell in row.cells.items() if cell.note} - ROUNDED == NOTED[family]
    inexact = {name for name, cell in row.cells.items() if cell.difference != 0.0}
    assert inexact - ROUNDED - NOTED[family] <= {"router logits"}
    assert (row.cells["router logits"].difference == 0.0) == (family in ("mixtral", "qwen3_next"))


def test_table_is_large_enough(modes: ModuleType) -> None:
    assert len(set(modes.FAMILIES)) == len(modes.FAMILIES) >= 36
    assert len(modes.MODES) >= 15


def test_other_weights_are_found(modes: ModuleType, sides: tuple[Any, Any]) -> None:
    local, remote = sides
    weight = remote.model.lm_head.weight
    with torch.no_grad():
        weight[5] += 1e-3
    try:
        cell = modes.check("llama", "greedy", local, remote)
    finally:
        with torch.no_grad():
            weight[5] -= 1e-3
    assert cell.is_wrong
    assert 0.0 < cell.difference < 1.0
    assert modes.document([modes.Row("llama", "0:4", {"greedy": cell})], "").count("**wrong [1]**") == 1


def test_a_cache_that_is_kept_is_found(
    modes: ModuleType, sides: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def keeping(side: Any) -> dict[str, torch.Tensor]:
        kept.append(side.generate(torch.arange(3, 9)[None]).past_key_values)
        return {"tokens": torch.zeros(1)}

    monkeypatch.setitem(modes.MODES, "greedy", keeping)
    cell = modes.check("llama", "greedy", *sides)
    assert cell.is_wrong
    assert cell.note.endswith("bytes of KV cache are left on the peers")


def test_a_failure_of_the_remote_side_is_found(
    modes: ModuleType, sides: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(side: Any) -> dict[str, torch.Tensor]:
        if side.swarm is not None:
            raise ValueError("not here")
        return {"tokens": torch.zeros(1)}

    monkeypatch.setitem(modes.MODES, "greedy", failing)
    cell = modes.check("llama", "greedy", *sides)
    assert (cell.difference, cell.note, cell.is_wrong) == (None, "fails: `ValueError: not here`", True)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, 0.0),
        ({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, 2.5])}, 0.5),
        ({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([float("nan")])}, 0.0),
        ({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([1.0])}, float("inf")),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, float("inf")),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, float("inf")),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "gradient.b": torch.zeros(1)}, 0.0),
    ],
)
def test_difference(
    modes: ModuleType, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], expected: float
) -> None:
    assert modes.difference(ours, theirs) == expected
