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
from .test_kill_modes import (
    CASES,
    COMPUTING_S,
    MODES,
    ROUNDING,
    SAME_STEPS,
    UNEVEN,
    Result,
    assert_close,
    assert_equal,
    generated,
    result_of,
    tokens_of,
)

NOT_COPIED = ("deepseek_v4",)  # its caches hold lists: they are built by replay
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
        if family in NOT_COPIED:
            assert_close(found, expected, 1e-4)
            assert stage.stats.replayed_tokens > 0
            return
        check_same(mode, family, found, expected)
        del found
        check_left(stage)
        assert stage.stats.handed_over_tokens > 0
        assert stage.stats.copied_bytes > 0
        assert stage.stats.replayed_tokens == 0
        stage.check_end()


FORKED = [family for mode, family in CASES if mode == "greedy" and family not in NOT_COPIED] + ["llama", "qwen3_next"]


@pytest.mark.parametrize("family", FORKED)
def test_fork_goes_on_as_a_fork_of_the_local_cache(family: str) -> None:
    with opened(family) as stage:
        found, expected = MODES["forked"][0](stage.model), MODES["forked"][0](stage.family.local)
        assert_equal(found, expected)
        assert stage.stats.forks == 4  # two, at two hops each
        assert stage.stats.replayed_tokens == 0
        del found
        stage.check_end()


CRASH = {"first-hop": Kill(hop=0, call=3, moment_s=0.0), "last-hop": Kill(hop=1, call=3, moment_s=COMPUTING_S)}
# A step cannot be made again once a rollback or a beam took rows that it computed together with others.
MADE_AGAIN = [(mode, family) for mode, family in CASES if (mode, family) in SAME_STEPS and family not in NOT_COPIED]
MADE_AGAIN = [case for case in MADE_AGAIN if case[0] != "forked"]  # a fork that is just made has no buddy yet


@pytest.mark.parametrize(
    ("mode", "family", "when"), [(*case, list(CRASH)[number % 2]) for number, case in enumerate(CASES)]
)
def test_buddy_takes_over_when_a_peer_is_lost(mode: str, family: str, when: str) -> None:
    with opened(family, replicate_kv=True, replicate_tokens=1) as stage:
        run, kill = MODES[mode][0], CRASH[when]
        expected = run(stage.family.local)
        with stage.killing(kill), pausing(stage, 2), pausing(stage, 3):
            found = run(stage.model)
        if (mode, family) in MADE_AGAIN:
            assert_equal(found, expected)
        else:
            assert_close(found, expected, ROUNDING.get(family, 1e-4))
        if mode == "forked":
            assert 1 <= stage.stats.promotions <= stage.stats.failovers
        elif family not in NOT_COPIED:
            assert stage.stats.failovers == stage.stats.promotions == 1
            assert stage.stats.replayed_tokens <= 8  # those since the buddy was last brought up to date
        del found
        stage.check_end()


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_session_moves_to_a_peer_that_is_clearly_faster(family: str) -> None:
    """The others come later; nothing fails, and the cache goes along."""
    length = {"max_new_tokens": 40, "min_new_tokens": 40}
    with opened(family, hedge=False) as stage:
        slow, late = stage.swarm.peers[:2], stage.swarm.peers[2:]
        for peer in slow:
            peer.device.compute_s = 0.2

        async def crash() -> None:
            for peer in late:
                peer.crash()
            await asyncio.sleep(60.0)  # their leases end

        async def return_later() -> None:
            for peer in late:
                await peer.start()
            await asyncio.sleep(6.0)
            await stage.layers._handle.swarm.refresh()

        def join(*_: object) -> None:
            if stage.stats.steps == 3:
                stage.swarm.io.run(return_later())

        stage.swarm.io.run(crash())
        handle = stage.model.get_input_embeddings().register_forward_pre_hook(join)
        found = generated(stage.model, tokens_of(2, 5), **length)
        handle.remove()
        assert_equal(result_of(found), result_of(generated(stage.family.local, tokens_of(2, 5), **length)))
        assert {hop.peer_id for hop in stage.stats.route} == {peer.identity.peer_id for peer in late}
        assert stage.stats.failovers == 0
        assert stage.stats.replayed_tokens == 0
        assert stage.stats.handed_over_tokens > 0
        del found
        stage.check_end()
