"""Records, record servers and polling, shared by the tests of discovery."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web
from records import make_record

from remote_modules.discovery.exchange_site import ExchangeSite
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.record_fetch import RECORD_PATH
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, SignedRecord

_numbers = itertools.count()


def unique_key() -> str:
    """A model key that no other test on this machine uses: multicast is shared by all of them."""
    return f"key-{os.getpid()}-{next(_numbers)}"


def make_signed(identity: Identity, **changes: Any) -> SignedRecord:
    return identity.sign_record(make_record(identity, **changes))


def forge(signed: SignedRecord, record: PeerRecord) -> SignedRecord:
    """``record`` under the key and signature of another."""
    return msgspec.structs.replace(signed, payload=msgspec.msgpack.encode(record))


class RecordServer:
    """What a peer's port answers: ``signed`` to `RECORD_PATH`, or 404 while that is None, and peers to `PEERS_PATH`.

    Attributes:
        known: the peers that it knows.
    """

    def __init__(self, *, lease_s: float = 90.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = ""
        self.num_requests = 0
        self.signed: SignedRecord | None = None
        self.known = KnownPeers(lease_s=lease_s, clock=clock)
        self.site = ExchangeSite(self.known, lambda: self.signed)

    async def answer(self, request: web.Request) -> web.Response:
        self.num_requests += 1
        if self.signed is None:
            raise web.HTTPNotFound
        return web.Response(body=msgspec.json.encode(self.signed), content_type="application/json")


@asynccontextmanager
async def record_server(**settings: Any) -> AsyncIterator[RecordServer]:
    server = RecordServer(**settings)
    async with http_server({RECORD_PATH: server.answer}, server.site.routes()) as address:
        server.address = address
        yield server


@asynccontextmanager
async def http_server(
    routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]],
    more: Sequence[web.RouteDef] = (),
) -> AsyncIterator[str]:
    """An HTTP server on a free port of 127.0.0.1; yields its ``host:port``."""
    app = web.Application()
    for path, handler in routes.items():
        app.router.add_route("*", path, handler)
    app.router.add_routes(more)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def eventually(check: Callable[[], Awaitable[bool]], *, within_s: float = 3.0) -> None:
    """Poll ``check`` until it holds; fail after ``within_s``."""
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not await check():
        assert asyncio.get_running_loop().time() < deadline_s, f"not true within {within_s} s"
        await asyncio.sleep(0.02)


class FakeSource:
    """A `Discovery` in memory that fails on command."""

    def __init__(self, records: list[PeerRecord], *, name: str = "fake") -> None:
        self.records = records
        self.name = name
        self.is_down = False
        self.announced: list[SignedRecord] = []
        self.withdrawn: list[SignedRecord] = []
        self.num_closed = 0

    async def announce(self, signed: SignedRecord) -> None:
        self._check()
        self.announced.append(signed)

    async def withdraw(self, signed: SignedRecord) -> None:
        self._check()
        self.withdrawn.append(signed)

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        self._check()
        return [record for record in self.records if model_key in (None, record.model_key)]

    async def aclose(self) -> None:
        self.num_closed += 1

    def _check(self) -> None:
        if self.is_down:
            raise DiscoveryError(f"{self.name} is down")
