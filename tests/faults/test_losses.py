"""Peers that die or hang, in every way to use a model: F01 to F09, in virtual time."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from simulation.models import HOP_S, Kill, opened
from simulation.oracle import local_blocks
from simulation.scenario import blocks_of
from simulation.test_kill_modes import (
    COMPUTING_S,
    MODES,
    ROUNDING,
    assert_close,
    trained,
)
from simulation.tiny import call_of

from remote_modules.client.passes import backward, forward
from remote_modules.errors import SpanUnavailable
from remote_modules.testing.simulation import SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .driving import PROMPT, SPANS, gap_s, generate, in_use, model, new_session, others, reference, swarm_of, watching
from .recorder import FaultLog

PREFILL_S = len(SPANS) * HOP_S


@pytest.mark.fault("F01")
def test_killed_peer_changes_no_token(fault: FaultLog) -> None:
    async def run(hop: int, step: int) -> tuple[float, int]:
        swarm = await swarm_of(SPANS * 2)
        client = swarm.client()
        lost: list[SimulatedPeer] = []

        def kill(number: int) -> None:
            if number == step:
                peer = in_use(swarm, client, hop)
                lost.append(peer)
                asyncio.get_running_loop().call_later(hop * HOP_S + COMPUTING_S, peer.crash)

        done = await generate(swarm, client, before=kill)
        assert done.tokens == reference()
        assert client.stats.failovers >= len(lost) == 1
        await client.aclose()
        swarm.stop()
        return done.stall_s, client.stats.failovers

    results = [run_virtual(run(hop, step)) for hop in range(len(SPANS)) for step in (1, 6, 11)]
    fault.record(
        "F01",
        injected="crash while it computes; each hop, decode steps 1, 6, 11",
        fired=len(results),
        outcome="tokens identical",
        figure=max(stall_s for stall_s, _ in results),
        unit="s",
        at_most=1.0 + 1.5 * PREFILL_S,
        clock="virtual",
    )


SAMPLE = [
    ("greedy", "mixtral", "prefill", Kill(hop=1, call=1, moment_s=0.0)),
    ("beam", "llama", "beam reorder", Kill(hop=1, call=3, moment_s=COMPUTING_S)),
    ("padded", "llama", "ragged batch", Kill(hop=0, call=2, moment_s=COMPUTING_S)),
    ("own-masks", "llama", "masks of the caller", Kill(hop=1, call=3, moment_s=COMPUTING_S)),
    ("greedy", "gemma3n_text", "side inputs", Kill(hop=1, call=3, moment_s=COMPUTING_S)),
    ("beam", "mamba2", "states of linear attention", Kill(hop=0, call=2, moment_s=COMPUTING_S)),
]


@pytest.mark.fault("F01")
@pytest.mark.parametrize(("mode", "family", "name", "kill"), SAMPLE, ids=[name for _, _, name, _ in SAMPLE])
def test_killed_peer_changes_no_result_of_a_mode(
    mode: str, family: str, name: str, kill: Kill, fault: FaultLog
) -> None:
    with opened(family) as stage:
        run = MODES[mode][0]
        expected = run(stage.family.local)
        with stage.killing(kill), watching(stage.model, stage.swarm.io.loop.time) as times:
            found = run(stage.model)
        assert stage.stats.failovers >= len(stage.lost) == 1
        assert torch.equal(found[0], expected[0])
        assert_close(found, expected, ROUNDING.get(family, 1e-4))
        del found
        stage.check_end()
        fault.record(
            "F01",
            injected=f"crash, {name} ({family})",
            fired=len(stage.lost),
            outcome="tokens identical, scores within 1e-4",
            figure=gap_s(times),
            unit="s",
            at_most=1.0 + 1.5 * 2 * HOP_S,
            clock="virtual",
        )


@pytest.mark.fault("F02")
def test_three_of_six_peers_killed_change_no_token(fault: FaultLog) -> None:
    async def run(seed: int) -> float:
        rng = Random(seed)
        swarm = await swarm_of(SPANS * 2, seed=seed)
        client = swarm.client()
        victims = [swarm.peers[hop + rng.choice((0, 3))] for hop in range(3)]
        at_s = [rng.uniform(0.2, 3.5) for _ in victims]
        for peer, when_s in zip(victims, at_s, strict=True):
            asyncio.get_running_loop().call_later(when_s, peer.crash)
        done = await generate(swarm, client, 30)
        assert done.tokens == reference(30)
        assert not any(peer.is_up for peer in victims)
        await client.aclose()
        swarm.stop()
        return done.stall_s

    stalls = [run_virtual(run(seed)) for seed in range(10)]
    fault.record(
        "F02",
        injected="crash of one replica of each span at random times, 10 runs of 30 tokens",
        fired=3 * len(stalls),
        outcome="tokens identical in 10 of 10 runs",
        figure=sorted(stalls)[int(0.95 * len(stalls))],
        unit="s",
        at_most=2.0,
        clock="virtual",
    )


@pytest.mark.fault("F03")
def test_replacement_killed_during_the_replay_changes_no_token(fault: FaultLog) -> None:
    with opened("llama") as stage:
        kill = Kill(hop=0, call=4, moment_s=COMPUTING_S, again_s=2 * HOP_S)
        run = MODES["greedy"][0]
        with stage.killing(kill), watching(stage.model, stage.swarm.io.loop.time) as times:
            found = run(stage.model)
        assert len(stage.lost) == 2
        assert stage.stats.failovers >= 2
        assert_close(found, run(stage.family.local), 1e-4)
        del found
        stage.check_end()
        fault.record(
            "F03",
            injected="crash, and crash of the replacement while it is fed the history",
            fired=len(stage.lost),
            outcome="tokens identical",
            figure=gap_s(times),
            unit="s",
            at_most=2.0,
            clock="virtual",
        )


@pytest.mark.fault("F01", "F32")
@pytest.mark.parametrize(
    ("spans", "cuts"),
    [(SPANS, ("0:4", "2:7", "5:8")), (("0:8",), SPANS), (SPANS, ("0:8",))],
    ids=["longer-clipped", "one-to-three", "three-to-one"],
)
def test_replacement_with_other_cuts_changes_no_token(
    spans: tuple[str, ...], cuts: tuple[str, ...], fault: FaultLog
) -> None:
    """The span's peers are killed one after the other, until others hold all blocks, cut elsewhere."""

    async def run() -> tuple[float, int]:
        swarm = await swarm_of((*spans, *cuts))
        client = swarm.client()
        for peer in swarm.peers[len(spans) :]:
            peer.crash()
        lost: list[SimulatedPeer] = []

        async def lose(number: int) -> None:
            if number == 3:
                for peer in swarm.peers[len(spans) :]:
                    await peer.start()
            if number in (4, 6, 8) and len(lost) < len(spans):
                peer = swarm.peers[len(lost)]
                lost.append(peer)
                peer.crash()

        done = await generate(swarm, client, before=lose)
        assert done.tokens == reference()
        assert len(lost) == len(spans)
        await client.aclose()
        swarm.stop()
        return done.stall_s, len(lost)

    stall_s, fired = run_virtual(run())
    for row in fault.rows:
        fault.record(
            row,
            injected=f"peers of {' '.join(spans)} lost, {' '.join(cuts)} take over",
            fired=fired,
            outcome="tokens identical",
            figure=stall_s,
            unit="s",
            at_most=1.0 + 1.5 * PREFILL_S,
            clock="virtual",
        )


