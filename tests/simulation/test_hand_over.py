"""KV caches go from peer to peer: away from one that leaves, to a buddy that takes over, to a fork.

A copied cache goes on as the original would have: everything is equal to the last bit, and nothing is fed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from remote_modules.testing.simulation import SimulatedPeer

from .models import Kill, Stage, opened
from .test_kill_modes import CASES, COMPUTING_S, MODES, UNEVEN, Result, assert_close, assert_equal

PAUSE_S = 3.0  # enough for any copy of these sizes


def leave(peer: SimulatedPeer) -> None:
    assert peer.handler is not None
    peer.handler.start_draining()


LEAVES = {
    "first-hop": Kill(hop=0, call=1, moment_s=0.0, lose=leave),
    "last-hop-computing": Kill(hop=1, call=2, moment_s=COMPUTING_S, lose=leave),
}


@contextmanager
def pausing(stage: Stage, call: int) -> Iterator[None]:
    """The caller thinks for a while before the model's call of that number."""
    calls = 0

    def pause(*_: object) -> None:
        nonlocal calls
        if calls == call:
            stage.swarm.io.run(asyncio.sleep(PAUSE_S))
        calls += 1

    handle = stage.model.get_input_embeddings().register_forward_pre_hook(pause)
    try:
        yield
    finally:
        handle.remove()
    assert calls > call


def check_same(mode: str, family: str, found: Result, expected: Result) -> None:
    if (mode, family) in UNEVEN:
        assert_close(found, expected, UNEVEN[mode, family])
    else:
        assert_equal(found, expected)


def check_left(stage: Stage) -> None:
    """The peer has nothing left of the session, and its client did not fail over."""
    (peer,) = stage.lost
    stage.swarm.kv_bytes()  # waits for what is under way
    assert peer.handler is not None
    assert len(peer.handler.sessions) == 0
    assert peer.kv_bytes == 0
    assert stage.stats.failovers == 0


@pytest.mark.parametrize(("mode", "family", "when"), [(*case, when) for case in CASES for when in LEAVES])
def test_peer_that_leaves_hands_its_cache_over(mode: str, family: str, when: str) -> None:
    with opened(family) as stage:
        run, kill = MODES[mode][0], LEAVES[when]
        expected = run(stage.family.local)
        with stage.killing(kill), pausing(stage, kill.call + 1):
            found = run(stage.model)
        check_same(mode, family, found, expected)
        del found
        check_left(stage)
        assert stage.stats.handed_over_tokens > 0
        assert stage.stats.copied_bytes > 0
        assert stage.stats.replayed_tokens == 0
        stage.check_end()
