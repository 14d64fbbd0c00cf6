from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from discovery_support import RecordServer, forge, make_signed, record_server
from records import make_identity, make_record

from remote_modules.discovery.exchange_site import MAX_TOLD, ExchangeSite
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.peers import SignedRecord

OWN, ALICE, BOB = make_identity(1), make_identity(2), make_identity(3)


class Bench:
    def __init__(self, server: RecordServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session
        self.now_s = 100.0

    async def peers(self, query: str = "") -> list[tuple[SignedRecord, float]]:
        async with self.session.get(f"http://{self.server.address}/api/v1/peers{query}") as response:
            assert response.status == 200
            answer = msgspec.json.decode(await response.read())
        signed = msgspec.convert(answer["peers"], list[SignedRecord])
        return list(zip(signed, answer["ages_s"], strict=True))

    async def post(self, what: str, body: SignedRecord | bytes) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        async with self.session.post(f"http://{self.server.address}/api/v1/{what}", data=data) as response:
            return response.status, msgspec.json.decode(await response.read())


def run(scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench: Bench
        async with aiohttp.ClientSession() as session:
            async with record_server(clock=lambda: bench.now_s) as server:
                bench = Bench(server, session)
                server.signed = make_signed(OWN)
                await scenario(bench)

    asyncio.run(main())


def test_answer_has_its_own_record_and_those_it_knows_with_their_ages() -> None:
    async def scenario(bench: Bench) -> None:
        bench.server.known.hear(make_signed(ALICE), make_record(ALICE), at_s=70.0)
        assert await bench.peers("?model_key=tiny-key") == [(make_signed(OWN), 0.0), (make_signed(ALICE), 30.0)]
        assert await bench.peers("?model_key=other") == []
        bench.server.signed = None
        assert await bench.peers() == [(make_signed(ALICE), 30.0)]

    run(scenario)


def test_answer_is_a_bounded_sample() -> None:
    async def scenario(bench: Bench) -> None:
        for number in range(10, 10 + 2 * MAX_TOLD):
            identity = make_identity(number)
            bench.server.known.hear(make_signed(identity), make_record(identity))
        first, second = [signed for signed, _ in await bench.peers()], [signed for signed, _ in await bench.peers()]
        assert len(first) == len(second) == 1 + MAX_TOLD
        assert first[0] == second[0] == make_signed(OWN)
        assert set(first) != set(second)

    run(scenario)


def test_announced_record_is_told_and_withdrawn_one_is_not() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.post("announce", make_signed(ALICE)) == (200, {"lease_s": 90.0})
        assert [signed for signed, _ in await bench.peers()] == [make_signed(OWN), make_signed(ALICE)]
        assert (await bench.post("announce", make_signed(ALICE)))[0] == 409
        assert (await bench.post("withdraw", make_signed(ALICE)))[0] == 409
        assert (await bench.post("withdraw", make_signed(ALICE, sequence=2)))[0] == 200
        assert [signed for signed, _ in await bench.peers()] == [make_signed(OWN)]

    run(scenario)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "truncated"),
        (forge(make_signed(ALICE), make_record(ALICE, end=8)), 400, "signature of the record does not fit its key"),
        (make_signed(ALICE, model_key="other"), 409, "serves another model"),
        (make_signed(ALICE, addresses=("224.0.0.1:4000",)), 400, "is multicast"),
    ],
    ids=["no-json", "forged", "other-model", "address"],
)
def test_bad_announcement_is_refused_in_one_line(body: SignedRecord | bytes, status: int, reason: str) -> None:
    async def scenario(bench: Bench) -> None:
        got, answer = await bench.post("announce", body)
        assert got == status
        assert reason in answer["error"]
        assert [signed for signed, _ in await bench.peers()] == [make_signed(OWN)]

    run(scenario)


def test_peer_without_a_record_takes_none() -> None:
    async def scenario(bench: Bench) -> None:
        bench.server.signed = None
        assert (await bench.post("announce", make_signed(ALICE)))[0] == 409
        assert await bench.peers() == []

    run(scenario)


def test_refused_stale_record_comes_back_with_its_proof() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.post("announce", make_signed(BOB, instance_id="first"))
        await bench.post("announce", make_signed(BOB, instance_id="second"))
        status, answer = await bench.post("announce", make_signed(BOB, instance_id="first", sequence=2))
        assert (status, answer["is_duplicate"]) == (409, True)
        assert msgspec.convert(answer["newest"], SignedRecord) == make_signed(BOB, instance_id="second")

    run(scenario)


def test_one_address_cannot_ask_without_end() -> None:
    class Stranger:
        remote = "203.0.113.7"
        query: dict[str, str] = {}

    async def main() -> None:
        now_s = [0.0]
        site = ExchangeSite(KnownPeers(clock=lambda: now_s[0]), lambda: None)
        handler: Callable[[Any], Awaitable[web.Response]] = site.routes()[0].handler  # type: ignore[assignment]
        statuses = [(await handler(Stranger())).status for _ in range(51)]
        assert statuses == [200] * 50 + [429]
        refused = await handler(Stranger())
        assert refused.headers["Retry-After"] == "1"
        now_s[0] = 0.2
        assert (await handler(Stranger())).status == 200

    asyncio.run(main())
