"""What a peer answers on its own port to those who ask it for other peers: a small tracker of its own model.

::

    GET  /api/v1/peers?model_key=...            itself and a random sample of `MAX_TOLD` peers that it knows
    POST /api/v1/announce, /api/v1/withdraw     a SignedRecord, as at a tracker; only of its own model
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import msgspec
from aiohttp import web

from remote_modules.discovery.addresses import check_announced
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.peers_answer import PEERS_PATH, encode_peers
from remote_modules.discovery.rate_limits import TokenBuckets, source_key
from remote_modules.discovery.tracker_client import ANNOUNCE_PATH, WITHDRAW_PATH
from remote_modules.discovery.tracker_replies import answer, read_signed, refuse, refuse_overload, reply_to_error
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import SignedRecord, decode_record
from remote_modules.plan.leases import Lease, lease_of

__all__ = ["MAX_TOLD", "ExchangeSite"]

_rng = Random()
MAX_TOLD = 50  # peers in one answer, itself apart
SOURCE_PER_S = 5.0  # requests of one address; this machine has no limit

_Handler = Callable[[web.Request], Awaitable[web.Response]]


class ExchangeSite:
    """Handlers for a peer's HTTP server.

    Args:
        known: the peers that it knows.
        own: its own record, once there is one.
    """

    def __init__(self, known: KnownPeers, own: Callable[[], SignedRecord | None]) -> None:
        self._known = known
        self._own = own
        self._sources = TokenBuckets(per_s=SOURCE_PER_S, burst=10 * SOURCE_PER_S, max_keys=4096)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(PEERS_PATH, self._guarded(self._peers)),
            web.post(ANNOUNCE_PATH, self._guarded(self._announce)),
            web.post(WITHDRAW_PATH, self._guarded(self._withdraw)),
        ]

    def _guarded(self, handler: _Handler) -> _Handler:
        async def guarded(request: web.Request) -> web.Response:
            source = source_key(request.remote or "")
            if source is not None and (wait_s := self._sources.take(source, self._known.clock())) > 0:
                return refuse_overload(f"more than {SOURCE_PER_S:g} requests a second from one address", wait_s)
            try:
                return await handler(request)
            except (msgspec.DecodeError, RemoteProtocolError, DiscoveryError, asyncio.TimeoutError) as exc:
                return reply_to_error(exc)

        return guarded

    async def _peers(self, request: web.Request) -> web.Response:
        model_key = request.query.get("model_key")
        leases, now_s = self._known.leases(model_key)
        told = _rng.sample(leases, min(MAX_TOLD, len(leases)))
        own = self._own_lease(now_s)
        if own is not None and model_key in (None, own.model_key):
            told.insert(0, own)
        return web.Response(body=encode_peers(told, now_s), content_type="application/json")

    async def _announce(self, request: web.Request) -> web.Response:
        signed = await read_signed(request)
        record = verify_record(signed)
        own = self._own()
        if own is None or decode_record(own.payload).model_key != record.model_key:
            return refuse(409, "this peer serves another model")
        try:
            check_announced(record, request.remote or "")
        except DiscoveryError as exc:
            return refuse(400, str(exc))
        self._known.announce(signed, record, via=request.remote or "")
        return answer({"lease_s": self._known.lease_s})

    async def _withdraw(self, request: web.Request) -> web.Response:
        self._known.withdraw(verify_record(await read_signed(request)))
        return answer({})

    def _own_lease(self, now_s: float) -> Lease | None:
        signed = self._own()
        if signed is None:
            return None
        return lease_of(signed, decode_record(signed.payload), now_s, self._known.lease_s)
