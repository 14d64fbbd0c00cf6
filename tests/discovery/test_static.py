from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from discovery_support import http_server, make_signed, record_server
from records import make_identity

from remote_modules.discovery.record_fetch import RECORD_PATH
from remote_modules.discovery.static import StaticDiscovery
from remote_modules.errors import DiscoveryError

ALICE = make_identity(1)
DEAD = "127.0.0.1:1"


def test_address_that_answered_is_dialled_first() -> None:
    async def scenario() -> None:
        async with record_server() as peer:
            peer.signed = make_signed(ALICE, addresses=("10.0.0.9:4000", "10.0.0.8:4000"))
            static = StaticDiscovery([peer.address])
            (record,) = await static.lookup(None)
            assert record.addresses == (peer.address, "10.0.0.9:4000", "10.0.0.8:4000")
            await static.aclose()

    asyncio.run(scenario())


def test_never_more_than_four_addresses_are_kept() -> None:
    async def scenario() -> None:
        async with record_server() as peer:
            peer.signed = make_signed(ALICE, addresses=tuple(f"10.0.0.{n}:4000" for n in range(4)))
            static = StaticDiscovery([peer.address])
            (record,) = await static.lookup(None)
            assert len(record.addresses) == 4
            assert record.addresses[0] == peer.address
            await static.aclose()

    asyncio.run(scenario())


def test_unreachable_peers_are_left_out() -> None:
    async def scenario() -> None:
        async with record_server() as peer:
            peer.signed = make_signed(ALICE)
            static = StaticDiscovery([DEAD, peer.address])
            assert [record.peer_id for record in await static.lookup("tiny-key")] == [ALICE.peer_id]
            await static.aclose()

    asyncio.run(scenario())


def test_no_peer_answers_every_failure_is_named() -> None:
    async def scenario() -> None:
        async with record_server() as without_record:
            static = StaticDiscovery([DEAD, without_record.address])
            with pytest.raises(DiscoveryError, match=f"{DEAD} is unreachable.*{without_record.address} answered"):
                await static.lookup(None)
            await static.aclose()

    asyncio.run(scenario())


def test_frozen_peer_delays_the_others_no_longer_than_the_timeout() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def freeze(request: web.Request) -> web.Response:
            await release.wait()
            return web.Response()

        async with record_server() as peer, http_server({RECORD_PATH: freeze}) as frozen:
            peer.signed = make_signed(ALICE)
            static = StaticDiscovery([frozen, peer.address], timeout_s=0.2)
            loop = asyncio.get_running_loop()
            started_s = loop.time()
            assert len(await static.lookup(None)) == 1
            assert loop.time() - started_s < 2.0
            release.set()
            await static.aclose()

    asyncio.run(scenario())


def test_same_peer_at_two_addresses_is_one_record() -> None:
    async def scenario() -> None:
        async with record_server() as one, record_server() as two:
            one.signed = make_signed(ALICE, sequence=1)
            two.signed = make_signed(ALICE, sequence=2)
            static = StaticDiscovery([one.address, two.address])
            (record,) = await static.lookup(None)
            assert record.sequence == 2
            await static.aclose()

    asyncio.run(scenario())


def test_announce_and_withdraw_tell_nobody() -> None:
    async def scenario() -> None:
        async with record_server() as peer:
            static = StaticDiscovery([peer.address])
            await static.announce(make_signed(ALICE))
            await static.withdraw(make_signed(ALICE))
            assert peer.num_requests == 0
            await static.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("addresses", [[], ["no-port"], ["http://user@host:1"], ["a:0"]])
def test_malformed_addresses_are_refused_at_once(addresses: list[str]) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        StaticDiscovery(addresses)


def test_bare_string_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a list"):
        StaticDiscovery("127.0.0.1:4000")
