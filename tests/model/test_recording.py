"""Router logits that a peer takes from its blocks, and that a client's hooks see at shadows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, load_whole, save_tiny, tiny_config
from torch import nn
from transformers import PreTrainedModel

from model.support import Trace, opened, span_model
from remote_modules.model.classes import model_class
from remote_modules.model.loading import load_client_part
from remote_modules.model.recording import RouterTaps, router_of, show_router_logits
from remote_modules.model.stack import find_stack, meta_skeleton

TOKENS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


def expected_logits(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        logits: tuple[torch.Tensor, ...] = model(input_ids=TOKENS, output_router_logits=True, use_cache=False)[
            "router_logits"
        ]
    assert len(logits) == NUM_BLOCKS
    return logits


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path, request.param)


def test_span_returns_the_logits_of_its_routers(folder: Path) -> None:
    model = load_whole(folder)
    trace = Trace(model)
    expected = expected_logits(model)
    part = span_model(folder, "1:3")
    with torch.inference_mode():
        outputs = part.run(trace.carried(1), part.span, trace.arguments(record=("router_logits",)))
        again = part.run(trace.carried(1), part.span, trace.arguments(record=()))
    assert outputs.keys() - again.keys() == {"record.router_logits.1", "record.router_logits.2"}
    for block in (1, 2):
        assert torch.equal(outputs[f"record.router_logits.{block}"], expected[block])
    assert torch.equal(outputs["hidden_states"], again["hidden_states"])


def test_client_shows_them_where_transformers_looks(folder: Path) -> None:
    expected = expected_logits(load_whole(folder))
    checkpoint, config, cls = opened(folder)
    client, stack = load_client_part(checkpoint, config, cls)
    blocks: Any = stack.blocks(client)
    for index, block in enumerate(blocks):

        def forward(hidden_states: torch.Tensor, *args: Any, index: int = index, **kwargs: Any) -> torch.Tensor:
            show_router_logits(client, blocks[index], expected[index])
            return hidden_states

        block.forward = forward
    shown = expected_logits(client.eval())
    for ours, theirs in zip(shown, expected, strict=True):
        assert torch.equal(ours, theirs)


def router(family: str, block: int) -> tuple[nn.Module, int] | None:
    cls, config = model_class(tiny_config(family))
    model = meta_skeleton(cls, config)
    return router_of(model, find_stack(model, config).blocks(model)[block])


def test_dense_blocks_have_no_router() -> None:
    assert router("llama", 0) is None
    found = router("mixtral", 0)
    assert found is not None
    assert "Router" in type(found[0]).__name__


def test_nothing_is_watched_unless_asked_for_and_no_hook_stays(tmp_path: Path) -> None:
    model = load_whole(save_tiny(tmp_path, "mixtral"))
    blocks: Any = find_stack(model, model.config).blocks(model)
    taps = RouterTaps(model, {1: blocks[1]})
    with taps.recording(False) as logits:
        model(input_ids=TOKENS)
    assert logits == {}
    with taps.recording(True) as logits:
        model(input_ids=TOKENS)
    assert list(logits) == [1]
    assert logits[1].shape == (TOKENS.numel(), 4)
    before = logits[1]
    model(input_ids=TOKENS + 1)
    assert logits[1] is before
    found = router_of(model, blocks[1])
    assert found is not None
    assert not found[0]._forward_hooks


def test_failure_leaves_no_hook(tmp_path: Path) -> None:
    model = load_whole(save_tiny(tmp_path, "mixtral"))
    blocks: Any = find_stack(model, model.config).blocks(model)
    taps, found = RouterTaps(model, {0: blocks[0]}), router_of(model, blocks[0])
    assert found is not None
    with pytest.raises(KeyError, match="broken"), taps.recording(True):
        raise KeyError("broken")
    assert not found[0]._forward_hooks


def test_showing_at_a_dense_block_does_nothing(tmp_path: Path) -> None:
    model = load_whole(save_tiny(tmp_path, "llama"))
    block = find_stack(model, model.config).blocks(model)[0]
    before = copy.copy(block.__dict__)
    show_router_logits(model, block, torch.ones(1))
    assert block.__dict__ == before
