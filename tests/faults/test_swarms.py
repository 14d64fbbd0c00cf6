"""What happens to a whole swarm: trackers, clocks, identities, upgrades, load. F24 to F41, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
import torch
from simulation import test_fail_nth_await
from simulation.scenario import blocks_of
from simulation.swarms import SWARMS, run_seed
from simulation.tiny import call_of

from remote_modules.client.passes import forward
from remote_modules.client.swarm import Swarm
from remote_modules.errors import DiscoveryError, PeerError
from remote_modules.plan.leases import CLOCKED_SEQUENCE
from remote_modules.testing.fault_points import FaultPoints
from remote_modules.testing.simulated_tracker import LEASE_S
from remote_modules.testing.simulation import ANNOUNCE_S, SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .devices import QueuedDevice
from .driving import OTHER_CUTS, PROMPT, SPANS, generate, in_use, model, new_session, reference, swarm_of
from .recorder import FaultLog


async def listed(swarm: SimulatedSwarm) -> set[str]:
    return {record.peer_id for record in await swarm.tracker.lookup(None)}


@pytest.mark.fault("F24", "F25")
@pytest.mark.parametrize(("row", "down_s"), [("F24", 2.0), ("F25", 3600.0)], ids=["restart", "an-hour"])
def test_running_generation_needs_no_tracker(row: str, down_s: float, fault: FaultLog) -> None:
    fault.rows = (row,)

    async def run() -> float:
        swarm = await swarm_of(SPANS * 2)
        client = swarm.client()

        async def lose(number: int) -> None:
            if number == 3:
                swarm.tracker.kill()
                with pytest.raises(DiscoveryError):
                    await listed(swarm)
            if number == 6:
                await asyncio.sleep(down_s)
            if number == 7:  # without a tracker, too
                in_use(swarm, client, 1).crash()

        done = await generate(swarm, client, before=lose)
        assert done.tokens == reference()
        assert client.stats.failovers >= 1
        swarm.tracker.restart()
        back_s = swarm.clock()
        alive = {peer.identity.peer_id for peer in swarm.peers if peer.is_up}
        while await listed(swarm) != alive:
            assert swarm.clock() - back_s < 120.0
            await asyncio.sleep(0.1)
        await client.aclose()
        swarm.stop()
        return swarm.clock() - back_s

    fault.record(
        row,
        injected=f"the only tracker down for {down_s:.0f} s, then empty; a peer crashes meanwhile",
        fired=1,
        outcome="tokens identical; all peers listed again",
        figure=run_virtual(run()),
        unit="s",
        at_most=(1 if row == "F24" else 2) * ANNOUNCE_S,
        clock="virtual",
    )


@pytest.mark.fault("F27")
@pytest.mark.parametrize("jump_s", [3600.0, -3600.0], ids=["ahead", "back"])
def test_clock_that_jumps_changes_nothing(jump_s: float, fault: FaultLog) -> None:
    """The wall clock is asked for one thing, the first sequence of a peer. One that restarts with its clock set back
    is not believed before its old lease is over, but those who know its address are served at once."""

    async def run() -> tuple[float, float]:
        swarm = SimulatedSwarm(5, [model().holdings[span] for span in SPANS])
        monotonic = swarm.clock
        swarm.clock = lambda: monotonic() + 2 * CLOCKED_SEQUENCE / 1000
        await swarm.start()
        swarm.clock = monotonic
        client = swarm.client()
        peer = swarm.peers[1]
        back_s: list[float] = []

        async def jump(number: int) -> None:
            if number == 6:
                peer.crash()
                swarm.clock = lambda: monotonic() + 2 * CLOCKED_SEQUENCE / 1000 + jump_s
                await peer.start()
                swarm.clock = monotonic
                back_s.append(monotonic())

        done = await generate(swarm, client, before=jump)
        assert done.tokens == reference()
        while True:
            found = {r.peer_id: r.instance_id for r in await swarm.tracker.lookup(None)}
            if found.get(peer.identity.peer_id) == peer.instance_id:
                break
            assert monotonic() - back_s[0] < 10 * LEASE_S
            await asyncio.sleep(0.1)
        listed_s = monotonic() - back_s[0]
        await client.aclose()
        swarm.stop()
        return done.stall_s, listed_s

    stall_s, listed_s = run_virtual(run())
    for outcome, figure, limit in (
        ("tokens identical; stall", stall_s, 1.0),
        ("listed again", listed_s, LEASE_S + ANNOUNCE_S),
    ):
        fault.record(
            "F27",
            injected=f"restart of the only holder with its clock {jump_s / 3600:+.0f} h",
            fired=1,
            outcome=outcome,
            figure=figure,
            unit="s",
            at_most=limit,
            clock="virtual",
        )


@pytest.mark.fault("F28")
def test_newer_process_of_an_identity_wins(fault: FaultLog, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> float:
        swarm = await swarm_of(SPANS)
        client = swarm.client()
        await generate(swarm, client)
        twin = SimulatedPeer(swarm, model().holdings["3:6"], number=2)
        twin.host = swarm.network.host("10.9.9.9:1")
        await asyncio.sleep(1.0)
        started_s = swarm.clock()
        twin._instances = iter([7])  # type: ignore[assignment]  # another process: another instance
        await twin.start()
        while True:
            (record,) = [r for r in await swarm.tracker.lookup(None) if r.peer_id == twin.identity.peer_id]
            if record.addresses == (twin.host.address,) and swarm.clock() - started_s > 2 * ANNOUNCE_S:
                break
            assert swarm.clock() - started_s < 2 * LEASE_S
            await asyncio.sleep(0.5)
        assert any("duplicate identity" in record.getMessage() for record in caplog.records)
        swarm.peers[1].crash()
        assert (await generate(swarm, client)).tokens == reference()
        ghosts = [r for r in await swarm.tracker.lookup(None) if r.addresses == (swarm.peers[1].host.address,)]
        await client.aclose()
        swarm.stop()
        twin.crash()
        return len(ghosts)

    fault.record(
        "F28",
        injected="a second process with the key of the first",
        fired=1,
        outcome="the newer is listed, the older is told 'duplicate identity'; tokens identical",
        figure=run_virtual(run()),
        unit="ghosts",
        at_most=0,
        clock="virtual",
    )


@pytest.mark.fault("F30")
def test_rolling_restart_under_load_fails_no_request(fault: FaultLog) -> None:
    async def run() -> tuple[int, int, int]:
        swarm = await swarm_of(SPANS * 2)
        clients = [swarm.client() for _ in range(4)]
        done: list[int] = []

        async def work(number: int) -> None:
            prompt = (*PROMPT, number + 1)
            for _ in range(3):
                found = await generate(
                    swarm, clients[number], 20, prompt=prompt, before=lambda step: asyncio.sleep(0.2)
                )
                assert found.tokens == reference(20, prompt)
                done.append(20)

        async def roll() -> None:
            for peer in swarm.peers:
                assert peer.handler is not None
                peer.handler.start_draining()
                await asyncio.sleep(2.0)
                peer.crash()
                await peer.start()
                await asyncio.sleep(1.0)

        await asyncio.gather(roll(), *(work(number) for number in range(4)))
        for client in clients:
            await client.aclose()
        swarm.stop()
        handed_over = sum(client.stats.handed_over_tokens for client in clients)
        return len(swarm.peers), 12 * 20 - sum(done), handed_over

    rolled, failed, handed_over = run_virtual(run())
    assert handed_over > 0
    fault.record(
        "F30",
        injected="drain, end and start of all 6 peers in turn, 4 clients",
        fired=rolled,
        outcome=f"240 tokens of 12 generations identical; caches of {handed_over} tokens handed over",
        figure=failed,
        unit="failed steps",
        at_most=0,
        clock="virtual",
    )


@pytest.mark.fault("F32")
def test_peer_that_moves_its_blocks_changes_no_token(fault: FaultLog) -> None:
    async def run() -> float:
        swarm = await swarm_of((*SPANS, "0:4", "2:7"))
        client = swarm.client()
        for spare in swarm.peers[3:]:
            spare.crash()

        async def move(number: int) -> None:
            if number == 3:
                for spare in swarm.peers[3:]:
                    await spare.start()
                await client.refresh()
            if number == 5:
                mover = swarm.peers[0]
                mover.crash()
                holding = model().holdings[OTHER_CUTS[3]]
                mover.engine, mover._holding = holding.engine, holding
                await mover.start()

        done = await generate(swarm, client, before=move)
        assert done.tokens == reference()
        assert client.stats.failovers >= 1
        await client.aclose()
        swarm.stop()
        return done.stall_s

    fault.record(
        "F32",
        injected="the peer of 0:3 comes back with 5:8 while it is in use",
        fired=1,
        outcome="tokens identical",
        figure=run_virtual(run()),
        unit="s",
        at_most=1.0,
        clock="virtual",
    )


@pytest.mark.fault("F35")
def test_sessions_dropped_in_all_ways_leave_nothing(fault: FaultLog) -> None:
    num_sessions = 120

    async def run() -> int:
        swarm = await swarm_of(SPANS)
        new = model().embed(torch.tensor([list(PROMPT)]))
        for number in range(num_sessions):
            client = swarm.client()
            session = new_session(client)
            step = asyncio.ensure_future(session.step({"hidden_states": new}, call_of(new)))
            if number % 4 == 0:  # given up
                await asyncio.sleep(0.01 * (number % 15))
                step.cancel()
                await asyncio.wait([step])
            else:
                await step
            if number % 4 == 1:  # vanished: connections break, nothing is said
                for connection in client._connections.values():
                    connection.abort()
            elif number % 4 == 2:  # expires: the session is never closed
                continue
            else:
                await session.close()
            await client.aclose()
        await asyncio.sleep(200.0)
        left = sum(peer.kv_bytes + len(peer.handler.sessions) for peer in swarm.peers if peer.handler is not None)
        swarm.stop()
        return left

    fault.record(
        "F35",
        injected="sessions given up, vanished, never closed, closed",
        fired=num_sessions,
        outcome="no session and no KV byte at any peer; the rest: benchmarks/leaks.py",
        figure=run_virtual(run()),
        unit="left",
        at_most=0,
        clock="virtual",
    )


COMPUTE_S = 0.2
LASTS_S = 20.0


async def goodput(loads: dict[str, int]) -> tuple[dict[str, int], int]:
    """Answers of each client in `LASTS_S`, each with so many requests under way; and how many were refused."""
    swarm = await swarm_of(("0:8",))
    (peer,) = swarm.peers
    assert peer.handler is not None
    device = QueuedDevice(compute_s=COMPUTE_S, max_queue=16)
    peer.handler.executor = device
    inputs = {"hidden_states": model().embed(torch.tensor([list(PROMPT)]))}
    call = call_of(inputs["hidden_states"])
    answers = dict.fromkeys(loads, 0)
    ends_s = swarm.clock() + LASTS_S

    async def ask(name: str, client: Swarm) -> None:
        while swarm.clock() < ends_s:
            try:
                await forward(client, blocks_of(model()), inputs, call)
            except PeerError:
                continue
            answers[name] += swarm.clock() < ends_s

    clients = {name: swarm.client() for name in loads}
    await asyncio.gather(*(ask(name, clients[name]) for name, count in loads.items() for _ in range(count)))
    for client in clients.values():
        await client.aclose()
    swarm.stop()
    return answers, device.num_refused


@pytest.mark.fault("F38")
def test_overload_is_shared_fairly_and_costs_no_throughput(fault: FaultLog) -> None:
    peak, _ = run_virtual(goodput({"a": 6, "b": 6}))
    found, refused = run_virtual(goodput({"greedy": 40, "modest": 6}))
    outcome = (
        f"refused {refused} times; answers: {found['greedy']} to the greedy client, {found['modest']} to the other"
    )
    fault.record(
        "F38",
        injected="46 requests under way, queue of 16; one client has 40 of them",
        fired=refused,
        outcome=outcome,
        figure=sum(found.values()) / sum(peak.values()),
        unit="of the peak",
        at_least=0.9,
        clock="virtual",
    )
    fault.record(
        "F38",
        injected="the same: share of the client that has 6 of 46",
        fired=refused,
        outcome=outcome,
        figure=found["modest"] / sum(found.values()),
        unit="of the answers",
        at_least=0.4,
        clock="virtual",
    )


@pytest.mark.fault("F41")
def test_random_schedules_of_faults_change_nothing(fault: FaultLog) -> None:
    reports = [run_seed(name, seed) for name in SWARMS for seed in range(2)]
    fault.record(
        "F41",
        injected="random faults of peers, links and tracker; 10 seeds here, 2,000 in tests/simulation",
        fired=sum(len(report.faults) for report in reports),
        outcome="tokens and gradients identical, memory returned, passes ended by their deadline",
        figure=sum(len(report.violations) for report in reports),
        unit="violations",
        at_most=0,
        clock="virtual",
    )


@pytest.mark.fault("F42")
@pytest.mark.parametrize("name", test_fail_nth_await.WORK)
def test_points_fail_one_by_one_and_change_nothing(name: str, fault: FaultLog) -> None:
    """Every tenth failure; all of them, and every wait cancelled, in tests/simulation."""
    expected, counted, _ = test_fail_nth_await.undisturbed(name)
    cases = list(counted.cases())
    fired, wrong, errors = 0, 0, 0
    for number, way in cases[::10]:
        points, failing = FaultPoints({number: way}), test_fail_nth_await.Failing()
        found = run_virtual(test_fail_nth_await.run(name, points, failing))
        assert len(points.fired) == 1
        assert len(failing.errors) <= 1
        fired += len(points.fired)
        errors += len(failing.errors)
        wrong += not torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    fault.record(
        "F42",
        injected=f"{name}: {fired} of the {len(cases)} failures of {len(counted.seen)} points, one in each run",
        fired=fired,
        outcome=f"result identical, memory returned; {errors} runs told one typed error",
        figure=wrong,
        unit="other results",
        at_most=0,
        clock="virtual",
    )
