"""Links that are cut, break, or end nowhere: F12 to F16."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from swarm.conftest import generate as generate_with
from swarm.conftest import poll, prompt, with_blocks
from swarm.test_faulty_link import IMPATIENT, AtStep, link_to
from transformers import LogitsProcessorList, PreTrainedModel

from remote_modules import RemoteSequential
from remote_modules.net.connection import IDLE_CHECK_S, IDLE_DEAD_S
from remote_modules.testing import FaultyLink, LocalSwarm
from remote_modules.testing.faulty_link import Fault
from remote_modules.testing.memory_network import CLIENT
from remote_modules.testing.simulation import SimulatedPeer
from remote_modules.testing.virtual_time import run_virtual
from remote_modules.wire.protocol import Role

from .driving import SPANS, gap_s, generate, in_use, reference, swarm_of, watching
from .recorder import FaultLog


def cut_both(peer: SimulatedPeer) -> None:
    """Nothing arrives, nobody is told."""
    peer.host.stall()


def cut_one_way(peer: SimulatedPeer, role: Role) -> None:
    """What this side of each connection sends arrives no more, and nobody is told."""
    sides = [CLIENT], [peer.host.address]
    peer._swarm.network.partition(*(sides if role is Role.CLIENT else sides[::-1]), is_one_way=True)


CUTS: dict[str, tuple[str, Callable[[SimulatedPeer], None]]] = {
    "both ways": ("F12", cut_both),
    "from the peer only": ("F13", lambda peer: cut_one_way(peer, Role.SERVER)),
    "to the peer only": ("F13", lambda peer: cut_one_way(peer, Role.CLIENT)),
}


@pytest.mark.fault("F12", "F13")
@pytest.mark.parametrize("cut", CUTS)
def test_partition_is_noticed_by_both_sides(cut: str, fault: FaultLog) -> None:
    row, part = CUTS[cut]
    fault.rows = (row,)

    async def run(hop: int) -> tuple[float, float]:
        swarm = await swarm_of(SPANS * 2)
        client = swarm.client()
        parted: list[tuple[SimulatedPeer, float]] = []

        def strike(number: int) -> None:
            if number == 5:
                parted.append((in_use(swarm, client, hop), swarm.clock()))
                part(parted[0][0])

        done = await generate(swarm, client, before=strike)
        assert done.tokens == reference()
        assert client.stats.failovers >= 1
        ((peer, since_s),) = parted
        while peer.kv_bytes:
            assert swarm.clock() - since_s < 600.0
            await asyncio.sleep(0.5)
        freed_s = swarm.clock() - since_s
        await client.aclose()
        swarm.stop()
        return done.stall_s, freed_s

    results = [run_virtual(run(hop)) for hop in range(len(SPANS))]
    for outcome, figure, limit in (
        ("tokens identical; stall", max(stall_s for stall_s, _ in results), 3.5),
        ("KV memory of the peer back", max(freed_s for _, freed_s in results), 60.0),
    ):
        fault.record(
            row,
            injected=f"packets of one peer dropped {cut}; each hop",
            fired=len(results),
            outcome=outcome,
            figure=figure,
            unit="s",
            at_most=limit,
            clock="virtual",
        )


@pytest.mark.fault("F14")
def test_connections_to_hosts_that_are_gone_are_closed(fault: FaultLog) -> None:
    num_connections = 1000

    async def run() -> float:
        swarm = await swarm_of(SPANS)
        swarm.peers[0].handler._limits = type(swarm.peers[0].handler._limits)(  # type: ignore[union-attr]
            max_batch_tokens=4096, max_body_bytes=1 << 20, max_connections=num_connections
        )
        handler = swarm.peers[0].handler
        assert handler is not None
        dialer = swarm.client()._dialer
        record = swarm.peers[0]._describe()
        connections = [await dialer.dial(record) for _ in range(num_connections)]
        assert handler.num_connections == num_connections
        swarm.peers[0].host.stall()
        gone_s = swarm.clock()
        for connection in connections:
            await asyncio.wait_for(connection.closed.wait(), 120.0)
        while handler.num_connections:
            assert swarm.clock() - gone_s < 120.0
            await asyncio.sleep(0.1)
        swarm.stop()
        return swarm.clock() - gone_s

    fault.record(
        "F14",
        injected="power cut at the other end of idle connections",
        fired=num_connections,
        outcome="all closed on both sides, 0 left",
        figure=run_virtual(run()),
        unit="s",
        at_most=IDLE_DEAD_S + 2 * IDLE_CHECK_S,
        clock="virtual",
    )


@pytest.fixture(scope="module")
def linked(checkpoint: Path) -> Iterator[LocalSwarm]:
    """Two peers for each span, each behind a link of its own."""
    with LocalSwarm(checkpoint, spans=["0:4", "0:4", "4:8", "4:8"], links=True) as swarm:
        yield swarm


@pytest.fixture
def remote(linked: LocalSwarm, checkpoint: Path) -> Iterator[RemoteSequential]:
    layers = RemoteSequential.from_swarm(checkpoint, trackers=linked.trackers, mdns=False, config=IMPATIENT)
    yield layers
    layers.close()
    for peer in linked.peers:
        assert peer.link is not None
        peer.link.clear()


@pytest.mark.fault("F14")
def test_sockets_of_both_sides_give_up_on_a_dead_host(
    linked: LocalSwarm, remote: RemoteSequential, local: PreTrainedModel, fault: FaultLog
) -> None:
    """What the kernel is told: to give up on unacknowledged bytes after 10 s, and to probe a silent host."""
    generate_with(with_blocks(local, remote), prompt(), 2)
    ours = list(remote._handle.swarm._connections.values())
    handlers = [peer._server._peer._handler for peer in linked.peers]  # type: ignore[attr-defined]
    theirs = [served.connection for handler in handlers for served in handler._served.values()]
    assert ours
    assert theirs
    longest_s = 0.0
    for connection in (*ours, *theirs):
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle_s, interval_s, probes = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        unacknowledged_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
        assert 0 < unacknowledged_s <= 10
        longest_s = max(longest_s, idle_s + interval_s * probes)
    fault.record(
        "F14",
        injected="options of the sockets read back, both sides",
        fired=len(ours) + len(theirs),
        outcome="kernel gives up on a silent host",
        figure=longest_s,
        unit="seconds set",
        at_most=30,
    )


@pytest.mark.fault("F15", "F16")
def test_broken_streams_change_no_token(
    linked: LocalSwarm, remote: RemoteSequential, local: PreTrainedModel, fault: FaultLog
) -> None:
    expected = generate_with(local, prompt(rows=2), 10)
    model = with_blocks(local, remote)
    for kind, row, name in (
        (Fault.DROP, "F15", "reset in the middle of a frame"),
        (Fault.TRUNCATE, "F15", "stream ends in the middle of a frame"),
        (Fault.SLICE, "F15", "single bytes"),
        (Fault.CORRUPT, "F16", "one bit flipped on the way"),
    ):
        hit: list[FaultyLink] = []

        def strike(kind: Fault = kind, hit: list[FaultyLink] = hit) -> None:
            for hop in (0, 1):
                hit.append(link_to(linked, remote, hop))
                hit[-1].inject(kind, after_bytes=100, only_open_streams=True)

        before = remote.stats()
        processors = LogitsProcessorList([AtStep(3, strike)])
        with watching(model, time.monotonic) as times:
            output = generate_with(model, prompt(rows=2), 10, logits_processor=processors)
        after = remote.stats()
        assert torch.equal(output, expected)
        fired = sum(link.fired for link in hit)
        assert all(link.fired for link in hit)
        assert (after.failovers > before.failovers) is (kind is not Fault.SLICE)
        for link in hit:
            link.clear()
        fault.record(
            row,
            injected=f"{name}, both hops",
            fired=fired,
            outcome="tokens identical",
            figure=gap_s(times),
            unit="s",
            at_most=2.0,
        )


@pytest.mark.fault("F14")
def test_stalled_link_ends_both_connections(
    linked: LocalSwarm,
    remote: RemoteSequential,
    local: PreTrainedModel,
    fault: FaultLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real sockets that nobody closes; the times are a fiftieth of the usual ones."""
    for name, value in (("IDLE_PING_S", 0.2), ("IDLE_DEAD_S", 0.5), ("IDLE_CHECK_S", 0.05)):
        monkeypatch.setattr(f"remote_modules.net.connection.{name}", value)
    generate_with(with_blocks(local, remote), prompt(), 2)
    client = remote._handle.swarm
    ours = [link for link in client._connections.values() if link.is_open]
    assert ours
    for peer in linked.peers:
        assert peer.link is not None
        peer.link.inject(Fault.STALL)
    poll(lambda: not any(link.is_open for link in ours), "the client closes them", patience_s=20.0)
    servers = [peer._server._peer._handler for peer in linked.peers]  # type: ignore[attr-defined]
    poll(lambda: not any(handler.num_connections for handler in servers), "the peers close them", patience_s=20.0)
    for peer in linked.peers:
        assert peer.link is not None
        peer.link.clear()
    fault.record(
        "F14",
        injected="links stall for good under idle connections",
        fired=len(ours),
        outcome="closed on both sides",
        figure=sum(link.is_open for link in ours) + sum(handler.num_connections for handler in servers),
        unit="left",
        at_most=0,
    )
