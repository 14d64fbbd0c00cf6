"""Peers that answer wrongly, refuse, or lose bits: F10, F11, F16 to F18, F31."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulation import test_slow_peers

from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.errors import PeerUnreachable, RemoteProtocolError
from remote_modules.net import client_connection
from remote_modules.server import handler
from remote_modules.server.sessions import KVBudget
from remote_modules.testing.memory_network import MemoryDialer
from remote_modules.testing.simulation import SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual
from remote_modules.wire import messages
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import Output, encode_message
from remote_modules.wire.protocol import Protocol, Role
from remote_modules.wire.tensors import encode_tensors

from .driving import SPANS, SpoiledEngine, generate, in_use, model, reference, spoiled, swarm_of
from .recorder import FaultLog

Named = dict[str, torch.Tensor]


def changed(outputs: Named, change: Callable[[torch.Tensor], torch.Tensor]) -> Named:
    return {**outputs, "hidden_states": change(outputs["hidden_states"])}


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return put


WRONG: dict[str, Callable[[Named], Named]] = {
    "NaN": lambda outputs: changed(outputs, with_value(float("nan"))),
    "Inf": lambda outputs: changed(outputs, with_value(float("inf"))),
    "another shape": lambda outputs: changed(outputs, lambda tensor: tensor[..., :-1].contiguous()),
    "another dtype": lambda outputs: changed(outputs, lambda tensor: tensor.to(torch.float64)),
    "nothing": lambda outputs: {},
}


async def spoiled_swarm(spoil: Callable[[int, Named], Named]) -> tuple[SimulatedSwarm, Swarm, SpoiledEngine]:
    """A client that knows of a spoiled peer only for the middle span; a good replica of it has just joined."""
    bad = spoiled("3:6", spoil)
    holdings = [model().holdings[span] for span in SPANS]
    swarm = SimulatedSwarm(5, [holdings[0], bad, holdings[2], holdings[1]])
    for peer in swarm.peers[:3]:
        await peer.start()
    client = swarm.client()
    await client.refresh()
    await swarm.peers[3].start()
    assert isinstance(bad.engine, SpoiledEngine)
    return swarm, client, bad.engine


@pytest.mark.fault("F17")
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answer_is_never_used(kind: str, fault: FaultLog) -> None:
    async def run() -> tuple[int, float]:
        swarm, client, engine = await spoiled_swarm(lambda number, outputs: WRONG[kind](outputs))
        done = await generate(swarm, client)
        assert done.tokens == reference()
        bad = swarm.peers[1]
        assert client.stats.failovers >= engine.fired
        assert in_use(swarm, client, 1) is not bad
        await client.aclose()
        swarm.stop()
        return engine.fired, done.stall_s

    fired, stall_s = run_virtual(run())
    fault.record(
        "F17",
        injected=kind,
        fired=fired,
        outcome="tokens identical, peer banned",
        figure=stall_s,
        unit="s",
        at_most=1.0,
        clock="virtual",
    )


@pytest.mark.fault("F11")
def test_peer_that_fails_now_and_then_harms_nobody(fault: FaultLog) -> None:
    rng = Random(3)

    def fail(number: int, outputs: Named) -> Named:
        if rng.random() < 0.05:
            raise RuntimeError("a gray failure")
        return outputs

    async def run() -> tuple[int, int, int]:
        swarm, client, engine = await spoiled_swarm(fail)
        for number in range(5):
            prompt = (3, 4 + number, 5)
            assert (await generate(swarm, client, 24, prompt=prompt)).tokens == reference(24, prompt)
        assert client.stats.failovers >= engine.fired
        calls = engine.calls
        await client.aclose()
        swarm.stop()
        return engine.fired, calls, client.stats.failovers

    fired, calls, failovers = run_virtual(run())
    fault.record(
        "F11",
        injected="5 % of the answers of one of two replicas are errors",
        fired=fired,
        outcome=f"tokens identical in 5 generations; {calls} of 120 steps asked of it",
        figure=failovers / fired,
        unit="failovers for each failure",
        at_most=1.0,
        clock="virtual",
    )


@pytest.mark.fault("F10")
@pytest.mark.parametrize("how", ["latency", "compute"])
def test_slow_peer_costs_little_and_is_not_banned(how: str, fault: FaultLog) -> None:
    lasts_s, best_s = 30.0, 2 * 0.04  # forward and backward: two delays of 10 ms and 20 ms of computing each

    async def run() -> tuple[int, int, int]:
        swarm = await test_slow_peers.started(test_slow_peers.SPANS)
        client = swarm.client()
        for _ in range(10):
            await test_slow_peers.train(client, swarm)
        slow = swarm.peers[0]
        assert slow.handler is not None
        asked_before = sum(slow.handler.num_requests.values())
        if how == "latency":
            slow.host.delay_s *= 10
        else:
            slow.device.compute_s *= 10
        steps, ends_s = 0, swarm.clock() + lasts_s
        while swarm.clock() < ends_s:
            await test_slow_peers.train(client, swarm)
            steps += 1
        asked = sum(slow.handler.num_requests.values()) - asked_before
        assert client.stats.failovers == client.stats.hedges_won
        assert client.router.breakers.is_usable(slow.identity.peer_id, slow.instance_id, now_s=swarm.clock())
        await client.aclose()
        swarm.stop()
        return steps, asked, client.stats.hedges

    steps, asked, hedges = run_virtual(run())
    fault.record(
        "F10",
        injected=f"{how} of one of two peers is 10 times as long for 30 s",
        fired=asked,
        outcome=f"outputs and gradients identical in {steps} training steps; not banned, {hedges} hedges",
        figure=steps * best_s / lasts_s,
        unit="of the best other path",
        at_least=0.7,
        clock="virtual",
    )


@pytest.mark.fault("F10")
@pytest.mark.parametrize("hedge", [True, False], ids=["hedged", "not-hedged"])
def test_request_that_takes_too_long_is_asked_of_another(hedge: bool, fault: FaultLog) -> None:
    took_s = 1.5

    async def run(hop: int) -> float:
        swarm = await test_slow_peers.started(test_slow_peers.PAIRS, ClientConfig(hedge=hedge))
        client = swarm.client()
        generation = test_slow_peers.Generation(client, swarm)
        await generation.steps(6)
        slow = generation.peer(hop)
        slow.device.compute_s = took_s
        stall_s = await generation.step() - test_slow_peers.STEP_S
        assert (client.stats.hedges, client.stats.hedges_won) == ((1, 1) if hedge else (0, 0))
        assert (generation.peer(hop) is slow) is not hedge
        await generation.session.close()
        await client.aclose()
        swarm.stop()
        return stall_s

    fault.record(
        "F10",
        injected=f"a decode step takes a peer {took_s} s; each hop; hedging {'on' if hedge else 'off'}",
        fired=2,
        outcome="tokens identical; " + ("a second peer was asked, and was first" if hedge else "waited for"),
        figure=max(run_virtual(run(hop)) for hop in (0, 1)),
        unit="s",
        at_most=0.5 if hedge else took_s,
        clock="virtual",
    )


@pytest.mark.fault("F16")
def test_no_flipped_bit_is_accepted(fault: FaultLog) -> None:
    rng = Random(0)
    metas, body = encode_tensors({"hidden_states": torch.randn(2, 5, 32)})
    frame = b"".join(bytes(part) for part in encode_frame(encode_message(Output(7, metas, 0.1, 0.2)), body))
    accepted = 0
    for _ in range(10_000):
        end = open_protocol()
        flipped = bytearray(frame)
        flipped[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        try:
            end.receive_data(bytes(flipped))
        except RemoteProtocolError:
            continue
        accepted += len(end.events_received())
    fault.record(
        "F16",
        injected="one random bit of an answer's frame",
        fired=10_000,
        outcome="every frame refused",
        figure=accepted,
        unit="accepted",
        at_most=0,
        clock="virtual",
    )


def open_protocol() -> Protocol:
    """A client's side, hello done."""
    client, server = (Protocol(role, max_body_bytes=1 << 20) for role in (Role.CLIENT, Role.SERVER))
    client.send(messages.ClientHello(messages.VERSION_MAJOR, messages.VERSION_MINOR, bytes(32), 1 << 20))
    server.receive_data(b"".join(client.data_to_send()))
    hello = messages.ServerHello(messages.VERSION_MAJOR, messages.VERSION_MINOR, bytes(32), bytes(64), "first", 1 << 20)
    server.send(hello)
    client.receive_data(b"".join(server.data_to_send()))
    client.events_received()
    return client


