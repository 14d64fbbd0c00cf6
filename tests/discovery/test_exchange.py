from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web
from discovery_support import FakeSource, RecordServer, eventually, http_server, record_server
from records import make_identity, make_record

from remote_modules.discovery.base import NobodyToAskError
from remote_modules.discovery.exchange import FANOUT, ExchangeDiscovery
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.peer_cache import PeerCache
from remote_modules.discovery.static import StaticDiscovery
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.leases import DuplicateIdentityError

KEY = "tiny-key"
NEWCOMER = make_identity(99)


class Member:
    """A peer of the swarm: it answers with its own record and with what it knows."""

    def __init__(self, number: int, server: RecordServer) -> None:
        self.identity = make_identity(number)
        self.server = server
        self.record = make_record(self.identity, model_key=KEY, addresses=(server.address,))
        self.signed = server.signed = self.identity.sign_record(self.record)
        server.known.own_peer_id = self.identity.peer_id

    def knows(self, other: Member, *, at_s: float | None = None) -> None:
        self.server.known.hear(other.signed, other.record, at_s=at_s)

    def die(self) -> None:
        self.server.signed = None


class Bench:
    """Some peers that do not know each other yet, and tables on one clock that stands still."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.now_s = 1000.0
        self.stack = stack
        self.members: list[Member] = []

    async def add(self, count: int) -> list[Member]:
        for _ in range(count):
            server = await self.stack.enter_async_context(record_server(lease_s=90.0, clock=lambda: self.now_s))
            self.members.append(Member(len(self.members) + 1, server))
        return self.members

    def known(self, *, own: str = "", folder: Path | None = None) -> KnownPeers:
        cache = None if folder is None else PeerCache(folder)
        return KnownPeers(own_peer_id=own, cache=cache, lease_s=90.0, clock=lambda: self.now_s)

    def exchange(self, known: KnownPeers | None = None, **settings: Any) -> ExchangeDiscovery:
        known = known or self.known()
        made = ExchangeDiscovery(known, rng=Random(1), **settings)
        self.stack.push_async_callback(made.aclose)
        return made


def run(scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            await scenario(Bench(stack))

    asyncio.run(main())


def ids(records: list[PeerRecord]) -> set[str]:
    return {record.peer_id for record in records}


def peer_ids(members: list[Member]) -> set[str]:
    return {member.identity.peer_id for member in members}


def test_whoever_knows_one_peer_finds_those_that_know_each_other_in_a_chain() -> None:
    async def scenario(bench: Bench) -> None:
        members = await bench.add(5)
        for left, right in zip(members, members[1:], strict=False):
            left.knows(right)
        found = await bench.exchange(seeds=[members[0].server.address]).lookup(KEY)
        assert ids(found) == peer_ids(members)

    run(scenario)


def test_nobody_to_ask_is_told_apart_from_nobody_answering() -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(NobodyToAskError):
            await bench.exchange().lookup(KEY)
        with pytest.raises(DiscoveryError, match="no known peer answered: peer 127.0.0.1:1 is unreachable") as caught:
            await bench.exchange(seeds=["127.0.0.1:1"]).lookup(KEY)
        assert not isinstance(caught.value, NobodyToAskError)

    run(scenario)


def test_dead_peer_is_passed_on_until_its_lease_ends_and_not_longer() -> None:
    async def scenario(bench: Bench) -> None:
        first, second, dead = await bench.add(3)
        first.knows(dead, at_s=bench.now_s - 60.0)
        second.knows(dead, at_s=bench.now_s - 60.0)
        dead.die()
        exchange = bench.exchange(seeds=[first.server.address, second.server.address])
        assert dead.identity.peer_id in ids(await exchange.lookup(KEY))
        bench.now_s += 29.0
        assert dead.identity.peer_id in ids(await exchange.lookup(KEY))
        bench.now_s += 1.0
        assert ids(await exchange.lookup(KEY)) == peer_ids([first, second])

    run(scenario)


def test_restarted_peer_is_known_by_its_newest_record() -> None:
    async def scenario(bench: Bench) -> None:
        first, second = await bench.add(2)
        first.knows(second)
        newer = make_record(second.identity, model_key=KEY, addresses=second.record.addresses, sequence=9)
        second.server.signed = second.identity.sign_record(newer)
        found = await bench.exchange(seeds=[first.server.address]).lookup(KEY)
        assert newer in found
        assert len(found) == 2

    run(scenario)


def test_other_models_are_not_taken() -> None:
    async def scenario(bench: Bench) -> None:
        first, second = await bench.add(2)
        first.knows(second)
        exchange = bench.exchange(seeds=[first.server.address])
        with pytest.raises(DiscoveryError):
            await bench.exchange(seeds=["127.0.0.1:1"]).lookup("other")
        assert await exchange.lookup("other") == []
        assert ids(await exchange.lookup(None)) == peer_ids([first, second])

    run(scenario)


def test_failing_address_is_left_alone_for_a_while_and_tried_again() -> None:
    async def scenario(bench: Bench) -> None:
        asked = []

        async def refuse(request: web.Request) -> web.StreamResponse:
            asked.append(bench.now_s)
            raise web.HTTPInternalServerError

        address = await bench.stack.enter_async_context(http_server({"/{path:.*}": refuse}))
        exchange = bench.exchange(seeds=[address])
        for _ in range(3):
            with pytest.raises(DiscoveryError):
                await exchange.lookup(KEY)
        assert asked == [1000.0]
        bench.now_s += 1.0
        with pytest.raises(DiscoveryError):
            await exchange.lookup(KEY)
        assert asked == [1000.0, 1001.0]

    run(scenario)


def test_announcement_reaches_some_peers_and_through_them_everybody() -> None:
    async def scenario(bench: Bench) -> None:
        members = await bench.add(6)
        for member in members[1:]:
            members[0].knows(member)
        newcomer = bench.exchange(bench.known(own=NEWCOMER.peer_id), seeds=[members[0].server.address])
        record = make_record(NEWCOMER, model_key=KEY, addresses=("127.0.0.1:4099",))
        await newcomer.announce(NEWCOMER.sign_record(record))
        assert ids(newcomer.recall(KEY)) == peer_ids(members)  # learned while it told
        await newcomer.announce(NEWCOMER.sign_record(make_record(NEWCOMER, model_key=KEY, sequence=2)))
        told = [member for member in members if NEWCOMER.peer_id in ids(member.server.known.records(KEY))]
        assert 1 + FANOUT >= len(told) > 1
        found = await bench.exchange(seeds=[members[0].server.address]).lookup(KEY)
        assert NEWCOMER.peer_id in ids(found)

    run(scenario)


def test_withdrawal_reaches_those_that_were_told() -> None:
    async def scenario(bench: Bench) -> None:
        (member,) = await bench.add(1)
        exchange = bench.exchange(seeds=[member.server.address])
        await exchange.announce(NEWCOMER.sign_record(make_record(NEWCOMER, model_key=KEY)))
        assert ids(member.server.known.records(KEY)) == {NEWCOMER.peer_id}
        leaving = make_record(NEWCOMER, model_key=KEY, sequence=2, state=PeerState.DRAINING)
        await exchange.withdraw(NEWCOMER.sign_record(leaving))
        assert member.server.known.records(KEY) == []

    run(scenario)


def test_replaced_instance_learns_it_from_a_peer() -> None:
    async def scenario(bench: Bench) -> None:
        (member,) = await bench.add(1)
        exchange = bench.exchange(seeds=[member.server.address])
        for instance_id in ("first", "second"):
            await exchange.announce(NEWCOMER.sign_record(make_record(NEWCOMER, instance_id=instance_id, model_key=KEY)))
        with pytest.raises(DuplicateIdentityError) as caught:
            await exchange.announce(NEWCOMER.sign_record(make_record(NEWCOMER, sequence=2, model_key=KEY)))
        assert caught.value.newest == NEWCOMER.sign_record(make_record(NEWCOMER, instance_id="second", model_key=KEY))

    run(scenario)


def test_peer_that_knows_nobody_asks_other_sources_for_somebody_to_tell() -> None:
    async def scenario(bench: Bench) -> None:
        (member,) = await bench.add(1)
        known = bench.known(own=NEWCOMER.peer_id)
        feeder = StaticDiscovery([member.server.address], known=known)
        bench.stack.push_async_callback(feeder.aclose)
        down = FakeSource([])
        down.is_down = True
        exchange = bench.exchange(known, feeders=[down, feeder])
        signed = NEWCOMER.sign_record(make_record(NEWCOMER, model_key=KEY))
        with pytest.raises(NobodyToAskError):
            await exchange.announce(signed)

        async def is_known() -> bool:
            return ids(known.records(KEY)) == peer_ids([member])

        await eventually(is_known)
        await exchange.announce(signed)
        assert ids(member.server.known.records(KEY)) == {NEWCOMER.peer_id}

    run(scenario)


def test_next_process_finds_the_swarm_from_disk(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        members = await bench.add(3)
        members[0].knows(members[1])
        members[1].knows(members[2])
        first = bench.exchange(bench.known(folder=tmp_path), seeds=[members[0].server.address])
        assert ids(await first.lookup(KEY)) == peer_ids(members)
        await first.aclose()
        members[0].die()
        second = bench.exchange(bench.known(folder=tmp_path))
        assert ids(await second.lookup(KEY)) >= peer_ids(members[1:])

    run(scenario)


def test_what_was_on_disk_is_asked_but_not_believed(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        gone, stays = await bench.add(2)
        known = bench.known(folder=tmp_path)
        for member in (gone, stays):
            known.hear(member.signed, member.record)
        known.save()
        gone.die()
        assert ids(await bench.exchange(bench.known(folder=tmp_path)).lookup(KEY)) == peer_ids([stays])

    run(scenario)


def test_slow_peer_does_not_hold_up_what_others_say() -> None:
    async def scenario(bench: Bench) -> None:
        (member,) = await bench.add(1)
        is_over = asyncio.Event()

        async def stall(request: web.Request) -> web.StreamResponse:
            await is_over.wait()
            raise web.HTTPNotFound

        address = await bench.stack.enter_async_context(http_server({"/{path:.*}": stall}))
        exchange = bench.exchange(seeds=[address, member.server.address], timeout_s=30.0)
        assert ids(await asyncio.wait_for(exchange.lookup(KEY), 20.0)) == peer_ids([member])
        is_over.set()

    run(scenario)


def test_closed_exchange_says_so() -> None:
    async def scenario(bench: Bench) -> None:
        exchange = bench.exchange(seeds=["127.0.0.1:1"])
        await exchange.aclose()
        await exchange.aclose()
        with pytest.raises(DiscoveryError, match="closed"):
            await exchange.lookup(KEY)

    run(scenario)


def test_malformed_seed_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        ExchangeDiscovery(KnownPeers(), seeds=["nowhere"])
