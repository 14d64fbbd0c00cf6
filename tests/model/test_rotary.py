"""Rotary tables that follow the length of the text: each session has its own, as each local model would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_whole, save_tiny
from transformers import PreTrainedModel

from model.support import Trace, span_model, stack_of
from remote_modules.model.replay import SpanModel
from remote_modules.model.rotary import RotaryMemory, follows_length
from remote_modules.model.stack import cache_argument
from remote_modules.spans import Span

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
LIMIT = 16  # positions that the model was trained for
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "longrope": (
        "phi3",
        {
            "rope_parameters": LONG | {"original_max_position_embeddings": LIMIT},
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": 64,
            "sliding_window": None,
        },
    ),
}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, changes = FAMILIES[request.param]
    return save_tiny(tmp_path, family, **changes)


def token_ids(seed: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(seed))


class Session:
    """A fresh local model, and a cache of the same text at a peer."""

    def __init__(self, folder: Path, part: SpanModel, seed: int) -> None:
        self.model: PreTrainedModel = load_whole(folder)
        self.trace = Trace(self.model)
        self.part, self.cache, self.ids = part, part.new_cache(), token_ids(seed)
        self.past: Any = None

    def step(self, num_tokens: int) -> None:
        """Both go on, and agree exactly."""
        new = self.ids[:, self.cache.length : self.cache.length + num_tokens]
        name = cache_argument(self.model)
        assert name is not None
        with torch.inference_mode():
            output = self.model(new, use_cache=True, **({} if self.past is None else {name: self.past}))
            self.past = output[name]
            ours = self.part.run(self.trace.carried(0), self.part.span, self.trace.arguments(), self.cache)
        assert torch.equal(ours["hidden_states"], self.trace[self.part.span.end])


def tables(part: SpanModel) -> list[torch.Tensor]:
    (memory,) = part._rotary.read()
    return [value for value in memory.values() if isinstance(value, torch.Tensor)]


def test_sessions_of_other_lengths_do_not_disturb_each_other(folder: Path) -> None:
    """Both beyond the limit: a model that had seen the longer text would go on with the tables for that."""
    part = span_model(folder, "0:4")
    long, short = Session(folder, part, 0), Session(folder, part, 1)
    long.step(LIMIT + 14)
    short.step(LIMIT + 2)
    long.step(1)
    short.step(1)
    third = Session(folder, part, 2)
    third.step(4)
    short.step(3)
    third.step(LIMIT)
    long.step(1)


def test_the_tables_do_change_beyond_the_limit(folder: Path) -> None:
    part = span_model(folder, "0:4")
    session = Session(folder, part, 0)
    session.step(5)
    before = tables(part)
    session.step(LIMIT)
    assert any(not torch.equal(now, was) for now, was in zip(tables(part), before, strict=True))


def test_call_without_a_session_is_that_of_a_fresh_model(folder: Path) -> None:
    part = span_model(folder, "0:4")
    Session(folder, part, 1).step(LIMIT + 14)
    model = load_whole(folder)
    trace = Trace(model)
    with torch.inference_mode():
        model(token_ids(0)[:, : LIMIT + 2], use_cache=False)
        ours = part.run(trace.carried(0), part.span, trace.arguments())
    assert torch.equal(ours["hidden_states"], trace[4])


def test_session_that_begins_anew_forgets_its_tables(folder: Path) -> None:
    part = span_model(folder, "0:4")
    session = Session(folder, part, 0)
    session.step(LIMIT + 14)
    session.cache.crop(0)
    assert session.cache.rotary is None
    session.model, session.past = load_whole(folder), None
    session.trace = Trace(session.model)
    session.step(LIMIT + 2)


@pytest.mark.parametrize(("name", "expected"), [("dynamic", True), ("longrope", True)])
def test_such_models_replay_their_steps(name: str, expected: bool, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = load_whole(save_tiny(tmp_path, family, **changes))
    assert follows_length(model) is expected
    assert stack_of(model).replays_steps is expected


def test_plain_tables_are_left_alone(tmp_path: Path) -> None:
    model: Any = load_whole(save_tiny(tmp_path))
    assert not follows_length(model)
    assert RotaryMemory(model.model).initial == []


def test_what_is_written_is_what_was_read(folder: Path) -> None:
    part = span_model(folder, "0:4")
    memory = part._rotary
    before = memory.read()
    session = Session(folder, part, 0)
    session.step(LIMIT + 8)
    changed = memory.read()
    memory.write(before)
    for now, was, other in zip(memory.read(), before, changed, strict=True):
        assert now.keys() == was.keys()
        for name, value in was.items():
            same = torch.equal(now[name], value) if isinstance(value, torch.Tensor) else now[name] == value
            assert same, name
        assert other.keys() == was.keys()
    assert part.span == Span(0, 4)
