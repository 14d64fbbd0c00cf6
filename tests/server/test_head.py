from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import model_class
from remote_modules.model.loading import load_head, read_config
from remote_modules.server.engine import Engine
from remote_modules.server.head import MAX_PLACES, MAX_TOP_K, logits_of
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta, StepRequest

from .tiny import NUM_BLOCKS, hidden, load_engine, save_tiny_model

STEP = StepRequest(1, "s" * 16, 0, 0, NUM_BLOCKS, 0, (), (), 1.0, CallMeta(1, 4, head_tokens=2, head_top_k=5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    engine = load_engine(folder, Span(0, NUM_BLOCKS))
    checkpoint = open_checkpoint(str(folder))
    cls, config = model_class(read_config(checkpoint))
    engine.head = load_head(checkpoint, config, cls)
    return engine


def asked(**call: Any) -> StepRequest:
    return msgspec.structs.replace(STEP, call=msgspec.structs.replace(STEP.call, **call))


def test_logits_of_the_last_tokens_are_those_of_the_model(engine: Engine, folder: Path) -> None:
    local: Any = LlamaForCausalLM.from_pretrained(folder)
    outputs = {"hidden_states": hidden(1, 4)}
    work = logits_of(engine, STEP, outputs)
    assert work is not None
    with torch.no_grad():
        expected = local.lm_head(local.model.norm(outputs["hidden_states"][:, -2:])).topk(5)
    result = work()
    assert torch.equal(result["record.head.values"], expected.values)
    assert torch.equal(result["record.head.tokens"], expected.indices)


@pytest.mark.parametrize(
    ("request_", "shape"),
    [
        (asked(head_tokens=9), (1, 4, 5)),
        (asked(head_top_k=10**6), (1, 2, 64)),
        (asked(rows=MAX_PLACES // 3, head_tokens=9), (1, 3, 5)),
    ],
    ids=["more tokens than there are", "more logits than there are", "many rows"],
)
def test_no_more_comes_than_there_is_or_may_be(engine: Engine, request_: StepRequest, shape: tuple[int, ...]) -> None:
    assert MAX_TOP_K < 10**6
    work = logits_of(engine, request_, {"hidden_states": hidden(1, 4)})
    assert work is not None
    assert work()["record.head.values"].shape == shape


@pytest.mark.parametrize(
    "request_",
    [
        asked(head_tokens=0),
        asked(head_top_k=0),
        asked(rows=MAX_PLACES + 1),
        msgspec.structs.replace(STEP, end=NUM_BLOCKS - 1),
    ],
    ids=["no tokens", "no logits", "too many rows", "not the last blocks"],
)
def test_nothing_is_done_where_there_is_nothing_to_do(engine: Engine, request_: StepRequest) -> None:
    assert logits_of(engine, request_, {"hidden_states": hidden(1, 4)}) is None


def test_replayed_tokens_have_no_logits(engine: Engine) -> None:
    assert logits_of(engine, STEP, {"hidden_states": hidden(1, 0)}) is None


def test_peer_without_the_head_gives_none(folder: Path) -> None:
    assert logits_of(load_engine(folder, Span(0, NUM_BLOCKS)), STEP, {"hidden_states": hidden(1, 4)}) is None