@pytest.mark.fault("F01")
def test_same_peer_restarted_changes_no_token(fault: FaultLog) -> None:
    async def run() -> float:
        swarm = await swarm_of(SPANS)
        client = swarm.client()

        async def restart(number: int) -> None:
            if number == 5:
                swarm.peers[1].crash()
                await swarm.peers[1].start()

        done = await generate(swarm, client, before=restart)
        assert done.tokens == reference()
        assert client.stats.replayed_tokens > 0
        await client.aclose()
        swarm.stop()
        return done.stall_s

    fault.record(
        "F01",
        injected="crash and restart of the only holder",
        fired=1,
        outcome="tokens identical",
        figure=run_virtual(run()),
        unit="s",
        at_most=1.0 + 1.5 * PREFILL_S,
        clock="virtual",
    )


@pytest.mark.fault("F04")
@pytest.mark.parametrize("returns", [True, False], ids=["returns", "stays-away"])
def test_all_replicas_gone_are_waited_for(returns: bool, fault: FaultLog, caplog: pytest.LogCaptureFixture) -> None:
    away_s = 20.0
    caplog.set_level(logging.WARNING, "remote_modules.client")

    async def run() -> float:
        swarm = await swarm_of(SPANS * 2)
        client = swarm.client()
        loop = asyncio.get_running_loop()
        back: list[asyncio.Task[None]] = []
        waited_for: list[str] = []

        def lose(number: int) -> None:
            if number == 5:
                for peer in swarm.peers[1::3]:
                    peer.crash()
                loop.call_later(away_s / 2, lambda: waited_for.extend(map(str, client.stats.waiting_for)))
                if returns:
                    loop.call_later(away_s, lambda: back.append(loop.create_task(swarm.peers[1].start())))

        try:
            if returns:
                done = await generate(swarm, client, before=lose)
                assert done.tokens == reference()
                assert back
                assert waited_for == ["3:6"]
                assert client.stats.waiting_for == ()
                return done.stall_s - away_s
            began_s = swarm.clock()
            with pytest.raises(SpanUnavailable) as caught:
                await generate(swarm, client, before=lose)
            assert [str(span) for span in caught.value.missing] == waited_for == ["3:6"]
            return swarm.clock() - began_s
        finally:
            await client.aclose()
            swarm.stop()

    figure = run_virtual(run())
    events = [record for record in caplog.records if "no route, waiting" in record.getMessage()]
    assert len(events) >= 3
    fault.record(
        "F04",
        injected="crash of both replicas; one back after 20 s" if returns else "crash of both replicas for good",
        fired=2,
        outcome=f"{'identical' if returns else 'SpanUnavailable naming 3:6'}; stats().waiting_for names 3:6 meanwhile, "
        f"{len(events)} events",
        figure=figure,
        unit="s",
        at_most=2.5 if returns else 122.0,
        clock="virtual",
    )


