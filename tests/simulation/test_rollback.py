"""Taking tokens back from a cache whose state cannot go back: peers compute it anew, and the old session ends."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from remote_modules.client.session import SessionState
from remote_modules.model.adoption import link_of
from remote_modules.model.stack import cache_argument

from .models import Stage, opened

FAMILIES = ("mamba2", "qwen3_next", "zamba2")


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, tokens: torch.Tensor, cache: object = None) -> Any:
    name = cache_argument(model) or ""
    with torch.no_grad():
        return model(tokens, use_cache=True, **({} if cache is None else {name: cache}))


def run_at_once(model: Any, tokens: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Logits of the last tokens, all computed in one portion, as a replay is."""
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=True, logits_to_keep=num_outputs).logits
    return logits


def cache_of(output: Any) -> Any:
    return getattr(output, "past_key_values", None) or output.cache_params


def assert_equal(family: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the last bit where rows do not depend on how many are computed together, as those of experts do."""
    tolerance = 1e-4 if family == "qwen3_next" else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def sessions_of(stage: Stage) -> list[set[str]]:
    """Ids of the sessions on each peer of the route."""
    stage.swarm.kv_bytes()  # waits for what is under way
    handlers = [stage.hop_peer(hop).handler for hop in range(2)]
    return [set(handler.sessions._sessions) for handler in handlers if handler is not None]


def state_of(stage: Stage, cache: Any) -> SessionState:
    link = link_of(cache, stage.swarm.stack.layers_of(stage.layers.blocks))
    assert isinstance(link, SessionState)
    return link


@pytest.mark.parametrize("family", FAMILIES)
def test_rollback_replays_and_ends_the_old_session(family: str) -> None:
    with opened(family) as stage:
        assert not stage.swarm.stack.is_croppable
        first, wrong, right = tokens_of(2, 5), tokens_of(2, 2, seed=1), tokens_of(2, 1, seed=2)
        cache = cache_of(run(stage.model, first))
        run(stage.model, wrong, cache)
        old = sessions_of(stage)
        assert [len(ids) for ids in old] == [1, 1]
        assert stage.stats.replayed_tokens == 0
        state_of(stage, cache).crop(5)
        found = run(stage.model, right, cache)
        assert stage.stats.replayed_tokens == 5 * 2  # once for each hop
        assert stage.stats.failovers == 0
        new = sessions_of(stage)
        assert [len(ids) for ids in new] == [1, 1]
        assert not any(before & after for before, after in zip(old, new, strict=True))
        assert_equal(family, found.logits, run_at_once(stage.family.local, torch.cat([first, right], dim=1), 1))
        del cache, found
        stage.check_end()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(6,), (6, 5), (5, 4, 3)], ids=str)
def test_cache_dropped_after_rollbacks_leaves_nothing_on_peers(family: str, lengths: tuple[int, ...]) -> None:
    with opened(family) as stage:
        cache = cache_of(run(stage.model, tokens_of(2, 7)))
        assert stage.swarm.kv_bytes() > 0
        for length in lengths:
            state_of(stage, cache).crop(length)
        del cache
        stage.check_end()


@pytest.mark.parametrize("family", FAMILIES)
def test_rollbacks_in_a_row_end_the_session_that_is_there(family: str) -> None:
    with opened(family) as stage:
        cache = cache_of(run(stage.model, tokens_of(1, 7)))
        old = sessions_of(stage)
        for length in (6, 4):
            state_of(stage, cache).crop(length)
        found = run(stage.model, tokens_of(1, 2, seed=1), cache)
        new = sessions_of(stage)
        assert [len(ids) for ids in new] == [1, 1]
        assert not any(before & after for before, after in zip(old, new, strict=True))
        tokens = torch.cat([tokens_of(1, 7)[:, :4], tokens_of(1, 2, seed=1)], dim=1)
        assert_equal(family, found.logits, run_at_once(stage.family.local, tokens, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_selected_after_a_rollback_are_selected_once(family: str) -> None:
    with opened(family) as stage:
        tokens, more = tokens_of(2, 7), tokens_of(3, 1, seed=1)
        cache = cache_of(run(stage.model, tokens))
        state_of(stage, cache).crop(6)
        state_of(stage, cache).select(torch.tensor([1, 1, 0]))
        found = run(stage.model, more, cache)
        expected = run_at_once(stage.family.local, torch.cat([tokens[[1, 1, 0], :6], more], dim=1), 1)
        assert_equal(family, found.logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_peer_lost_after_a_rollback_is_replaced(family: str) -> None:
    with opened(family) as stage:
        tokens, more = tokens_of(2, 7), tokens_of(2, 1, seed=1)
        cache = cache_of(run(stage.model, tokens))
        state_of(stage, cache).crop(6)
        peer = stage.hop_peer(1)
        stage.swarm.io.loop.call_later(0.0, peer.crash)
        found = run(stage.model, more, cache)
        assert not peer.is_up
        assert stage.stats.failovers >= 1
        assert_equal(family, found.logits, run_at_once(stage.family.local, torch.cat([tokens[:, :6], more], dim=1), 1))
        del cache, found
        gc.collect()
        stage.check_end()