class NoteOfRefusals(KVBudget):
    """A budget of 100 bytes that counts how often it was too small."""

    def __init__(self, budget: KVBudget) -> None:
        super().__init__(100, budget._costs)
        self.num_refused = 0

    def resize(self, old_bytes: int, new_bytes: int) -> None:
        self.num_refused += new_bytes > self.total_bytes
        super().resize(old_bytes, new_bytes)


@pytest.mark.fault("F18")
@pytest.mark.parametrize("where", ["budget", "device"])
def test_peer_without_memory_says_so_and_the_client_goes_elsewhere(where: str, fault: FaultLog) -> None:
    def no_memory(number: int, outputs: Named) -> Named:
        if where == "device":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs

    async def run() -> tuple[int, float]:
        swarm, client, engine = await spoiled_swarm(no_memory)
        bad = swarm.peers[1]
        assert bad.handler is not None
        budget = NoteOfRefusals(bad.handler.sessions.budget)
        if where == "budget":
            bad.handler.sessions.budget = budget
        done = await generate(swarm, client)
        assert done.tokens == reference()
        assert bad.kv_bytes == 0
        await client.aclose()
        swarm.stop()
        return budget.num_refused if where == "budget" else engine.fired, done.stall_s

    fired, stall_s = run_virtual(run())
    fault.record(
        "F18",
        injected="KV budget of 100 bytes" if where == "budget" else "the device has no memory while it computes",
        fired=fired,
        outcome="refused as out_of_memory, tokens identical by the other peer",
        figure=stall_s,
        unit="s",
        at_most=0.5,
        clock="virtual",
    )


