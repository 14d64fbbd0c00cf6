"""Peers are lost while the client keeps less, or elsewhere, of what it rebuilds caches from: nothing differs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from .models import Kill, family_of, opened
from .test_kill_modes import COMPUTING_S, MODES, assert_close, assert_equal, generated, tokens_of

KILLS = {
    "first-hop": Kill(hop=0, call=2, moment_s=COMPUTING_S),
    "last-hop": Kill(hop=1, call=3, moment_s=COMPUTING_S),
    "spare-too": Kill(hop=1, call=2, moment_s=COMPUTING_S, again_s=0.08),
}
CASES = [("beam", "llama"), ("greedy", "gemma3n_text"), ("padded", "qwen3_next"), ("prompt-lookup", "llama")]


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize(("mode", "family"), CASES)
@pytest.mark.parametrize(
    "settings",
    [{"keep_histories": "first"}, {"history_memory_bytes": 1}, {"keep_histories": "first", "exact_replay": True}],
    ids=["first-only", "on-disk", "first-only-exact"],
)
def test_loss_changes_nothing(settings: dict[str, Any], mode: str, family: str, kill: str) -> None:
    with opened(family, **settings) as stage:
        run = MODES[mode][0]
        expected = run(stage.family.local)
        with stage.killing(KILLS[kill]):
            found = run(stage.model)
        assert stage.stats.failovers >= len(stage.lost) > 0
        assert stage.stats.replayed_tokens > 0
        assert_close(found, expected, 1e-4)
        del found
        stage.check_end()


def test_first_history_alone_costs_a_replay_of_the_hops_before() -> None:
    replayed = {}
    for kept in ("each_hop", "first"):
        with opened("llama", keep_histories=kept) as stage, stage.killing(KILLS["last-hop"]):
            generated(stage.model, tokens_of(1, 5))
            replayed[kept] = stage.stats.replayed_tokens
    assert replayed == {"each_hop": 7, "first": 14}


def test_long_histories_go_to_disk_and_back(caplog: pytest.LogCaptureFixture) -> None:
    """More tokens than a chunk, so that the file is read from in the replay."""
    caplog.set_level(logging.CRITICAL, "remote_modules")  # pytest keeps records, and those the session that failed
    expected = generated(family_of("llama").local, tokens_of(2, 150)).sequences
    with opened("llama", history_memory_bytes=1) as stage:
        with stage.killing(KILLS["last-hop"]):
            output = generated(stage.model, tokens_of(2, 150))
        assert torch.equal(output.sequences, expected)
        assert stage.stats.history_disk_bytes >= 2 * 2 * 150 * 4  # two hops, two rows, floats of some size
        assert stage.stats.history_bytes == 0
        assert stage.stats.replayed_tokens == 152
        del output
        stage.check_end()
        assert stage.stats.history_disk_bytes == 0


def test_int8_histories_rebuild_nearly_the_same() -> None:
    expected = generated(family_of("llama").local, tokens_of(2, 150))
    sizes = {}
    for dtype in ("compute", "int8"):
        with opened("llama", history_dtype=dtype) as stage:
            with stage.killing(KILLS["last-hop"]):
                output = generated(stage.model, tokens_of(2, 150))
            assert stage.stats.failovers == 1
            sizes[dtype] = stage.stats.history_bytes
            worst = max(float((a - b).abs().max()) for a, b in zip(output.scores, expected.scores, strict=True))
            spread = max(float(score.std()) for score in expected.scores)
            assert worst <= (0.05 if dtype == "int8" else 1e-4) * max(spread, 1.0)
    assert sizes["int8"] < 0.3 * sizes["compute"]


def test_replay_in_the_same_steps_is_a_setting() -> None:
    with opened("llama", exact_replay=True) as stage:
        with stage.killing(KILLS["first-hop"]):
            found = MODES["beam"][0](stage.model)
        assert stage.stats.replayed_tokens > 0
        assert_equal(found, MODES["beam"][0](stage.family.local))
