"""aiohttp on both ends: a peer's one port, and dialling it.

A connection starts as ``GET /api/v1/connect`` with ``Upgrade: remote-modules/1``; after the 101 the transport is
handed to `net.connection`. Where a proxy refuses that upgrade, a WebSocket takes its place (`net.websocket`). The same
port answers ``/api/v1/record``, ``/health`` and ``/metrics``.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import aiohttp
import msgspec
from aiohttp import web

from remote_modules.config import ClientConfig
from remote_modules.errors import PeerError, PeerTimeout, PeerUnreachable, RemoteModulesError
from remote_modules.identity import Certificate
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.connection import Connection
from remote_modules.net.websocket import MESSAGE_LIMIT, WebSocketTransport
from remote_modules.peers import PeerId, PeerRecord, SignedRecord, short_id

__all__ = ["Dialer", "HttpDialer", "PeerSite"]

CONNECT_PATH = "/api/v1/connect"
WEBSOCKET_PATH = "/api/v1/websocket"
UPGRADE = "remote-modules/1"
PROXY_REFUSALS = (400, 426, 501, 502)  # a peer itself has no reason for them
MAX_PROXIED = 1024  # addresses that are remembered


class Dialer(Protocol):
    """Opens connections to peers: over HTTP, or in memory in a simulation."""

    async def dial(self, record: PeerRecord) -> ClientConnection:
        """A connection to the record's peer, hello done.

        Raises:
            PeerError: the peer cannot be reached, or is another one.
        """

    async def aclose(self) -> None:
        """Free what the dialer holds; its connections may be closed with it."""


class HttpDialer:
    """Dials the record's addresses in order.

    Args:
        config: timeouts and limits.
        software: what we say we are.
    """

    def __init__(self, config: ClientConfig, *, software: str) -> None:
        self._config = config
        self._software = software
        self._session: aiohttp.ClientSession | None = None
        self._proxied: dict[str, None] = {}  # addresses that pass WebSockets only, the last learnt last
        self._carriers: set[asyncio.Task[None]] = set()  # of bytes of WebSockets

    async def dial(self, record: PeerRecord) -> ClientConnection:
        errors: list[str] = []
        kind: type[PeerError] = PeerTimeout
        for address in record.addresses:
            try:
                return await asyncio.wait_for(self._dial(record, address), self._config.connect_timeout_s)
            except asyncio.TimeoutError:
                errors.append(f"{address}: no answer within {self._config.connect_timeout_s:.1f} s")
            except (aiohttp.ClientError, OSError, PeerError) as exc:
                errors.append(f"{address}: {_why(exc)}")
                kind = PeerUnreachable
        text = f"cannot reach peer '{short_id(record.peer_id)}' at {'; '.join(errors)}"
        raise kind(text, peer_id=record.peer_id)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _dial(self, record: PeerRecord, address: str) -> ClientConnection:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        if address in self._proxied:
            try:
                return await self._dial_websocket(self._session, record, address)
            except BaseException:
                self._proxied.pop(address, None)  # next time all is tried anew
                raise
        try:
            return await self._dial_upgrade(self._session, record, address)
        except _UpgradeRefused as refused:
            try:
                connection = await self._dial_websocket(self._session, record, address)
            except (aiohttp.ClientError, OSError, PeerError) as exc:
                text = f"{_why(refused)}, and to a WebSocket: {_why(exc)}"
                raise PeerUnreachable(text, peer_id=record.peer_id) from exc
        while len(self._proxied) >= MAX_PROXIED:
            del self._proxied[next(iter(self._proxied))]
        self._proxied[address] = None
        return connection

    async def _dial_upgrade(self, session: aiohttp.ClientSession, record: PeerRecord, address: str) -> ClientConnection:
        try:
            response = await session.get(
                _url(record, address, CONNECT_PATH),
                headers={"Connection": "Upgrade", "Upgrade": UPGRADE},
                ssl=_verification(record),
                allow_redirects=False,
                read_until_eof=False,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        except aiohttp.ServerDisconnectedError as exc:
            raise _UpgradeRefused("hung up instead of an upgrade", peer_id=record.peer_id) from exc
        http = response.connection
        if response.status != 101 or http is None or http.transport is None:
            response.close()
            kind = _UpgradeRefused if response.status in PROXY_REFUSALS else PeerUnreachable
            raise kind(f"answered {response.status} instead of an upgrade", peer_id=record.peer_id)
        connection = self._new_connection(record)
        _take_over(http.transport, connection)
        # aiohttp closes the transport of a response that is collected: it must live as long as the connection, and
        # end with it
        connection.on_close(lambda _: response.close())
        await connection.handshake(self._config.connect_timeout_s)
        return connection

    async def _dial_websocket(
        self, session: aiohttp.ClientSession, record: PeerRecord, address: str
    ) -> ClientConnection:
        url = _url(record, address, WEBSOCKET_PATH)
        websocket = await session.ws_connect(url, ssl=_verification(record), max_msg_size=MESSAGE_LIMIT, compress=0)
        connection = self._new_connection(record)
        carrier = asyncio.ensure_future(WebSocketTransport(websocket, connection).run())
        self._carriers.add(carrier)
        carrier.add_done_callback(self._carriers.discard)
        await connection.handshake(self._config.connect_timeout_s)
        return connection

    def _new_connection(self, record: PeerRecord) -> ClientConnection:
        return ClientConnection(
            PeerId(record.peer_id),
            nonce=secrets.token_bytes(32),
            certificate_sha256=record.certificate_sha256 or "",
            silence_timeout_s=self._config.silence_timeout_s,
            max_body_bytes=self._config.max_request_bytes,
            software=self._software,
            keep_warm_s=self._config.keep_warm_s,
        )


class _UpgradeRefused(PeerUnreachable):
    """As a proxy does that passes no upgrade but to WebSocket."""


class PeerSite:
    """A peer's listening port.

    Args:
        host, port: where to listen; port 0 takes any free one.
        certificate: TLS is on when given.
        record: gives the record to show, when there is one.
        metrics: gives the text of ``/metrics``.
        accept: makes the server's side of a new connection, or None when there are too many.
        routes: what else the port answers.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        certificate: Certificate | None,
        record: Callable[[], SignedRecord | None],
        metrics: Callable[[], bytes],
        accept: Callable[[], Connection | None],
        routes: Sequence[web.RouteDef] = (),
    ) -> None:
        self._host = host
        self._port = port
        self._certificate = certificate
        self._record = record
        self._metrics = metrics
        self._accept = accept
        self._routes = routes
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Listen; the port.

        Raises:
            RemoteModulesError: the port is in use, or the host is not ours.
        """
        app = web.Application(client_max_size=64 * 1024)
        app.router.add_get(CONNECT_PATH, self._connect)
        app.router.add_get(WEBSOCKET_PATH, self._connect_websocket)
        app.router.add_get("/api/v1/record", self._show_record)
        app.router.add_get("/health", self._show_health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_routes(self._routes)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=_server_context(self._certificate))
        try:
            await site.start()
        except OSError as exc:
            await self.aclose()
            raise RemoteModulesError(
                f"cannot listen on {self._host}:{self._port}: {exc.strerror or exc}; "
                "choose another --port (0: any free one)"
            ) from exc
        port: int = self._runner.addresses[0][1]
        return port

    async def aclose(self) -> None:
        """Stop listening and drop connections; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != UPGRADE:
            return web.Response(status=426, text=f"upgrade to {UPGRADE} expected\n", headers={"Upgrade": UPGRADE})
        connection = self._accept()
        if connection is None:
            return web.Response(status=503, text="not ready, or too many connections\n")
        response = web.StreamResponse(status=101, headers={"Connection": "Upgrade", "Upgrade": UPGRADE})
        try:
            await response.prepare(request)
            await response.write(b"")  # flushes the head
            if request.transport is None:
                raise ConnectionResetError("client is gone")
            _take_over(request.transport, connection)
        except ConnectionError:  # the client is gone already
            connection.connection_lost(None)  # else it would count as open for ever
            return response
        try:
            await connection.closed.wait()
        finally:
            connection.abort()
        return response

    async def _connect_websocket(self, request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers:  # a page in a browser of this machine is no client
            return web.Response(status=403, text="not for web pages\n")
        websocket = web.WebSocketResponse(max_msg_size=MESSAGE_LIMIT, compress=False)
        if not websocket.can_prepare(request).ok:
            return web.Response(status=426, text="upgrade to websocket expected\n", headers={"Upgrade": "websocket"})
        connection = self._accept()
        if connection is None:
            return web.Response(status=503, text="not ready, or too many connections\n")
        try:
            await websocket.prepare(request)
        except BaseException:
            connection.connection_lost(None)  # else it would count as open for ever
            raise
        await WebSocketTransport(websocket, connection).run()
        return websocket

    async def _show_record(self, request: web.Request) -> web.Response:
        signed = self._record()
        if signed is None:
            return web.json_response({"error": "peer is still joining"}, status=503)
        return web.Response(body=msgspec.json.encode(signed), content_type="application/json")

    async def _show_health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), content_type="text/plain")


