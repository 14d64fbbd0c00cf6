"""Steps of one token that do without the owner: equal to it to the last bit, and not where that cannot be known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from torch import nn

from model.support import run_span, span_model
from remote_modules.model.kv import SpanCache
from remote_modules.model.replay import SpanModel

PROMPT, STEPS = 5, 8
OWNER_STEPS = 3  # one that notes the calls of blocks, two that are compared: a plan, and its tape
PLANNED = ["llama", "qwen3"]
UNPLANNED = {"bloom": "alibi depends on the length", "mistral": "layers with a window"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in (*PLANNED, *UNPLANNED)}
    for family, folder in folders.items():
        save_tiny(folder, family)
    return folders


@contextmanager
def counted(part: SpanModel) -> Iterator[list[int]]:
    """One entry for each call of the owner."""
    calls: list[int] = []
    handle = part._owner.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def decode(part: SpanModel, *, rows: int = 2, steps: int = STEPS, cache: SpanCache | None = None, **given: Any) -> Any:
    """Outputs of a prompt and ``steps`` of one token; ``given``: functions of the range of tokens."""
    generator = torch.Generator().manual_seed(0)
    cache = cache or part.new_cache()
    outputs = []
    with torch.inference_mode():
        for start, end in [(0, PROMPT), *((PROMPT + step, PROMPT + step + 1) for step in range(steps))]:
            hidden_states = torch.randn(rows, end - start, part.hidden_size, generator=generator)
            arguments = {name: make(start, end) for name, make in given.items()}
            outputs.append(run_span(part, hidden_states, cache=cache, **arguments))
    return outputs


def replayed(folder: Path, span: str, **given: Any) -> Any:
    """The same by the owner alone."""
    part = span_model(folder, span)
    part._plans._is_possible = False
    with counted(part) as calls:
        outputs = decode(part, **given)
    assert len(calls) == len(outputs)
    return outputs


def same(outputs: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, outputs, others))


def full_mask(start: int, end: int, rows: int = 2) -> torch.Tensor:
    return torch.ones(rows, end, dtype=torch.int64)


def counting(start: int, end: int) -> torch.Tensor:
    return torch.arange(start, end)[None]


@pytest.mark.parametrize("family", PLANNED)
@pytest.mark.parametrize("span", ["0:2", "2:4"])
@pytest.mark.parametrize("given", [{}, {"attention_mask": full_mask, "position_ids": counting}], ids=["bare", "given"])
def test_steps_after_the_third_go_without_the_owner(
    folders: dict[str, Path], family: str, span: str, given: dict[str, Any]
) -> None:
    part = span_model(folders[family], span)
    with counted(part) as calls:
        outputs = decode(part, **given)
        assert len(calls) == 1 + OWNER_STEPS
        again = decode(part, **given)  # plans are the span's, not the session's
        assert len(calls) == 2 + OWNER_STEPS
    expected = replayed(folders[family], span, **given)
    assert same(outputs, expected)
    assert same(again, expected)


@pytest.mark.parametrize("family", UNPLANNED)
def test_families_whose_calls_cannot_be_made_again_keep_the_owner(folders: dict[str, Path], family: str) -> None:
    part = span_model(folders[family], "1:3")
    with counted(part) as calls:
        outputs = decode(part)
    assert len(calls) == len(outputs)
    assert same(outputs, replayed(folders[family], "1:3"))


def padded_mask(start: int, end: int) -> torch.Tensor:
    mask = full_mask(start, end)
    mask[0, :2] = 0
    return mask


def shifted(start: int, end: int) -> torch.Tensor:
    return counting(start, end) + 3


@pytest.mark.parametrize(
    "given", [{"attention_mask": padded_mask}, {"position_ids": shifted}], ids=["padding", "shifted"]
)
def test_calls_that_do_not_follow_from_the_position_keep_the_owner(
    folders: dict[str, Path], given: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"attention_mask": full_mask, "position_ids": counting}
    part = span_model(folders["llama"], "1:3")
    decode(part, **{name: plain[name] for name in given})
    with counted(part) as calls:
        outputs = decode(part, **given)
    assert len(calls) == len(outputs)
    assert same(outputs, replayed(folders["llama"], "1:3", **given))


def test_plan_is_compared_again_when_the_length_has_doubled(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "1:3")
    steps = 100
    with counted(part) as calls:
        outputs = decode(part, rows=1, steps=steps)
    assert len(calls) == 1 + OWNER_STEPS + 1  # at 71 tokens; the next time is at 142
    assert same(outputs, replayed(folders["llama"], "1:3", rows=1, steps=steps))


def test_plan_that_differs_is_dropped_and_the_owner_answers(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "1:3")
    shift = {"by": 0.0}

    def owner_runs(module: nn.Module, args: object) -> None:
        shift["by"] += 1.0

    def add(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + shift["by"]  # what the owner did before: no plan can know

    part._owner.register_forward_pre_hook(owner_runs)
    part.blocks[2].register_forward_hook(add)
    with counted(part) as calls:
        outputs = decode(part)
    assert len(calls) == len(outputs)
    assert same(outputs, [output + number for number, output in enumerate(replayed(folders["llama"], "1:3"), start=1)])


def test_plan_that_fails_is_dropped_and_the_owner_answers(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "1:3")
    state = {"owner": False, "failures": 0}

    def owner_runs(module: nn.Module, args: object) -> None:
        state["owner"] = True

    def needs_owner(module: nn.Module, args: object) -> None:
        if not state["owner"]:
            state["failures"] += 1
            raise LookupError("no owner is running")

    def has_ended(module: nn.Module, args: object, output: object) -> None:
        state["owner"] = False

    part._owner.register_forward_pre_hook(owner_runs)
    part.blocks[2].register_forward_pre_hook(needs_owner)
    part.blocks[2].register_forward_hook(has_ended)
    with counted(part) as calls:
        outputs = decode(part)
    assert state["failures"] == 1
    assert len(calls) == len(outputs)
    assert same(outputs, replayed(folders["llama"], "1:3"))


def test_rows_that_change_get_a_plan_of_their_own(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "1:3")
    decode(part, rows=2)
    with counted(part) as calls:
        outputs = decode(part, rows=3)
    assert len(calls) == 1 + OWNER_STEPS
    assert same(outputs, replayed(folders["llama"], "1:3", rows=3))


def test_sessions_at_like_positions_do_not_share_what_blocks_may_change(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "1:3")
    expected = replayed(folders["llama"], "1:3")

    def spoil(module: nn.Module, args: object, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        for table in kwargs["position_embeddings"]:
            table.zero_()

    part.blocks[2].register_forward_hook(spoil, with_kwargs=True)  # so there is no tape
    caches = [part.new_cache(), part.new_cache()]
    for _ in range(2):
        assert all(same(decode(part, cache=cache), expected) for cache in caches)
        for cache in caches:
            cache.crop(0)
