from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from discovery_support import RecordServer, eventually, make_signed, record_server, unique_key
from records import make_record
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from remote_modules.discovery.mdns import FIRST_LOOKUP_S, RETRY_S, MdnsDiscovery
from remote_modules.discovery.mdns_service import SERVICE_TYPE
from remote_modules.discovery.record_fetch import fetch_record
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, SignedRecord

LOOPBACK = ["127.0.0.1"]


@pytest.fixture(autouse=True)
def _short_first_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_modules.discovery.mdns.FIRST_LOOKUP_S", 0.1)


class Bench:
    """One peer with its record server, and a looker with a clock that the test moves."""

    def __init__(self, server: RecordServer) -> None:
        self.server = server
        self.key = unique_key()
        self.identity = Identity.generate()
        self.offset_s = 0.0
        self.looker = MdnsDiscovery(LOOPBACK, clock=self.now_s)
        self.dialled: list[str] = []  # by this process: other tests on this machine see our services too

    @property
    def num_fetches(self) -> int:
        return self.dialled.count(self.server.address)

    def now_s(self) -> float:
        return asyncio.get_running_loop().time() + self.offset_s

    def sign(self, *, instance_id: str = "first", sequence: int = 1) -> SignedRecord:
        signed = make_signed(
            self.identity,
            model_key=self.key,
            addresses=(self.server.address,),
            instance_id=instance_id,
            sequence=sequence,
        )
        self.server.signed = signed
        return signed

    async def sees(self, sequence: int | None) -> bool:
        found = [record.sequence for record in await self.looker.lookup(self.key)]
        return found == ([] if sequence is None else [sequence])


@asynccontextmanager
async def make_bench() -> AsyncIterator[Bench]:
    async with record_server() as server:
        bench = Bench(server)
        try:
            await bench.looker.lookup(bench.key)  # those who listen already are answered at once
            yield bench
        finally:
            await bench.looker.aclose()


@asynccontextmanager
async def announced(bench: Bench, signed: SignedRecord) -> AsyncIterator[MdnsDiscovery]:
    discovery = MdnsDiscovery(LOOPBACK)
    try:
        await discovery.announce(signed)
        yield discovery
    finally:
        await discovery.aclose()


@asynccontextmanager
async def raw_service(name: str, port: int, address: str, **texts: str) -> AsyncIterator[None]:
    """What anybody on the LAN can claim."""
    engine = AsyncZeroconf(interfaces=LOOPBACK, ip_version=IPVersion.V4Only)
    try:
        info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            port=port,
            properties=texts,
            server=f"rm-{name[:16]}.local.",
            addresses=[socket.inet_aton(address)],
        )
        await (await engine.async_register_service(info, cooperating_responders=True))
        yield
    finally:
        await engine.async_close()


