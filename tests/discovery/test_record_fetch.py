from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path

import pytest
from aiohttp import web
from discovery_support import RecordServer, forge, http_server, make_signed, record_server
from records import make_identity, make_record

from remote_modules.discovery.http_json import make_session
from remote_modules.discovery.record_fetch import RECORD_PATH, answers, fetch_record, reached_at
from remote_modules.errors import DiscoveryError

ALICE = make_identity(1)


async def fetch(address: str) -> object:
    async with make_session(2.0) as session:
        return await fetch_record(session, address)


def test_record_of_a_loopback_peer_comes_over_http() -> None:
    async def main() -> None:
        async with record_server() as peer:
            peer.signed = make_signed(ALICE)
            assert await fetch(peer.address) == make_record(ALICE)

    asyncio.run(main())


def test_peer_answers_at_any_of_its_addresses_and_nobody_else_in_its_place() -> None:
    async def main() -> list[bool]:
        async with record_server() as peer:
            peer.signed = make_signed(ALICE)
            here = make_record(ALICE, addresses=("127.0.0.1:1", peer.address))
            other = make_record(make_identity(2), addresses=(peer.address,))
            found = [await answers(record, timeout_s=2.0) for record in (here, other)]
        return [*found, await answers(here, timeout_s=2.0)]

    assert asyncio.run(main()) == [True, False, False]


def test_record_of_any_other_peer_comes_over_tls_with_its_own_certificate(tmp_path: Path) -> None:
    certificate = ALICE.certificate(now=datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc))
    file = tmp_path / "both.pem"
    file.write_bytes(certificate.certificate_pem + certificate.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)

    async def main() -> None:
        server = RecordServer()
        server.signed = make_signed(ALICE)
        app = web.Application()
        app.router.add_get(RECORD_PATH, server.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        try:
            # Linux dials loopback for it, but it is not taken for loopback.
            assert await fetch(f"0.0.0.0:{runner.addresses[0][1]}") == make_record(ALICE)
        finally:
            await runner.cleanup()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["forged", "altered-id", "none"])
def test_answer_that_proves_nothing_is_refused(kind: str) -> None:
    signed = {
        "forged": forge(make_signed(ALICE), make_record(ALICE, end=8)),
        "altered-id": make_identity(2).sign_record(make_record(ALICE)),
        "none": None,
    }[kind]

    async def main() -> None:
        async with record_server() as peer:
            peer.signed = signed
            with pytest.raises(DiscoveryError, match=f"peer {peer.address}"):
                await fetch(peer.address)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("status", "body", "match"), [(200, b"{}", "sent no valid record"), (503, b"{}", "answered status 503")]
)
def test_other_json_is_refused(status: int, body: bytes, match: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, content_type="application/json")

    async def main() -> None:
        async with http_server({RECORD_PATH: answer}) as address:
            with pytest.raises(DiscoveryError, match=match):
                await fetch(address)

    asyncio.run(main())


def test_working_address_moves_to_the_front_once() -> None:
    record = make_record(ALICE, addresses=("10.0.0.1:1024", "10.0.0.2:1024"))
    assert reached_at(record, "10.0.0.2:1024").addresses == ("10.0.0.2:1024", "10.0.0.1:1024")


def test_peer_elsewhere_cannot_make_us_dial_ourselves() -> None:
    record = make_record(ALICE, addresses=("127.0.0.1:6379", "10.0.0.1:4000"))
    assert reached_at(record, "10.0.0.1:4000").addresses == ("10.0.0.1:4000",)