@pytest.mark.fault("F05")
def test_lost_answer_is_never_a_step_done_twice(fault: FaultLog) -> None:
    """The connections break while the answer is under way: the peer has done the step, the client cannot know."""

    async def run(hop: int) -> int:
        swarm = await swarm_of(SPANS)
        client = swarm.client()
        most_tokens: list[int] = []

        def strike(number: int) -> None:
            peer = swarm.peers[hop]
            if number == 5:
                asyncio.get_running_loop().call_later(hop * HOP_S + 0.035, peer.host.reset)
            if peer.handler is not None:
                most_tokens.extend(
                    session.cache.length - (len(PROMPT) + number - 1)
                    for session in peer.handler.sessions._sessions.values()
                    if number
                )

        done = await generate(swarm, client, before=strike)
        assert done.tokens == reference()
        await client.aclose()
        swarm.stop()
        return max(most_tokens)

    fault.record(
        "F05",
        injected="reset while the answer is under way; each hop",
        fired=len(SPANS),
        outcome="tokens identical",
        figure=max(run_virtual(run(hop)) for hop in range(len(SPANS))),
        unit="tokens too many in a cache",
        at_most=0,
        clock="virtual",
    )


@pytest.mark.fault("F07")
@pytest.mark.parametrize("mode", ["assisted", "prompt-lookup"])
def test_peer_killed_after_a_rollback_changes_no_token(mode: str, fault: FaultLog) -> None:
    with opened("llama") as stage:
        run = MODES[mode][0]
        expected = run(stage.family.local)
        kill = Kill(hop=1, call=2, moment_s=COMPUTING_S)
        with stage.killing(kill), watching(stage.model, stage.swarm.io.loop.time) as times:
            found = run(stage.model)
        assert torch.equal(found[0], expected[0])
        assert_close(found, expected, 1e-4)
        del found
        stage.check_end()
        fault.record(
            "F07",
            injected=f"crash, {mode} decoding",
            fired=len(stage.lost),
            outcome="tokens identical",
            figure=gap_s(times),
            unit="s",
            at_most=1.0 + 1.5 * 2 * HOP_S,
            clock="virtual",
        )


