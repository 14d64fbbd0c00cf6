"""The tracker: an HTTP service that holds leases and shows the swarm; no tensors, and it dials nobody.

::

    POST /api/v1/announce, /api/v1/withdraw     a SignedRecord as JSON, bytes in base64
    GET  /api/v1/peers?model_key=...            SignedRecords and their ages, for clients to verify
    GET  /api/v1/state                          coverage and peers for people and tools, without addresses
    GET  /  /health  /metrics                   swarm page, liveness, Prometheus text

Whoever asks gets at most `MAX_LOOKUP_PEERS`: a random sample, if the swarm is larger. Behind a reverse proxy
every announcement seems to come from the proxy, so on loopback the address rule and the limit for each source are off;
clients apply the first again. Leases may be shared with other trackers (`discovery.storage`).

Load is shed before it costs much: by source before the body is read, by all announcements together before a signature
is verified. Only accepted announcements, which no stranger can make, count against the peer itself.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from random import Random

import msgspec
import prometheus_client
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from remote_modules.config import TrackerConfig
from remote_modules.discovery.addresses import check_announced
from remote_modules.discovery.page import render_page
from remote_modules.discovery.peers_answer import PEERS_PATH, encode_peers
from remote_modules.discovery.rate_limits import TokenBuckets, source_key
from remote_modules.discovery.storage import LeaseStorage, Listing, MemoryStorage
from remote_modules.discovery.swarm_state import SwarmState, summarize
from remote_modules.discovery.tracker_client import ANNOUNCE_PATH, ANNOUNCES_PER_LEASE, WITHDRAW_PATH
from remote_modules.discovery.tracker_replies import answer, read_signed, refuse, refuse_overload, reply_to_error
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import short_id
from remote_modules.plan.leases import reannounce_after

__all__ = ["TrackerServer", "open_storage"]

logger = logging.getLogger(__name__)


def _is_our_fault(entry: logging.LogRecord) -> bool:
    return entry.exc_info is None or not isinstance(entry.exc_info[1], HttpProcessingError)


# aiohttp logs a traceback for each request that is no HTTP: whoever scans the port would fill the operator's disk.
_http_logger = logging.getLogger(f"{__name__}.http")
_http_logger.addFilter(_is_our_fault)

MAX_LOOKUP_PEERS = 2048  # in one answer, and what `MAX_LOOKUP_BYTES` cuts off
BURST_S = 5.0  # so many seconds' worth of requests may come at once
COUNT_S = 1.0  # live leases are counted so often: the interval of announcing follows slowly anyway
BACKLOG = 4096  # connections that wait to be accepted: a herd must not wait for TCP to try again

_rng = Random()
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "remote-modules",  # in place of the versions of Python and aiohttp
}


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
        self._storage = open_storage(config.storage, max_records=config.max_records, clock=clock)
        self._announces = TokenBuckets(per_s=config.max_announces_per_s, burst=config.max_announces_per_s, max_keys=1)
        self._sources = TokenBuckets(per_s=config.source_per_s, burst=BURST_S * config.source_per_s)
        self._identities = TokenBuckets(per_s=config.identity_per_s, burst=BURST_S * config.identity_per_s)
        self._num_peers = 0
        self._counted_s = float("-inf")
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
        site = web.TCPSite(runner, self._config.host, self._config.port, backlog=BACKLOG)
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
        """Stop listening; leases in memory are forgotten. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        await self._storage.aclose()

    def _build_app(self) -> web.Application:
        app = web.Application(client_max_size=self._config.max_body_bytes, middlewares=[self._finish])
        app.router.add_post(ANNOUNCE_PATH, self._announce)
        app.router.add_post(WITHDRAW_PATH, self._withdraw)
        app.router.add_get(PEERS_PATH, self._peers)
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
            source = source_key(request.remote or "")
            wait_s = 0.0 if source is None else self._sources.take(source, self._clock())
            if wait_s > 0:
                limit = f"more than {self._config.source_per_s:g} requests a second from one address"
                response = refuse_overload(limit, wait_s)
            else:
                response = await handler(request)
        except web.HTTPException as exc:  # raised by aiohttp itself: 404, 405, 413, bad requests
            response = refuse(exc.status, exc.reason.lower())
        except (msgspec.DecodeError, RemoteProtocolError, DiscoveryError, asyncio.TimeoutError) as exc:
            response = reply_to_error(exc)
        except ConnectionError:  # nobody is left to read it, but it is counted
            response = refuse(400, "connection was lost before the body was complete")
        response.headers.update(_HEADERS)
        self._metrics.count(request, response.status)
        return response

    async def _announce(self, request: web.Request) -> web.Response:
        signed = await read_signed(request)
        if (wait_s := self._announces.take("", self._clock())) > 0:
            # By then the bucket is full again: a second's worth of peers may come, spread over the second after.
            return refuse_overload("too many announcements at once", max(1.0, wait_s))
        record = verify_record(signed)
        try:
            check_announced(record, request.remote or "")
        except DiscoveryError as exc:
            return refuse(400, str(exc))
        if (wait_s := self._identities.wait_s(record.peer_id, self._clock())) > 0:
            limit = f"more than {self._config.identity_per_s:g} announcements a second of one peer"
            return refuse_overload(limit, wait_s)
        shortest_s = await self._shortest_interval()
        lease_s = max(self._config.lease_s, ANNOUNCES_PER_LEASE * shortest_s)
        await self._storage.announce(signed, record, lease_s)
        self._identities.take(record.peer_id, self._clock())
        logger.debug("< announce peer=%.6s span=%d:%d", record.peer_id, record.start, record.end)
        return answer({"lease_s": lease_s, "reannounce_after_s": shortest_s})

    async def _shortest_interval(self) -> float:
        """Seconds that peers must let pass between announcements, by how many there are."""
        now_s = self._clock()
        if now_s - self._counted_s >= COUNT_S:
            self._counted_s = now_s
            self._num_peers = await self._storage.count()
        return reannounce_after(
            self._num_peers,
            interval_s=self._config.lease_s / ANNOUNCES_PER_LEASE,
            max_announces_per_s=self._config.max_announces_per_s,
        )

    async def _withdraw(self, request: web.Request) -> web.Response:
        record = verify_record(await read_signed(request))
        await self._storage.withdraw(record)
        logger.debug("< withdraw peer=%s", short_id(record.peer_id))
        return answer({})

    async def _peers(self, request: web.Request) -> web.Response:
        listing = await self._storage.lookup(request.query.get("model_key"), limit=MAX_LOOKUP_PEERS)
        shuffled = _rng.sample(listing.leases, len(listing.leases))
        return web.Response(body=encode_peers(shuffled, listing.now_s), content_type="application/json")

    async def _state(self, request: web.Request) -> web.Response:
        return answer(await self._summary())

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=render_page(await self._summary()), content_type="text/html")

    async def _summary(self) -> SwarmState:
        listing: Listing = await self._storage.lookup(None)
        return summarize(listing.leases, listing.now_s)

    async def _health(self, request: web.Request) -> web.Response:
        return answer({"status": "ok"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self._metrics.records.set(await self._storage.count())
        text = prometheus_client.generate_latest(self._metrics.registry)
        return web.Response(body=text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})


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

        self._children: dict[tuple[str, int], prometheus_client.Counter] = {}  # `labels` takes 4 us

    def count(self, request: web.Request, status: int) -> None:
        resource = request.match_info.route.resource
        key = (resource.canonical if resource else "other", status)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._requests.labels(key[0], str(status))
        child.inc()


def open_storage(url: str, *, max_records: int, clock: Callable[[], float]) -> LeaseStorage:
    """The storage that ``url`` names: ``"memory"``, or ``redis://``, ``rediss://`` or ``unix://`` of a Redis or Valkey.

    No I/O.

    Raises:
        ValueError: another text, or the package for it is not installed.
    """
    if url == "memory":
        return MemoryStorage(max_records=max_records, clock=clock)
    try:
        from remote_modules.discovery.redis_storage import RedisStorage
    except ImportError as exc:
        raise ValueError(f"storage {url.partition(':')[0]} needs: pip install 'remote-modules[redis]'") from exc
    return RedisStorage(url, max_records=max_records)
