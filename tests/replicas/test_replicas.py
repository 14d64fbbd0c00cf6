"""Two trackers on one Redis: what is told to one is known to the other, and peers fail over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from records import make_identity, make_record

from remote_modules.config import TrackerConfig
from remote_modules.discovery.base import OverloadedError, Pace
from remote_modules.discovery.merged import MergedDiscovery
from remote_modules.discovery.tracker_client import TrackerClient
from remote_modules.discovery.tracker_server import TrackerServer
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.leases import StaleRecordError
from remote_modules.server.announcer import Announcer

from .redis_support import RedisServer

ALICE, BOB = make_identity(1), make_identity(2)


class Bench:
    """Trackers ``a`` and ``b`` and a client of each."""

    def __init__(self, url: str) -> None:
        self.a, self.b = (TrackerServer(TrackerConfig(storage=url)) for _ in range(2))
        self.clients: list[TrackerClient] = []

    async def start(self) -> None:
        for server in (self.a, self.b):
            await server.start()
            self.clients.append(TrackerClient(server.url))

    async def close(self) -> None:
        for client in self.clients:
            await client.aclose()
        for server in (self.a, self.b):
            await server.aclose()


def run(url: str, scenario: Callable[[Bench, TrackerClient, TrackerClient], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench(url)
        await bench.start()
        try:
            await scenario(bench, *bench.clients)
        finally:
            await bench.close()

    asyncio.run(main())


def test_announced_at_one_and_found_at_the_other(redis_server: RedisServer) -> None:
    async def scenario(bench: Bench, at_a: TrackerClient, at_b: TrackerClient) -> None:
        record = make_record(ALICE, sequence=5)
        assert await at_a.announce(ALICE.sign_record(record)) == Pace(shortest_s=0.0, longest_s=15.0)
        assert await at_b.lookup("tiny-key") == [record]
        with pytest.raises(StaleRecordError) as caught:
            await at_b.announce(ALICE.sign_record(make_record(ALICE, sequence=4)))
        assert caught.value.newest == ALICE.sign_record(record)
        await at_b.withdraw(ALICE.sign_record(make_record(ALICE, sequence=6)))
        assert await at_a.lookup(None) == []

    run(redis_server.url, scenario)


def test_killed_tracker_loses_nothing_and_its_peers_go_on_at_the_other(redis_server: RedisServer) -> None:
    async def scenario(bench: Bench, at_a: TrackerClient, at_b: TrackerClient) -> None:
        announcer = Announcer(
            MergedDiscovery([at_a, at_b]),
            ALICE,
            describe=lambda: make_record(ALICE),
            interval_s=0.1,
            first_sequence=2**41,
        )
        await announcer.set_state(PeerState.ONLINE)
        announcer.start()
        (before,) = await at_b.lookup(None)
        await bench.a.aclose()
        with pytest.raises(DiscoveryError, match="unreachable"):
            await at_a.lookup(None)
        records: list[PeerRecord] = []
        while not records or records[0].sequence < before.sequence + 10:
            records = await asyncio.wait_for(at_b.lookup(None), 5.0)
            assert [record.peer_id for record in records] == [ALICE.peer_id]  # never gone for a moment
            await asyncio.sleep(0.01)
        await announcer.stop()
        assert await at_b.lookup(None) == []

    run(redis_server.url, scenario)


def test_tracker_whose_redis_is_gone_asks_to_come_back(redis_server: RedisServer) -> None:
    async def scenario(bench: Bench, at_a: TrackerClient, at_b: TrackerClient) -> None:
        await at_a.announce(ALICE.sign_record(make_record(ALICE, sequence=1)))
        redis_server.kill()
        try:
            with pytest.raises(OverloadedError, match="storage does not answer") as caught:
                await at_a.announce(ALICE.sign_record(make_record(ALICE, sequence=2)))
            assert caught.value.retry_after_s is not None
        finally:
            redis_server.start()
        await at_a.announce(ALICE.sign_record(make_record(ALICE, sequence=3)))
        assert [record.sequence for record in await at_b.lookup(None)] == [3]

    run(redis_server.url, scenario)