def run(scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with make_bench() as bench:

            async def note(session: aiohttp.ClientSession, address: str, *, known: object) -> PeerRecord:
                bench.dialled.append(address)
                return await fetch_record(session, address)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("remote_modules.discovery.mdns.fetch_record", note)
                await scenario(bench)

    asyncio.run(main())


def test_record_is_fetched_once_for_each_sequence() -> None:
    async def scenario(bench: Bench) -> None:
        async with announced(bench, bench.sign()) as announcer:
            await eventually(lambda: bench.sees(1))
            for _ in range(3):
                assert await bench.sees(1)
            assert bench.num_fetches == 1
            await announcer.announce(bench.sign(sequence=2))
            await eventually(lambda: bench.sees(2))
            assert bench.num_fetches == 2

    run(scenario)


def test_process_that_crashed_without_goodbye_is_replaced_by_its_restart() -> None:
    """1. The first process announces and is killed: nobody says goodbye.
    2. The next one comes up with the same name, while caches still hold the ghost.
    3. The ghost never shows again.
    """

    async def scenario(bench: Bench) -> None:
        crashed = MdnsDiscovery(LOOPBACK)
        await crashed.announce(bench.sign(sequence=9))
        await eventually(lambda: bench.sees(9))
        for engine in crashed._engines.values():
            for info in engine.zeroconf.registry.async_get_service_infos():
                engine.zeroconf.registry.async_remove(info)
        await crashed.aclose()
        assert await bench.sees(9)
        async with announced(bench, bench.sign(instance_id="second", sequence=0)):
            await eventually(lambda: bench.sees(0))

    run(scenario)


def test_closing_the_announcer_says_goodbye() -> None:
    async def scenario(bench: Bench) -> None:
        async with announced(bench, bench.sign()):
            await eventually(lambda: bench.sees(1))
        await eventually(lambda: bench.sees(None))

    run(scenario)


def test_first_lookup_right_after_the_announcement_finds_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_modules.discovery.mdns.FIRST_LOOKUP_S", FIRST_LOOKUP_S)
    monkeypatch.setattr("remote_modules.discovery.mdns.SETTLE_S", FIRST_LOOKUP_S)  # other tests answer sooner

    async def scenario(bench: Bench) -> None:
        async with announced(bench, bench.sign()):
            looker = MdnsDiscovery(LOOPBACK)
            assert len(await looker.lookup(bench.key)) == 1
            await looker.aclose()

    run(scenario)


def test_other_models_are_not_fetched() -> None:
    async def scenario(bench: Bench) -> None:
        async with announced(bench, bench.sign()):
            assert await bench.looker.lookup("unknown") == []
            assert bench.num_fetches == 0

    run(scenario)


def test_peer_that_does_not_answer_is_tried_again_later_only() -> None:
    async def scenario(bench: Bench) -> None:
        signed = bench.sign()
        bench.server.signed = None
        async with announced(bench, signed):

            async def was_asked() -> bool:
                assert await bench.sees(None)
                return bench.num_fetches == 1

            await eventually(was_asked)
            bench.server.signed = signed
            assert await bench.sees(None)
            bench.offset_s = RETRY_S
            assert await bench.sees(1)

    run(scenario)


def test_service_named_after_a_peer_but_answered_by_another_is_ignored() -> None:
    async def scenario(bench: Bench) -> None:
        bench.sign()
        victim = Identity.generate().peer_id
        port = int(bench.server.address.rpartition(":")[2])
        async with raw_service(victim, port, "127.0.0.1", model_key=bench.key, sequence="1"):

            async def was_asked() -> bool:
                assert await bench.sees(None)
                return bench.num_fetches == 1

            await eventually(was_asked)

    run(scenario)


def test_address_outside_the_lan_is_never_dialled() -> None:
    async def scenario(bench: Bench) -> None:
        names = (Identity.generate().peer_id, Identity.generate().peer_id)
        async with (
            raw_service(names[0], 4000, "9.9.9.9", model_key=bench.key),
            raw_service(names[1], 4000, "127.0.0.1", model_key=bench.key),
        ):

            async def both_were_seen() -> bool:
                assert await bench.sees(None)
                return {f"{name}.{SERVICE_TYPE}" for name in names} <= set(bench.looker._found)

            await eventually(both_were_seen)
        assert bench.dialled == ["127.0.0.1:4000"]

    run(scenario)


def test_services_beyond_the_cap_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_modules.discovery.mdns.MAX_SERVICES", 1)

    async def scenario(bench: Bench) -> None:
        await bench.looker.lookup(None)
        async with (
            raw_service(Identity.generate().peer_id, 4000, "127.0.0.1"),
            raw_service(Identity.generate().peer_id, 4000, "127.0.0.1"),
        ):
            await bench.looker.lookup(None)
            assert len(bench.looker._services) <= 1

    run(scenario)


def test_two_terminals_find_each_other_on_default_interfaces() -> None:
    async def scenario(bench: Bench) -> None:
        one, two = MdnsDiscovery(), MdnsDiscovery()
        try:
            await one.announce(bench.sign())

            async def is_seen() -> bool:
                return [record.sequence for record in await two.lookup(bench.key)] == [1]

            await eventually(is_seen)
        finally:
            await one.aclose()
            await two.aclose()

    run(scenario)


def test_loopback_record_is_announced_on_loopback_only() -> None:
    async def scenario(bench: Bench) -> None:
        discovery = MdnsDiscovery()
        try:
            await discovery.announce(bench.sign())
            assert list(discovery._engines) == [("127.0.0.1",)]
        finally:
            await discovery.aclose()

    run(scenario)


def test_forged_record_is_not_announced() -> None:
    async def main() -> None:
        discovery = MdnsDiscovery(LOOPBACK)
        forged = msgspec.structs.replace(make_signed(Identity.generate()), signature=bytes(64))
        for call in (discovery.announce, discovery.withdraw):
            with pytest.raises(DiscoveryError, match="mDNS refused the record"):
                await call(forged)
        await discovery.aclose()

    asyncio.run(main())


def test_longest_texts_fit_into_a_service() -> None:
    async def scenario(bench: Bench) -> None:
        identity = Identity.generate()
        record = make_record(identity, model_key="k" * 256, instance_id="i" * 256, addresses=(bench.server.address,))
        bench.server.signed = identity.sign_record(record)
        async with announced(bench, bench.server.signed):

            async def is_seen() -> bool:
                return record in await bench.looker.lookup(record.model_key)

            await eventually(is_seen)

    run(scenario)


def test_interface_that_this_machine_lacks_is_a_discovery_error() -> None:
    async def main() -> None:
        discovery = MdnsDiscovery(["192.0.2.77"])
        with pytest.raises(DiscoveryError, match="mDNS"):
            await discovery.lookup(None)
        await discovery.aclose()

    asyncio.run(main())


def test_interface_name_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="IPv4"):
        MdnsDiscovery(["eth0"])