async def crash_of_who_computes(swarm: SimulatedSwarm, span: str) -> SimulatedPeer:
    """Wait until a peer of ``span`` computes, and crash it."""
    while True:
        for peer in swarm.peers:
            if peer.device.load and str(peer.span) == span:
                peer.crash()
                return peer
        await asyncio.sleep(0.005)


@pytest.mark.fault("F08")
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_peer_killed_in_training_changes_no_gradient(when: str, fault: FaultLog) -> None:
    inputs = model().embed(torch.tensor([[4, 8, 15, 16], [23, 42, 7, 1]]))
    leaf = inputs.clone().requires_grad_()
    expected = local_blocks(model(), leaf, call_of(inputs))
    (expected_grad,) = torch.autograd.grad(expected, leaf, torch.ones_like(inputs))

    async def run(hop: int) -> float:
        swarm = await swarm_of(SPANS * 2)
        client = swarm.client()
        call, named = call_of(inputs), {"hidden_states": inputs}
        await forward(client, blocks_of(model()), named, call)  # meets the peers
        losing: list[asyncio.Task[SimulatedPeer]] = []
        if when == "forward":
            losing.append(asyncio.ensure_future(crash_of_who_computes(swarm, SPANS[hop])))
        outputs, _, segments = await forward(client, blocks_of(model()), named, call)
        if when == "backward":
            losing.append(asyncio.ensure_future(crash_of_who_computes(swarm, SPANS[hop])))
        grads, _ = await backward(client, segments, {"hidden_states": torch.ones_like(inputs)})
        assert not (await losing[0]).is_up
        assert client.stats.failovers == 1
        assert torch.equal(outputs["hidden_states"], expected)
        await client.aclose()
        swarm.stop()
        return float((grads["hidden_states"] - expected_grad).abs().max() / expected_grad.abs().max())

    fault.record(
        "F08",
        injected=f"crash in {when}; each hop",
        fired=len(SPANS),
        outcome="output and gradient equal",
        figure=max(run_virtual(run(hop)) for hop in range(len(SPANS))),
        unit="relative difference",
        at_most=1e-5,
        clock="virtual",
    )


NUM_TRAINING_STEPS = 12


def loss_curve(subject: Any, between: Callable[[int], tuple[Callable[[], None], Callable[[], None]]]) -> list[float]:
    """Losses while the head is trained; ``between`` gives what is called before and after each forward."""
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    head = subject.get_output_embeddings().weight
    losses = []
    for number in range(NUM_TRAINING_STEPS):
        before, after = between(number)
        before()
        loss, *_ = trained(subject, tokens, after)
        losses.append(float(loss))
        with torch.no_grad():
            head -= 0.05 * head.grad
    return losses


@pytest.mark.fault("F08")
def test_loss_curve_with_killed_peers_is_the_local_one(fault: FaultLog) -> None:
    """A peer is lost in the forward or backward of every third step."""

    def nothing() -> None:
        """Happens."""

    with opened("llama") as stage:

        def lose() -> None:
            for peer in stage.swarm.peers:
                if not peer.is_up:
                    stage.swarm.io.run(peer.start())
            peer = stage.hop_peer(len(stage.lost) % 2)
            stage.lost.append(peer)
            stage.swarm.io.loop.call_soon(peer.crash)

        trained(stage.model, torch.tensor([[5, 6, 7]]), nothing)  # meets the peers
        stage.model.zero_grad()
        found = loss_curve(
            stage.model,
            lambda number: (nothing, nothing) if number % 3 else ((lose, nothing) if number % 2 else (nothing, lose)),
        )
        expected = loss_curve(copy.deepcopy(stage.family.local), lambda number: (nothing, nothing))
        assert stage.stats.failovers >= 2
        assert found[-1] < found[0]
        fault.record(
            "F08",
            injected=f"crash in every third of {NUM_TRAINING_STEPS} training steps",
            fired=len(stage.lost),
            outcome=f"loss {found[0]:.3f} to {found[-1]:.3f}, as the local one",
            figure=max(abs(a - b) for a, b in zip(found, expected, strict=True)),
            unit="difference of losses",
            at_most=1e-4,
            clock="virtual",
        )


