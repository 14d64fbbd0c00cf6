"""One running peer, on one event loop: from its checkpoint to its last session.

::

    listening -> joining (loading, measuring) -> online -> draining -> stopped
                                    ^                          |
                                    +---------- move ----------+
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import secrets
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from random import Random
from typing import TypeVar

import msgspec
import torch

from remote_modules.config import ClientConfig, ServerConfig
from remote_modules.discovery.exchange_site import ExchangeSite
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.record_fetch import answers
from remote_modules.errors import DiscoveryError, RemoteModulesError
from remote_modules.identity import Certificate, Identity
from remote_modules.net.addresses import dialable_host
from remote_modules.net.http import HttpDialer, PeerSite
from remote_modules.peers import PeerRecord, PeerState, SignedRecord, short_id
from remote_modules.plan.leases import DuplicateIdentityError
from remote_modules.plan.rebalance import MoveCost, Rule
from remote_modules.plan.throughput import Layout
from remote_modules.server.announcer import Announcer
from remote_modules.server.capacity import free_unused
from remote_modules.server.executor import DeviceThread
from remote_modules.server.handler import Handler
from remote_modules.server.jobs import Priority
from remote_modules.server.limits import HandlerLimits
from remote_modules.server.load_plan import LoadedSpan, LoadPlan
from remote_modules.server.membership import discovery_of, display_name, is_announced
from remote_modules.server.metrics import peer_metrics
from remote_modules.server.rebalancer import Rebalancer
from remote_modules.server.sessions import KVBudget, SessionTable
from remote_modules.server.supervisor import DeviceSupervisor
from remote_modules.spans import Span

__all__ = ["Peer", "package_version"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

SWEEP_S = 1.0
HANDOVER_S = 1.0  # for a session to go elsewhere, taken for the cost of a move
DRAIN_POLL_S = 0.05
URGENT_DRAIN_S = 2.0
PLACEMENT_LOOKUP_S = 3.0
PROBE_S = 3.0


def package_version() -> str:
    try:
        return version("remote-modules")
    except PackageNotFoundError:  # run from a source tree
        return "0"


class Peer:
    """The running peer; all methods on its event loop."""

    def __init__(self, config: ServerConfig, identity: Identity, on_progress: Callable[[str, float], None]) -> None:
        self.config = config
        self.loaded: LoadedSpan
        self._plan: LoadPlan
        self._span: Span
        self.addresses: tuple[str, ...] = ()
        self.listening_address = ""
        self._identity = identity
        self._progress = on_progress
        self._instance_id = secrets.token_hex(8)
        self._known = KnownPeers.kept_in(config.peer_cache, own_peer_id=identity.peer_id)
        self._discovery = discovery_of(config, self._known)
        self.failure: DuplicateIdentityError | None = None
        self._executor: DeviceThread | None = None
        self._handler: Handler | None = None
        self._site: PeerSite | None = None
        self._announcer: Announcer | None = None
        self._certificate: Certificate | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._supervisor: DeviceSupervisor | None = None
        self._moving = asyncio.Lock()
        self._claimed: Span | None = None
        self._rebalancing: asyncio.Task[None] | None = None
        self._dialer = HttpDialer(ClientConfig(), software=f"remote-modules {package_version()}")

    @property
    def span(self) -> Span:
        """Blocks held, or being loaded."""
        return self._span

    async def start(self) -> None:
        """Listen first (a port in use must not cost a load), announce as joining, load, measure, go online."""
        config = self.config
        self._executor = DeviceThread(max_queue=config.max_queue, is_fatal=_is_fatal)
        if not config.is_local:
            self._certificate = self._identity.certificate(now=datetime.datetime.now(datetime.timezone.utc))
        self._plan = await self._on_device(lambda: LoadPlan.read(config))
        await self._listen()
        self._span = await self._choose_span(self._plan)
        announcer = self._new_announcer()
        await announcer.set_state(PeerState.JOINING)
        announcer.start()
        self._progress("loading", 0.1)
        self.loaded = await self._on_device(lambda: self._plan.load(self._span))
        self._progress("measuring", 0.8)
        await self._on_device(self.loaded.prepare)
        self._handler = self._new_handler(self.loaded)
        await announcer.set_state(PeerState.ONLINE)
        self._supervise(announcer, self.loaded.model.device)
        loop = asyncio.get_running_loop()
        self._sweeper = loop.create_task(self._sweep())
        if config.rebalance and config.blocks is None and is_announced(config):
            self._rebalancing = loop.create_task(self._rebalancer().run())
        self._progress("online", 1.0)
        name = short_id(self._identity.peer_id)
        logger.info("online peer=%s span=%s address=%s", name, self._span, self.addresses[0])

    def _supervise(self, announcer: Announcer, device: torch.device) -> None:
        assert self._executor is not None

        async def drop_all() -> None:
            if self._handler is not None:  # None while it moves
                self._handler.drop_state()
            await announcer.set_state(PeerState.JOINING)

        async def return_online() -> None:
            if self._handler is not None:
                await announcer.set_state(PeerState.DRAINING if self._handler.is_draining else PeerState.ONLINE)

        self._supervisor = DeviceSupervisor(
            self._executor,
            probe=lambda: torch.ones(8, device=device).sum().item(),
            on_down=drop_all,
            on_up=return_online,
        )
        self._supervisor.start()

    async def _listen(self) -> None:
        self._site = PeerSite(
            host=self.config.host,
            port=self.config.port,
            certificate=self._certificate,
            record=self._signed,
            metrics=peer_metrics(lambda: self._handler, self._num_restarts),
            accept=lambda: self._handler.accept() if self._handler is not None else None,
            routes=ExchangeSite(self._known, self._signed).routes() if self.config.peer_exchange else (),
        )
        port = await self._site.start()
        self.listening_address = f"{dialable_host(self.config.host)}:{port}"
        self.addresses = self.config.announce_addresses or (self.listening_address,)

    def _new_announcer(self) -> Announcer:
        self._announcer = Announcer(
            self._discovery,
            self._identity,
            describe=self._describe,
            interval_s=self.config.announce_interval_s,
            first_sequence=int(time.time() * 1000),
            on_replaced=self._give_way,
        )
        return self._announcer

    def _signed(self) -> SignedRecord | None:
        """What was announced last; a peer that gave way has none."""
        return self._announcer.signed if self._announcer is not None and self.failure is None else None

    def _give_way(self, reason: DuplicateIdentityError) -> None:
        """A newer instance has our identity: clients that look for it must not find us. Whoever runs this stops it."""
        self.failure = reason
        if self._handler is not None:
            self._handler.start_draining()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions and wait for the running ones to end or move; the peer moves no more itself."""
        await self._stop_rebalancing()
        if self._handler is not None:  # it was in the middle of a move
            await self._drain(self._handler, timeout_s)

    async def _drain(self, handler: Handler, timeout_s: float) -> None:
        assert self._announcer is not None
        logger.info("draining sessions=%d", len(handler.sessions))
        handler.start_draining()
        await self._announcer.set_state(PeerState.DRAINING)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and not handler.is_idle:  # noqa: ASYNC110 - several sources
            await asyncio.sleep(DRAIN_POLL_S)
        logger.info("drained sessions_left=%d", len(handler.sessions))

    async def move(self, span: Span, *, is_urgent: bool = False) -> None:
        """Hold other blocks under the same identity: drain, load ``span``, go online as a new instance.

        Clients take their sessions elsewhere meanwhile, for at most `ServerConfig.drain_s`; later ones are replayed.
        Where nobody holds the new blocks, sessions that need them cannot go on: so an urgent move waits for 2 s only.
        Both spans are in memory for a moment if there is room; else the old one is freed first.

        Raises:
            RemoteModulesError, ValueError, RuntimeError: ``span`` cannot be loaded; the old one is served again.
        """
        if span == self._span:
            return
        self._plan.check(span)
        old_span = self._span
        async with self._moving:
            drain_s = min(self.config.drain_s, URGENT_DRAIN_S) if is_urgent else self.config.drain_s
            await self._drain(self._running_handler(), drain_s)
            try:
                await self._serve(span)
            except (RemoteModulesError, ValueError, RuntimeError, OSError):
                logger.warning("blocks %s are not held, going back to %s", span, old_span)
                await self._serve(old_span)
                raise
        logger.info("moved from=%s to=%s", old_span, span)

    def _rebalancer(self) -> Rebalancer:
        plan = self._plan
        return Rebalancer(
            self,
            self._identity.peer_id,
            Layout.of(plan.num_blocks, plan.cuts),
            lookup=lambda: asyncio.wait_for(self._discovery.lookup(plan.key), PLACEMENT_LOOKUP_S),
            answers=lambda record: answers(record, timeout_s=PROBE_S),
            token_bytes=plan.token_bytes,
            rule=Rule(),
            rng=Random(),
            clock=time.monotonic,
        )

    def move_cost(self) -> MoveCost:
        """Of a move now: loading as long as it took before, and a second for each session to go elsewhere."""
        handover_s = HANDOVER_S * len(self._running_handler().sessions)
        return MoveCost(load_s=self._plan.block_load_s, handover_s=min(handover_s, self.config.drain_s))

    async def claim(self, span: Span) -> None:
        """Announce the intention to hold ``span``; what is held is served on."""
        assert self._announcer is not None
        self._claimed = span
        await self._announcer.set_state(PeerState.JOINING)

    async def release(self) -> None:
        """Take a claim back."""
        assert self._announcer is not None
        self._claimed = None
        await self._announcer.set_state(PeerState.ONLINE)

    async def _serve(self, span: Span) -> None:
        """Load ``span`` in the place of what is held, and go online with it."""
        assert self._announcer is not None
        is_beside = await self._on_device(lambda: self._plan.fits_beside(span))
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.abort()
            handler = None
        self._span, self._claimed, self._instance_id = span, None, secrets.token_hex(8)
        await self._announcer.set_state(PeerState.JOINING)
        if not is_beside:
            del self.loaded
            await self._on_device(free_unused)
        loaded = await self._on_device(lambda: self._plan.load(span))
        self.loaded = loaded
        await self._on_device(free_unused)  # before the memory for KV caches is taken
        await self._on_device(loaded.prepare)
        self._handler = self._new_handler(loaded)
        await self._announcer.set_state(PeerState.ONLINE)

    def _running_handler(self) -> Handler:
        assert self._handler is not None, "the peer is not online"
        return self._handler

    async def stop(self) -> None:
        await self._stop_rebalancing()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._announcer is not None:
            await self._announcer.stop()
        await self._discovery.aclose()
        await self._shut()

    async def _stop_rebalancing(self) -> None:
        task, self._rebalancing = self._rebalancing, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def vanish(self) -> None:
        await self._stop_rebalancing()
        if self._handler is not None:
            self._handler.abort()
        if self._announcer is not None:
            self._announcer.abandon()
        await self._shut()
        await self._discovery.aclose()

    async def _shut(self) -> None:
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._handler is not None:
            self._handler.abort()
        await self._dialer.aclose()
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

    def _new_handler(self, loaded: LoadedSpan) -> Handler:
        assert self._executor is not None
        config = self.config
        sessions = SessionTable.configured(config, KVBudget(loaded.kv_budget_bytes, loaded.kv_costs))
        return Handler(
            loaded.engine,
            self._executor,
            sessions,
            identity=self._identity,
            instance_id=self._instance_id,
            limits=HandlerLimits.configured(config, loaded.model.device),
            clock=time.monotonic,
            certificate_sha256=self._certificate.sha256 if self._certificate else "",
            software=f"remote-modules {package_version()}",
            dialer=self._dialer,
            record=self._signed,
            offload=asyncio.to_thread,
            preloaded=loaded.adapters,
        )

    def _describe(self) -> PeerRecord:
        """The record as of now; speeds, digests and KV room are known once the span is loaded."""
        span = self._claimed or self._span
        record = PeerRecord(
            peer_id=self._identity.peer_id,
            instance_id=self._instance_id,
            sequence=0,
            model=display_name(self.config.model),
            model_key=self._plan.key,
            num_blocks=self._plan.num_blocks,
            start=span.start,
            end=span.end,
            addresses=self.addresses,
            state=PeerState.JOINING,
            certificate_sha256=self._certificate.sha256 if self._certificate else None,
            dtype=str(self._plan.dtype).removeprefix("torch."),
            quantization=self.config.quantization,
            version=package_version(),
            max_blocks=self._plan.max_blocks(span),
            bandwidth_bytes_per_s=(self.config.bandwidth_mbit or 0.0) * 125_000,
        )
        if self._handler is None:
            return record
        return msgspec.structs.replace(
            record,
            adapters=tuple(self.loaded.adapters),
            block_digests=self.loaded.digests if all(self.loaded.digests) and span == self._span else (),
            prefill_tokens_per_s=round(self.loaded.speeds.prefill_tokens_per_s, 1),
            decode_tokens_per_s=round(self.loaded.speeds.decode_tokens_per_s, 1),
            free_kv_tokens=self._handler.sessions.budget.free_tokens,
            load=self._handler.executor.load,
        )

    def _num_restarts(self) -> int:
        return self._supervisor.num_restarts if self._supervisor is not None else 0

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            if self._handler is not None:  # None while it moves
                self._handler.expire_sessions()


def _is_fatal(exc: Exception) -> bool:
    """Whether the device is of no use after this error: those of an accelerator stay with its context."""
    return isinstance(exc, torch.AcceleratorError)
