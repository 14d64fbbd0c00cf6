"""`Server`: one peer, from its checkpoint to its last session.

::

    created -> loading -> online -> draining -> stopped
                  (joining)

`Server` is synchronous and owns an event-loop thread; `_Peer` is what runs on it.
"""

from __future__ import annotations

import asyncio
import datetime
import enum
import logging
import secrets
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from remote_modules.config import ServerConfig
from remote_modules.discovery.base import Discovery
from remote_modules.discovery.merged import build_discovery
from remote_modules.errors import DiscoveryError, RemoteModulesError
from remote_modules.identity import Certificate, Identity
from remote_modules.net.http import PeerSite
from remote_modules.net.loop import LoopThread
from remote_modules.peers import PeerId, PeerRecord, PeerState, SignedRecord, short_id
from remote_modules.server.announcer import Announcer
from remote_modules.server.capacity import free_bytes
from remote_modules.server.executor import DeviceThread, Priority
from remote_modules.server.handler import Handler, HandlerLimits
from remote_modules.server.load_plan import LoadedSpan, LoadPlan
from remote_modules.server.sessions import KVBudget, SessionTable
from remote_modules.spans import Span

__all__ = ["Server", "package_version"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

SWEEP_S = 1.0
MAX_BODY_BYTES = 256 * 1024 * 1024
PLACEMENT_LOOKUP_S = 3.0


class ServerState(enum.Enum):
    CREATED = "created"
    ONLINE = "online"
    STOPPED = "stopped"


def package_version() -> str:
    try:
        return version("remote-modules")
    except PackageNotFoundError:  # run from a source tree
        return "0"


class Server:
    """One peer.

    Use as a context manager, or call `start` and `stop`. Loading happens in `start`.

    Args:
        config: what to serve.
        on_progress: called with a stage name and a fraction in 0..1 while starting.
    """

    def __init__(self, config: ServerConfig, *, on_progress: Callable[[str, float], None] | None = None) -> None:
        self.config = config
        self._identity = (
            Identity.generate() if config.identity_path is None else Identity.load_or_create(config.identity_path)
        )
        self._progress = on_progress or (lambda stage, fraction: None)
        self._loaded: LoadedSpan | None = None
        self._peer: _Peer | None = None
        self._io: LoopThread | None = None
        self._state = ServerState.CREATED
        self._frozen: threading.Event | None = None

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def span(self) -> Span:
        """Blocks held. Raises `RemoteModulesError` before `start`."""
        return self._running().loaded.model.span

    @property
    def address(self) -> str:
        """``host:port`` that it announces first. Raises `RemoteModulesError` before `start`."""
        return self._running().addresses[0]

    def start(self) -> None:
        """Load the span, listen, and announce; returns once the peer is online.

        Raises:
            CheckpointError, UnsupportedCallError: the model cannot be served.
            ValueError: the span is outside the model, or nothing fits.
            RemoteModulesError: the port is in use.
        """
        self._io = LoopThread(f"remote-modules-peer-{short_id(self.peer_id)}")
        try:
            self._peer = _Peer(self.config, self._identity, self._progress)
            self._io.run(self._peer.start())
        except BaseException:
            self.stop()
            raise
        self._state = ServerState.ONLINE

    def drain(self, timeout_s: float | None = None) -> None:
        """Take no new sessions, wait for the running ones (by default `ServerConfig.drain_s`), then stop."""
        peer, io = self._peer, self._io
        if peer is not None and io is not None and self._state is ServerState.ONLINE:
            io.run(peer.drain(self.config.drain_s if timeout_s is None else timeout_s))
        self.stop()

    def stop(self) -> None:
        """Withdraw, close all connections and free the model; idempotent."""
        self.thaw()
        io, self._io = self._io, None
        peer, self._peer = self._peer, None
        self._state = ServerState.STOPPED
        if io is not None:
            if peer is not None:
                io.run(peer.stop())
            io.stop()

    def kill(self) -> None:
        """Vanish as a killed process does: sockets are reset, nobody is told. For tests."""
        self.thaw()
        io, self._io = self._io, None
        peer, self._peer = self._peer, None
        self._state = ServerState.STOPPED
        if io is not None and peer is not None:
            io.run(peer.vanish())
            io.stop()

    def freeze(self) -> None:
        """Stop the event loop as SIGSTOP does: sockets stay open, nothing is answered. For tests."""
        if self._io is not None and self._frozen is None:
            self._frozen = threading.Event()
            self._io.call_soon(self._frozen.wait)

    def thaw(self) -> None:
        """Undo `freeze`."""
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            frozen.set()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _running(self) -> _Peer:
        if self._peer is None:
            raise RemoteModulesError("server is not running; call start() first")
        return self._peer


class _Peer:
    """The running peer; all methods on its event loop."""

    def __init__(
        self, config: ServerConfig, identity: Identity, on_progress: Callable[[str, float], None]
    ) -> None:
        self.config = config
        self.loaded: LoadedSpan
        self.addresses: tuple[str, ...] = ()
        self._identity = identity
        self._progress = on_progress
        self._instance_id = secrets.token_hex(8)
        self._discovery: Discovery = build_discovery(
            trackers=config.trackers,
            mdns=config.mdns,
            peers=config.peers,
            mdns_interfaces=_mdns_interfaces(config),
        )
        self._executor: DeviceThread | None = None
        self._handler: Handler | None = None
        self._site: PeerSite | None = None
        self._announcer: Announcer | None = None
        self._certificate: Certificate | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        config = self.config
        self._executor = DeviceThread(max_queue=config.max_queue)
        if not config.is_local:
            self._certificate = self._identity.certificate(now=datetime.datetime.now(datetime.timezone.utc))
        plan = await self._on_device(lambda: LoadPlan.read(config))
        span = await self._choose_span(plan)
        self._progress("loading", 0.1)
        self.loaded = await self._on_device(lambda: plan.load(span))
        self._progress("measuring", 0.8)
        await self._on_device(self.loaded.measure)
        self._handler = self._new_handler()
        self._site = PeerSite(
            host=config.host,
            port=config.port,
            certificate=self._certificate,
            record=self._signed_record,
            metrics=self._metrics(),
            accept=self._handler.accept,
        )
        port = await self._site.start()
        self.addresses = config.announce_addresses or (f"{_bracketed(config.host)}:{port}",)
        self._announcer = Announcer(
            self._discovery, self._identity, describe=self._describe, interval_s=config.announce_interval_s
        )
        await self._announcer.set_state(PeerState.ONLINE)
        self._announcer.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        self._progress("online", 1.0)
        logger.info("online peer=%s span=%s address=%s", short_id(self._identity.peer_id), span, self.addresses[0])

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions and wait for the running ones to end or move."""
        assert self._handler is not None
        assert self._announcer is not None
        logger.info("draining sessions=%d", len(self._handler.sessions))
        self._handler.start_draining()
        await self._announcer.set_state(PeerState.DRAINING)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and (len(self._handler.sessions) or self._handler.executor.load):
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._announcer is not None:
            await self._announcer.stop()
        await self._discovery.aclose()
        await self._shut()

    async def vanish(self) -> None:
        if self._handler is not None:
            self._handler.abort()
        if self._announcer is not None and self._announcer._task is not None:
            self._announcer._task.cancel()
        await self._shut()
        await self._discovery.aclose()

    async def _shut(self) -> None:
        if self._handler is not None:
            self._handler.abort()
        if self._site is not None:
            await self._site.aclose()
        if self._executor is not None:
            self._executor.stop()

    async def _on_device(self, work: Callable[[], _T]) -> _T:
        assert self._executor is not None
        return (await self._executor.run(Priority.TRAINING, work)).value

    async def _choose_span(self, plan: LoadPlan) -> Span:
        if self.config.blocks is not None:
            return Span.parse(self.config.blocks)
        try:
            records = await asyncio.wait_for(self._discovery.lookup(plan.key), PLACEMENT_LOOKUP_S)
        except (DiscoveryError, asyncio.TimeoutError) as exc:
            logger.warning("choosing a span without knowing the others: %s", exc)
            records = []
        return plan.choose([record for record in records if record.peer_id != self._identity.peer_id])

    def _new_handler(self) -> Handler:
        assert self._executor is not None
        config, loaded = self.config, self.loaded
        budget_bytes = config.kv_budget_bytes or free_bytes(loaded.model.device) // 2
        sessions = SessionTable(
            KVBudget(budget_bytes, loaded.kv_token_bytes),
            max_sessions=config.max_sessions,
            idle_s=config.session_idle_s,
            orphan_s=config.orphan_session_s,
        )
        return Handler(
            loaded.engine,
            self._executor,
            sessions,
            identity=self._identity,
            instance_id=self._instance_id,
            num_blocks=loaded.num_blocks,
            limits=HandlerLimits(
                max_batch_tokens=config.max_batch_tokens,
                max_body_bytes=MAX_BODY_BYTES,
                max_connections=config.max_connections,
            ),
            clock=time.monotonic,
            certificate_sha256=self._certificate.sha256 if self._certificate else "",
            software=f"remote-modules {package_version()}",
        )

    def _describe(self) -> PeerRecord:
        assert self._handler is not None
        loaded = self.loaded
        span = loaded.model.span
        return PeerRecord(
            peer_id=self._identity.peer_id,
            instance_id=self._instance_id,
            sequence=0,
            model=_display_name(loaded.checkpoint.name),
            model_key=loaded.key,
            block_digests=loaded.digests if all(loaded.digests) else (),
            num_blocks=loaded.num_blocks,
            start=span.start,
            end=span.end,
            addresses=self.addresses,
            state=PeerState.JOINING,
            certificate_sha256=self._certificate.sha256 if self._certificate else None,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            quantization=self.config.quantization,
            prefill_tokens_per_s=round(loaded.speeds.prefill_tokens_per_s, 1),
            decode_tokens_per_s=round(loaded.speeds.decode_tokens_per_s, 1),
            free_kv_tokens=self._handler.sessions.budget.free_tokens,
            load=self._handler.executor.load,
            version=package_version(),
        )

    def _signed_record(self) -> SignedRecord | None:
        return self._announcer.signed if self._announcer is not None else None

    def _metrics(self) -> Callable[[], bytes]:
        handler = self._handler
        assert handler is not None
        registry = CollectorRegistry()
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "remote_modules_sessions": ("Open sessions.", lambda: len(handler.sessions)),
            "remote_modules_kv_bytes": ("Reserved KV cache.", lambda: handler.sessions.budget.used_bytes),
            "remote_modules_load": ("Requests queued or running.", lambda: handler.executor.load),
            "remote_modules_connections": ("Open connections.", lambda: handler.num_connections),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)
        requests = Gauge("remote_modules_requests", "Requests taken since start.", ["kind"], registry=registry)
        for kind in ("step", "forward", "backward"):
            requests.labels(kind).set_function(lambda kind=kind: handler.num_requests.get(kind, 0))
        return lambda: generate_latest(registry)

    async def _sweep(self) -> None:
        assert self._handler is not None
        while True:
            await asyncio.sleep(SWEEP_S)
            self._handler.expire_sessions()


def _mdns_interfaces(config: ServerConfig) -> tuple[str, ...]:
    host = config.host.strip("[]")
    if host in ("0.0.0.0", "::", ""):
        return ()
    return ("127.0.0.1",) if config.is_local else (host,)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _display_name(name: str) -> str:
    """What to call the model in public: a hub id, or the last part of a local path (paths tell too much)."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name

