"""The tracker: an HTTP service that holds leases and shows the swarm; no tensors, and it dials nobody.

::

    POST /api/v1/announce, /api/v1/withdraw     a SignedRecord as JSON, bytes in base64
    GET  /api/v1/peers?model_key=...            {"peers": [SignedRecord, ...]}, for clients to verify
    GET  /api/v1/state                          coverage and peers for people and tools, without addresses
    GET  /  /health  /metrics                   swarm page, liveness, Prometheus text

Whoever asks gets at most `MAX_LOOKUP_BYTES`: a random sample, if the swarm is larger. Behind a reverse proxy
every announcement seems to come from the proxy, so on loopback the address rule is off; clients apply it
again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import Awaitable, Callable

import msgspec
import prometheus_client
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from remote_modules.config import TrackerConfig
from remote_modules.discovery.addresses import check_announced
from remote_modules.discovery.page import render_page
from remote_modules.discovery.swarm_state import summarize
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord, short_id
from remote_modules.plan.leases import Lease, LeaseTable, TableFullError

__all__ = ["TrackerServer"]

logger = logging.getLogger(__name__)


def _is_our_fault(entry: logging.LogRecord) -> bool:
    return entry.exc_info is None or not isinstance(entry.exc_info[1], HttpProcessingError)


# aiohttp logs a traceback for each request that is no HTTP: whoever scans the port would fill the operator's disk.
_http_logger = logging.getLogger(f"{__name__}.http")
_http_logger.addFilter(_is_our_fault)

MAX_LOOKUP_BYTES = 896 * 1024  # clients stop reading at 1 MiB
BODY_TIMEOUT_S = 10.0  # for one request body: a slow sender holds a connection no longer
ANNOUNCES_PER_LEASE = 3  # a peer may miss two announcements in a row and stay listed

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "remote-modules",  # in place of the versions of Python and aiohttp
}

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(SignedRecord)


class TrackerServer:
    """One tracker. `start` it inside a running loop, `aclose` it there.

    Attributes:
        url: where it listens, once started.
        port: the bound port, once started.
    """

    def __init__(self, config: TrackerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = ""
        self.port = config.port
        self._config = config
        self._clock = clock
        self._table = LeaseTable(max_records=config.max_records)
        self._metrics = _Metrics()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            DiscoveryError: the port is in use, or the host is none of this machine's.
        """
        # Bodies are never decompressed, so that the byte cap counts what we hold in memory.
        runner = web.AppRunner(
            self._build_app(), access_log=None, logger=_http_logger, auto_decompress=False, shutdown_timeout=1.0
        )
        await runner.setup()
        site = web.TCPSite(runner, self._config.host, self._config.port)
        try:
            await site.start()
        except OSError as exc:
            await runner.cleanup()
            where = f"port {self._config.port} on {self._config.host}"
            if exc.errno == errno.EADDRINUSE:
                raise DiscoveryError(f"{where} is in use; pass --port 0 for any free one") from exc
            raise DiscoveryError(f"tracker cannot listen on {where}: {exc.strerror or exc}") from exc
        self._runner = runner
        self.port = int(runner.addresses[0][1])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        logger.info("tracker listening url=%s", self.url)

    async def aclose(self) -> None:
        """Stop listening and forget all leases; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def _build_app(self) -> web.Application:
        app = web.Application(client_max_size=self._config.max_body_bytes, middlewares=[self._finish])
        app.router.add_post("/api/v1/announce", self._announce)
        app.router.add_post("/api/v1/withdraw", self._withdraw)
        app.router.add_get("/api/v1/peers", self._peers)
        app.router.add_get("/api/v1/state", self._state)
        app.router.add_get("/", self._page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        return app

    @web.middleware
    async def _finish(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Turn every refusal into one line of JSON, count the request, add the headers."""
        response: web.StreamResponse
        try:
            response = await handler(request)
        except web.HTTPException as exc:  # raised by aiohttp itself: 404, 405, 413, bad requests
            response = _refuse(exc.status, exc.reason.lower())
        except (msgspec.DecodeError, RemoteProtocolError) as exc:
            response = _refuse(400, str(exc))
        except TableFullError as exc:
            response = _refuse(503, str(exc))
        except DiscoveryError as exc:
            response = _refuse(409, str(exc))
        except ConnectionError:  # nobody is left to read it, but it is counted
            response = _refuse(400, "connection was lost before the body was complete")
        except asyncio.TimeoutError:
            response = _refuse(408, f"body did not arrive within {BODY_TIMEOUT_S} s")
            response.force_close()
        response.headers.update(_HEADERS)
        self._metrics.count(request, response.status)
        return response

    async def _announce(self, request: web.Request) -> web.Response:
        signed, record = await self._read_record(request)
        try:
            check_announced(record, request.remote or "")
        except DiscoveryError as exc:
            return _refuse(400, str(exc))
        self._table.announce(signed, record, self._clock(), self._config.lease_s)
        logger.debug("< announce peer=%s span=%s sequence=%d", short_id(record.peer_id), record.span, record.sequence)
        lease_s = self._config.lease_s
        return _answer({"lease_s": lease_s, "reannounce_after_s": lease_s / ANNOUNCES_PER_LEASE})

    async def _withdraw(self, request: web.Request) -> web.Response:
        _, record = await self._read_record(request)
        self._table.withdraw(record, self._clock())
        logger.debug("< withdraw peer=%s", short_id(record.peer_id))
        return _answer({})

    async def _peers(self, request: web.Request) -> web.Response:
        leases = self._table.lookup(request.query.get("model_key"), self._clock())
        return web.Response(body=_encode_sample(leases), content_type="application/json")

    async def _state(self, request: web.Request) -> web.Response:
        now_s = self._clock()
        return _answer(summarize(self._table.lookup(None, now_s), now_s))

    async def _page(self, request: web.Request) -> web.Response:
        now_s = self._clock()
        page = render_page(summarize(self._table.lookup(None, now_s), now_s))
        return web.Response(text=page, content_type="text/html")

    async def _health(self, request: web.Request) -> web.Response:
        return _answer({"status": "ok"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self._metrics.records.set(len(self._table.lookup(None, self._clock())))
        text = prometheus_client.generate_latest(self._metrics.registry)
        return web.Response(body=text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def _read_record(self, request: web.Request) -> tuple[SignedRecord, PeerRecord]:
        body = await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
        signed = _decoder.decode(body)
        return signed, verify_record(signed)


class _Metrics:
    """Counters of one tracker. Labels are closed sets: our own routes, and status codes that we send."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.records = prometheus_client.Gauge("remote_modules_tracker_records", "Live leases.", registry=self.registry)
        self._requests = prometheus_client.Counter(
            "remote_modules_tracker_requests",
            "Requests answered, by route and status.",
            ("route", "status"),
            registry=self.registry,
        )

    def count(self, request: web.Request, status: int) -> None:
        resource = request.match_info.route.resource
        self._requests.labels(resource.canonical if resource else "other", str(status)).inc()


def _answer(value: object) -> web.Response:
    return web.Response(body=_encoder.encode(value), content_type="application/json")


def _refuse(status: int, error: str) -> web.Response:
    return web.Response(status=status, body=_encoder.encode({"error": error}), content_type="application/json")


def _encode_sample(leases: list[Lease]) -> bytes:
    """As many of the records, in random order, as fit into `MAX_LOOKUP_BYTES`."""
    shuffled = random.sample(leases, len(leases))
    encoded: list[bytes] = []
    num_bytes = 0
    for lease in shuffled:
        text = _encoder.encode(lease.signed)
        num_bytes += len(text) + 1
        if num_bytes > MAX_LOOKUP_BYTES:
            break
        encoded.append(text)
    return b'{"peers":[' + b",".join(encoded) + b"]}"