def _url(record: PeerRecord, address: str, path: str) -> str:
    return f"{'http' if record.certificate_sha256 is None else 'https'}://{address}{path}"


def _verification(record: PeerRecord) -> aiohttp.Fingerprint | bool:
    return True if record.certificate_sha256 is None else _fingerprint(record)


def _fingerprint(record: PeerRecord) -> aiohttp.Fingerprint:
    try:
        return aiohttp.Fingerprint(bytes.fromhex(record.certificate_sha256 or ""))
    except ValueError as exc:
        raise PeerUnreachable("its record names no SHA-256 of a certificate", peer_id=record.peer_id) from exc


def _why(exc: Exception) -> str:
    """One line for a person: aiohttp's own texts hold newlines, raw digests and object addresses."""
    text = str(exc)
    if isinstance(exc, aiohttp.ServerFingerprintMismatch):
        text = "its TLS certificate is not the one that its record names"
    elif isinstance(exc, aiohttp.ClientConnectorError):
        text = str(exc.os_error)
    elif isinstance(exc, aiohttp.WSServerHandshakeError):
        text = f"answered {exc.status}"
    elif isinstance(exc, aiohttp.ClientResponseError):
        text = exc.message
    return " ".join(text.split()) or type(exc).__name__


def _take_over(transport: asyncio.Transport, connection: Connection) -> None:
    connection.on_close(transport.get_protocol().connection_lost)
    transport.set_protocol(connection)
    connection.connection_made(transport)


def _server_context(certificate: Certificate | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:  # ssl reads certificates from files only
        path = Path(folder) / "certificate.pem"
        path.touch(mode=0o600)
        path.write_bytes(certificate.certificate_pem + certificate.key_pem)
        context.load_cert_chain(path)
    return context