def speaking(major: int, minor: int) -> Any:
    """`wire.messages` of another version."""
    return SimpleNamespace(**{**vars(messages), "VERSION_MAJOR": major, "VERSION_MINOR": minor})


MAJOR, MINOR = messages.VERSION_MAJOR, messages.VERSION_MINOR
SKEWS = [(MAJOR, MINOR - 1), (MAJOR, MINOR), (MAJOR, MINOR + 1), (MAJOR - 1, 9), (MAJOR + 1, 0)]


@pytest.mark.fault("F31")
@pytest.mark.parametrize("who", ["client", "peer"])
@pytest.mark.parametrize("version", SKEWS, ids=lambda version: ".".join(map(str, version)))
def test_other_version_is_spoken_to_or_refused_naming_both(
    version: tuple[int, int], who: str, fault: FaultLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection if who == "client" else handler, "messages", speaking(*version))

    async def run() -> str:
        swarm = await swarm_of(SPANS)
        client = swarm.client()
        try:
            if version[0] == MAJOR:
                assert (await generate(swarm, client)).tokens == reference()
                return "tokens identical"
            record = swarm.peers[0]._describe()
            with pytest.raises(PeerUnreachable) as caught:
                await MemoryDialer(swarm.network, swarm.config).dial(record)
            text = str(caught.value)
            theirs, ours = ".".join(map(str, version)), f"{MAJOR}.{MINOR}"
            assert f"peer speaks protocol {theirs}, we speak {ours}; update the older side" in text
            return "refused, naming both versions"
        finally:
            await client.aclose()
            swarm.stop()

    outcome = run_virtual(run())
    fault.record(
        "F31",
        injected=f"the {who} speaks {version[0]}.{version[1]}, the other side {MAJOR}.{MINOR}",
        fired=1,
        outcome=outcome,
        figure=0,
        unit="surprises",
        at_most=0,
        clock="virtual",
    )
