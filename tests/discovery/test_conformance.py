"""One suite for everything that calls itself a Discovery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import msgspec
import pytest
from discovery_support import RecordServer, eventually, forge, record_server, unique_key
from records import make_record

from remote_modules.config import TrackerConfig
from remote_modules.discovery.base import Discovery
from remote_modules.discovery.exchange import ExchangeDiscovery
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.mdns import MdnsDiscovery
from remote_modules.discovery.merged import MergedDiscovery
from remote_modules.discovery.static import StaticDiscovery
from remote_modules.discovery.tracker_client import TrackerClient
from remote_modules.discovery.tracker_server import TrackerServer
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, PeerState

KINDS = ("tracker", "mdns", "static", "exchange", "merged")

EXCHANGE_LEASE_S = 1.0  # what peers tell each other ends with the lease and not before


class Peer:
    """A peer that serves its record over HTTP, as all do, and announces it."""

    def __init__(self, server: RecordServer, model_key: str) -> None:
        self.identity = Identity.generate()
        self.server = server
        self.record = make_record(self.identity, model_key=model_key, addresses=(server.address,))

    async def announce(self, discovery: Discovery, *, instance_id: str = "first", sequence: int = 1) -> None:
        self.record = msgspec.structs.replace(self.record, instance_id=instance_id, sequence=sequence)
        self.server.signed = self.identity.sign_record(self.record)
        await discovery.announce(self.server.signed)

    async def withdraw(self, discovery: Discovery) -> None:
        leaving = msgspec.structs.replace(self.record, sequence=self.record.sequence + 1, state=PeerState.DRAINING)
        self.server.signed = None
        await discovery.withdraw(self.identity.sign_record(leaving))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Two peers with models of their own, and the two ends of one kind of discovery."""

    peer: Peer
    bystander: Peer
    announcer: Discovery
    looker: Discovery

    async def sees(self, peer: Peer, *, model_key: str | None, sequence: int = 1) -> bool:
        records = await self.looker.lookup(model_key)
        found = [record for record in records if record.peer_id == peer.identity.peer_id]
        assert len(found) <= 1
        return bool(found) and found[0].sequence == sequence


@asynccontextmanager
async def make_world(kind: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(record_server(lease_s=EXCHANGE_LEASE_S)) for _ in range(2)]
        tracker = TrackerServer(TrackerConfig())
        await tracker.start()
        stack.push_async_callback(tracker.aclose)

        def make() -> Discovery:
            sources: dict[str, Callable[[], Discovery]] = {
                "tracker": lambda: TrackerClient(tracker.url),
                "mdns": lambda: MdnsDiscovery(["127.0.0.1"]),
                "static": lambda: StaticDiscovery([server.address for server in servers]),
                "exchange": lambda: ExchangeDiscovery(
                    KnownPeers(lease_s=EXCHANGE_LEASE_S), seeds=[server.address for server in servers]
                ),
                "merged": lambda: MergedDiscovery([sources["mdns"](), sources["tracker"]()]),
            }
            discovery = sources[kind]()
            stack.push_async_callback(discovery.aclose)
            return discovery

        peer, bystander = (Peer(server, unique_key()) for server in servers)
        yield World(peer=peer, bystander=bystander, announcer=make(), looker=make())


def run(kind: str, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with make_world(kind) as world:
            await asyncio.gather(
                world.peer.announce(world.announcer),
                world.bystander.announce(world.announcer),
                world.looker.lookup(None),  # at the same time: mDNS answers at once to those who listen already
            )
            await eventually(lambda: world.sees(world.peer, model_key=None))
            await eventually(lambda: world.sees(world.bystander, model_key=None))
            await scenario(world)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_announced_record_is_found_by_its_model_only(kind: str) -> None:
    async def scenario(world: World) -> None:
        key = world.peer.record.model_key
        assert await world.looker.lookup(key) == [world.peer.record]
        assert await world.looker.lookup(world.bystander.record.model_key) == [world.bystander.record]
        assert await world.looker.lookup("unknown") == []

    run(kind, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_renewed_record_replaces_the_older(kind: str) -> None:
    async def scenario(world: World) -> None:
        await world.peer.announce(world.announcer, sequence=2)
        await eventually(lambda: world.sees(world.peer, model_key=None, sequence=2))

    run(kind, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_restarted_peer_wins_over_its_dead_instance(kind: str) -> None:
    async def scenario(world: World) -> None:
        await world.peer.announce(world.announcer, sequence=7)
        await eventually(lambda: world.sees(world.peer, model_key=None, sequence=7))
        await world.peer.announce(world.announcer, instance_id="second", sequence=0)
        await eventually(lambda: world.sees(world.peer, model_key=None, sequence=0))
        assert await world.looker.lookup(world.peer.record.model_key) == [world.peer.record]

    run(kind, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_withdrawn_peer_is_gone_and_others_stay(kind: str) -> None:
    async def scenario(world: World) -> None:
        await world.peer.withdraw(world.announcer)

        async def is_gone() -> bool:
            return await world.looker.lookup(world.peer.record.model_key) == []

        await eventually(is_gone)
        assert await world.sees(world.bystander, model_key=None)

    run(kind, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_forged_record_is_never_returned(kind: str) -> None:
    async def scenario(world: World) -> None:
        honest = world.peer.server.signed
        assert honest is not None
        altered = msgspec.structs.replace(world.peer.record, sequence=9, end=8)
        forged = forge(honest, altered)
        world.peer.server.signed = forged
        try:
            await world.announcer.announce(forged)
        except DiscoveryError:
            pass  # most refuse at once; static discovery takes any announcement
        records: list[PeerRecord] = await world.looker.lookup(None)
        assert altered.end not in {record.end for record in records if record.peer_id == altered.peer_id}

    run(kind, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_twice_is_harmless_and_then_lookup_says_so(kind: str) -> None:
    async def scenario(world: World) -> None:
        await world.looker.aclose()
        await world.looker.aclose()
        with pytest.raises(DiscoveryError, match="closed"):
            await world.looker.lookup(None)

    run(kind, scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_discovery_closes(kind: str) -> None:
    async def main() -> None:
        async with make_world(kind):
            pass

    asyncio.run(main())
