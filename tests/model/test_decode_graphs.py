"""Captured steps, run as plain functions here: sessions alone and together give what the owner gives.

What only a CUDA device can show, the capture itself, is in `benchmarks/decode_device.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from torch import nn

from model.support import run_span, span_model
from remote_modules.model.decode_graphs import LENGTHS, ROWS, DecodeGraphs, Step
from remote_modules.model.joined import JoinedLinears
from remote_modules.model.kv import SpanCache
from remote_modules.model.replay import SpanModel
from remote_modules.server.captures import capture_steps

FAMILIES = ["llama", "qwen3", "gpt2", "mixtral"]
BUDGET_BYTES = 1 << 22
PROMPTS = (5, 70)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in (*FAMILIES, "bloom")}
    for family, folder in folders.items():
        save_tiny(folder, family)
    return folders


def same_step(step: Step) -> Step:
    return step


def captured(folder: Path, span: str = "1:3", budget_bytes: int = BUDGET_BYTES) -> tuple[SpanModel, list[int]]:
    """A span whose steps are graphs, and a list with one entry for each call of its owner."""
    part = span_model(folder, span)
    assert capture_steps(part, budget_bytes, capture=same_step)
    calls: list[int] = []
    part._owner.register_forward_pre_hook(lambda module, args: calls.append(1))
    return part, calls


def hidden(part: SpanModel, rows: int, num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, num_tokens, part.hidden_size, generator=torch.Generator().manual_seed(seed))


def filled(part: SpanModel, rows: int, num_tokens: int) -> SpanCache:
    cache = part.new_cache()
    with torch.inference_mode():
        run_span(part, hidden(part, rows, num_tokens, num_tokens), cache=cache)
    return cache


def graphs_of(part: SpanModel) -> DecodeGraphs:
    assert part.graphs is not None
    return part.graphs


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_give_what_the_owner_gives_without_it(folders: dict[str, Path], family: str) -> None:
    part, calls = captured(folders[family])
    reference = span_model(folders[family], "1:3")
    pairs = [(filled(part, 2, length), filled(reference, 2, length)) for length in PROMPTS]
    calls.clear()
    with torch.inference_mode():
        for seed in range(4):
            for found, expected in pairs:
                step = hidden(part, 2, 1, seed)
                mask = torch.ones(2, found.length + 1, dtype=torch.int64)
                assert close(
                    run_span(part, step, cache=found, attention_mask=mask), run_span(reference, step, cache=expected)
                )
            if seed == 1:  # a rollback
                for cache in pairs[1]:
                    cache.crop(PROMPTS[1] - 3)
    assert not calls
    assert set(graphs_of(part)._graphs) == {(rows, LENGTHS[0]) for rows in ROWS}


def test_sessions_of_any_lengths_go_together(folders: dict[str, Path]) -> None:
    part, _ = captured(folders["llama"])
    reference = span_model(folders["llama"], "1:3")
    rows = (1, 3, 1)
    lengths = (4, 66, 1100)  # more than the shortest graph is for
    caches = [filled(part, number, length) for number, length in zip(rows, lengths, strict=True)]
    steps = [hidden(part, number, 1, number) for number in rows]
    with torch.inference_mode():
        found = graphs_of(part).step(torch.cat(steps), list(zip(caches, rows, strict=True)))
        assert found is not None
        for output, step, number, length in zip(found.split(rows), steps, rows, lengths, strict=True):
            assert close(output, run_span(reference, step, cache=filled(reference, number, length)))
    assert (8, LENGTHS[1]) in graphs_of(part)._graphs
    assert [cache.held[0].get_seq_length() for cache in caches] == [length + 1 for length in lengths]


def test_what_graphs_are_not_for_goes_by_replay(folders: dict[str, Path]) -> None:
    part, calls = captured(folders["llama"], budget_bytes=1 << 20)
    rows = ROWS[-1] + 1
    cache = filled(part, rows, 3)
    with torch.inference_mode():
        assert graphs_of(part).step(hidden(part, rows, 1, 0), [(cache, rows)]) is None
        padded = filled(part, 2, 5)
        mask = torch.ones(2, 6, dtype=torch.int64)
        mask[0, 0] = 0
        calls.clear()
        found = run_span(part, hidden(part, 2, 1, 0), cache=padded, attention_mask=mask)
        assert calls
        reference = span_model(folders["llama"], "1:3")
        same = filled(reference, 2, 5)
        assert torch.equal(found, run_span(reference, hidden(part, 2, 1, 0), cache=same, attention_mask=mask))


def test_a_session_that_finds_no_room_in_the_arena_goes_on(folders: dict[str, Path]) -> None:
    part, _ = captured(folders["llama"], budget_bytes=1 << 20)
    graphs = graphs_of(part)
    first = filled(part, 1, 5)
    assert first.held[0].region is not None
    taken = graphs.arena.take(graphs.arena.free_tokens)
    assert taken is not None
    second = filled(part, 1, 5)
    with torch.inference_mode():
        found = run_span(part, hidden(part, 1, 1, 0), cache=second)
        assert second.held[0].region is None
        assert close(run_span(part, hidden(part, 1, 1, 0), cache=first), found)


def test_ended_sessions_leave_their_room(folders: dict[str, Path]) -> None:
    part, _ = captured(folders["llama"])
    before = graphs_of(part).arena.free_tokens
    caches = [filled(part, 2, 100) for _ in range(3)]
    assert graphs_of(part).arena.free_tokens < before
    caches.clear()
    assert graphs_of(part).arena.free_tokens == before


@pytest.mark.parametrize("fault", ["results", "capture", "room", "family"])
def test_steps_are_not_captured_where_that_would_not_do(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    part = span_model(folders["bloom" if fault == "family" else "llama"], "1:3")

    def capture(step: Step) -> Step:
        if fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return (lambda: None) if fault == "results" else step

    assert not capture_steps(part, 1000 if fault == "room" else BUDGET_BYTES, capture=capture)
    assert part.graphs is None
    assert "steps are not captured: " in caplog.text
    cache = filled(part, 1, 5)
    assert cache.length == 5
    assert cache.held[0].region is None


def test_joined_layers_give_what_each_gives_and_share_one_matrix() -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({name: nn.Linear(8, size) for name, size in (("q", 12), ("k", 4), ("v", 4), ("o", 8))})

    def run() -> list[torch.Tensor]:
        inputs = torch.ones(3, 1, 8)
        return [*(block[name](inputs) for name in "qkv"), block["o"](torch.ones(3, 1, 8))]

    with torch.no_grad():
        expected = run()
        joined = JoinedLinears([block], run)
        assert len(joined) == 1
        assert len({block[name].weight.untyped_storage().data_ptr() for name in "qkv"}) == 1  # type: ignore[operator]
        with joined.used():
            found = run()
        for each in (found, run()):
            assert all(map(torch.allclose, each, expected))
    assert "forward" not in vars(block["q"])