@pytest.mark.fault("F09")
def test_frozen_peer_is_left_and_serves_again(fault: FaultLog) -> None:
    async def run(hop: int) -> float:
        swarm = await swarm_of(SPANS * 2)
        client = swarm.client()
        frozen: list[SimulatedPeer] = []

        def freeze(number: int) -> None:
            if number == 5:
                frozen.append(in_use(swarm, client, hop))
                asyncio.get_running_loop().call_later(hop * HOP_S + COMPUTING_S, frozen[0].freeze)

        done = await generate(swarm, client, before=freeze)
        assert done.tokens == reference()
        await asyncio.sleep(60.0)
        frozen[0].thaw()  # its late answer goes on its way
        await asyncio.sleep(12.0)  # an announce interval
        for other in others(swarm, frozen[0]):
            other.crash()
        again = await generate(swarm, client)
        assert again.tokens == reference()
        assert in_use(swarm, client, hop) is frozen[0]
        await client.aclose()
        swarm.stop()
        return done.stall_s

    fault.record(
        "F09",
        injected="frozen for 60 s while it computes; each hop",
        fired=len(SPANS),
        outcome="tokens identical; the thawed peer serves the next generation",
        figure=max(run_virtual(run(hop)) for hop in range(len(SPANS))),
        unit="s",
        at_most=3.5,
        clock="virtual",
    )


@pytest.mark.fault("F33")
def test_given_up_request_gives_the_memory_back(fault: FaultLog) -> None:
    async def run(hop: int) -> float:
        swarm = await swarm_of(SPANS)
        client = swarm.client()
        session = new_session(client)
        new = model().embed(torch.tensor([list(PROMPT)]))
        await session.step({"hidden_states": new}, call_of(new))
        one = model().embed(torch.tensor([[7]]))
        step = asyncio.ensure_future(session.step({"hidden_states": one}, call_of(one)))
        await asyncio.sleep(hop * HOP_S + COMPUTING_S)
        step.cancel()
        cancelled_s = swarm.clock()
        with pytest.raises(asyncio.CancelledError):
            await step
        await session.close()
        while any(peer.kv_bytes for peer in swarm.peers):
            assert swarm.clock() - cancelled_s < 60.0
            await asyncio.sleep(0.01)
        await client.aclose()
        swarm.stop()
        return swarm.clock() - cancelled_s

    fault.record(
        "F33",
        injected="step cancelled while a peer computes it; each hop",
        fired=len(SPANS),
        outcome="KV memory of all peers back to 0",
        figure=max(run_virtual(run(hop)) for hop in range(len(SPANS))),
        unit="s",
        at_most=2.0,
        clock="virtual",
    )


@pytest.mark.fault("F34")
def test_vanished_client_leaves_nothing_after_the_lease(fault: FaultLog) -> None:
    num_sessions = 60

    async def run() -> float:
        swarm = await swarm_of(SPANS)
        client = swarm.client()
        new = model().embed(torch.tensor([list(PROMPT)]))
        sessions = [new_session(client) for _ in range(num_sessions)]
        for session in sessions:
            await session.step({"hidden_states": new}, call_of(new))
        assert all(peer.kv_bytes for peer in swarm.peers)
        for peer in swarm.peers:  # power cut: nothing is said, nothing arrives
            peer.host.stall()
        gone_s = swarm.clock()
        while any(peer.kv_bytes for peer in swarm.peers):
            assert swarm.clock() - gone_s < 600.0
            await asyncio.sleep(0.5)
        assert not any(len(peer.handler.sessions) for peer in swarm.peers if peer.handler is not None)
        freed_s = swarm.clock() - gone_s
        await client.aclose()
        swarm.stop()
        return freed_s

    fault.record(
        "F34",
        injected=f"client with {num_sessions} sessions gone without a word",
        fired=num_sessions,
        outcome="KV memory and sessions of all peers back to 0",
        figure=run_virtual(run()),
        unit="s",
        at_most=60.0,
        clock="virtual",
    )
