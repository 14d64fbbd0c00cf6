"""Discovery on the local network by mDNS / DNS-SD (RFC 6762, RFC 6763), for peers that nobody has configured.

A service carries only where a peer listens and which record it has; the signed record itself, too large for
mDNS, is fetched from the peer over HTTP and kept until the service names another one:

    service added or updated  -> fetched at the next lookup, once for each (instance, sequence)
    fetch failed              -> not tried again for `RETRY_S`
    service removed           -> forgotten at once

Everything on the LAN is a claim: at most `MAX_SERVICES` are followed, public addresses are never dialled, and
a record counts only if its signer is the peer that the service is named after.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
from zeroconf import DNSQuestionType, Error, InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from remote_modules.discovery.addresses import parse_ip
from remote_modules.discovery.http_json import make_session
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.mdns_service import SERVICE_TYPE, dialable, service_info, text_of
from remote_modules.discovery.record_fetch import fetch_record, reached_at
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord, short_id

__all__ = ["MdnsDiscovery"]

logger = logging.getLogger(__name__)

MAX_SERVICES = 1024  # followed at once; a record takes about 2 KiB
# Longest wait for answers when browsing starts. A peer that has just announced says nothing again for 1 s (RFC 6762,
# section 6), so that its answer was measured to come after 1.13 to 1.16 s.
FIRST_LOOKUP_S = 1.3
SETTLE_S = 0.25  # quiet for so long: all have answered (RFC 6762 lets them delay by 0.12 s)
RETRY_S = 5.0
RESOLVE_MS = 1000  # for a service that came without its address

_LOOPBACK = ("127.0.0.1",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What came of fetching the record named ``key``; a failure (None) may be retried at ``retry_at_s``."""

    key: tuple[str, str]
    record: PeerRecord | None
    retry_at_s: float


class MdnsDiscovery:
    """Peers of this LAN (IPv4), and of this machine; see `Discovery` for the contract.

    Args:
        interfaces: local IPv4 addresses to use; empty means all, loopback included.
        timeout_s: bounds each lookup.
        known: is told of the records that are fetched.

    Raises:
        ValueError: an interface is not an IPv4 address.
    """

    def __init__(
        self,
        interfaces: Sequence[str] = (),
        *,
        timeout_s: float = 3.0,
        known: KnownPeers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for interface in interfaces:
            if not isinstance(parse_ip(interface), ipaddress.IPv4Address):
                raise ValueError(f"mDNS interface must be an IPv4 address of this machine, got {interface!r}")
        self._interfaces = tuple(interfaces)
        self._timeout_s = timeout_s
        self._known = known
        self._clock = clock
        self._engines: dict[tuple[str, ...], AsyncZeroconf] = {}  # by interfaces; at most two
        self._announced: dict[str, tuple[AsyncZeroconf, AsyncServiceInfo]] = {}  # by peer id; our own
        self._browser: AsyncServiceBrowser | None = None
        self._session: aiohttp.ClientSession | None = None
        self._services: set[str] = set()
        self._found: dict[str, _Found] = {}  # by service name; only of names in _services
        self._changed = asyncio.Event()
        self._looking_up = asyncio.Lock()
        self._is_closed = False

    async def announce(self, signed: SignedRecord) -> None:
        """Publish where the peer listens; takes 0.5 s, in which RFC 6762 wants it said more than once.

        A record that names only loopback is announced on loopback only.

        Raises:
            DiscoveryError: mDNS is not available here, or the record names no IPv4 address or is invalid.
        """
        try:
            record = verify_record(signed)
        except RemoteProtocolError as exc:
            raise DiscoveryError(f"mDNS refused the record: {exc}") from exc
        info, is_local = service_info(record)
        engine = self._engine(_LOOPBACK if is_local else self._interfaces)
        previous = self._announced.get(record.peer_id)
        try:
            if previous is not None and previous[0] is engine:
                sending = await engine.async_update_service(info)
            else:
                await self._unregister(record.peer_id)
                # Without the check for the name: after a crash our own ghost still answers to it in the
                # caches.
                sending = await engine.async_register_service(info, cooperating_responders=True)
            self._announced[record.peer_id] = (engine, info)
            await sending
        except (Error, OSError) as exc:
            raise DiscoveryError(f"mDNS announcement failed: {exc!r}") from exc

    async def withdraw(self, signed: SignedRecord) -> None:
        """Say goodbye for a peer that was announced here; others are left alone."""
        try:
            record = verify_record(signed)
        except RemoteProtocolError as exc:
            raise DiscoveryError(f"mDNS refused the record: {exc}") from exc
        await self._unregister(record.peer_id)

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """Records of the peers that this LAN names now; the first call waits for answers, up to `FIRST_LOOKUP_S`.

        Raises:
            DiscoveryError: mDNS is not available here.
        """
        engine = self._engine(self._interfaces)
        async with self._looking_up:
            if self._browser is None:
                self._browser = AsyncServiceBrowser(
                    engine.zeroconf,
                    SERVICE_TYPE,
                    handlers=[self._on_change],
                    # Multicast answers only: a unicast one to port 5353 reaches just one of this machine's
                    # processes.
                    question_type=DNSQuestionType.QM,
                )
                await self._wait_settled()
            await self._fetch_new(engine.zeroconf, model_key)
        return [
            found.record
            for found in self._found.values()
            if found.record is not None and model_key in (None, found.record.model_key)
        ]

    async def aclose(self) -> None:
        """Withdraw what was announced and close the sockets; idempotent."""
        self._is_closed = True
        if self._browser is not None:
            await self._browser.async_cancel()
            self._browser = None
        if self._session is not None:
            await self._session.close()
        self._announced.clear()
        while self._engines:
            await self._engines.popitem()[1].async_close()  # says goodbye for its services

    def _engine(self, interfaces: tuple[str, ...]) -> AsyncZeroconf:
        if self._is_closed:
            raise DiscoveryError("mDNS discovery is closed")
        engine = self._engines.get(interfaces)
        if engine is None:
            try:
                _check_local(interfaces)
                engine = AsyncZeroconf(interfaces=list(interfaces) or InterfaceChoice.All, ip_version=IPVersion.V4Only)
            except (OSError, RuntimeError) as exc:
                raise DiscoveryError(f"mDNS is not available here: {exc}; name a tracker or a peer") from exc
            self._engines[interfaces] = engine
        return engine

    async def _unregister(self, peer_id: str) -> None:
        known = self._announced.pop(peer_id, None)
        if known is None:
            return
        engine, info = known
        try:
            await (await engine.async_unregister_service(info))
        except (Error, OSError) as exc:
            raise DiscoveryError(f"mDNS withdrawal failed: {exc!r}") from exc

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._services.discard(name)
            self._found.pop(name, None)
        elif len(self._services) < MAX_SERVICES:
            self._services.add(name)
        elif name not in self._services:
            logger.debug("x mDNS service ignored: %d are followed already", MAX_SERVICES)
        self._changed.set()

    async def _wait_settled(self) -> None:
        deadline_s = self._clock() + FIRST_LOOKUP_S
        while (left_s := deadline_s - self._clock()) > 0:
            self._changed.clear()
            wait_s = min(SETTLE_S, left_s) if self._services else left_s
            try:
                await asyncio.wait_for(self._changed.wait(), wait_s)
            except asyncio.TimeoutError:
                return

    async def _fetch_new(self, zeroconf: Zeroconf, model_key: str | None) -> None:
        if not self._services:
            return
        tasks = [asyncio.create_task(self._refresh(zeroconf, name, model_key)) for name in self._services]
        try:
            await asyncio.wait(tasks, timeout=self._timeout_s)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome  # a bug of ours: what a stranger can cause was handled in _refresh

    async def _refresh(self, zeroconf: Zeroconf, name: str, model_key: str | None) -> None:
        try:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            if not info.load_from_cache(zeroconf):
                await info.async_request(zeroconf, RESOLVE_MS, question_type=DNSQuestionType.QM)
        except Error as exc:
            logger.debug("x mDNS service %r does not resolve: %r", name, exc)
            return
        if model_key is not None and text_of(info, b"model_key") not in ("", model_key):
            return
        key = (text_of(info, b"instance_id"), text_of(info, b"sequence"))
        found = self._found.get(name)
        if found is not None and found.key == key:
            if found.record is not None or self._clock() < found.retry_at_s:
                return
        if name not in self._services:
            return  # removed while it was resolved
        # Noted as failed first: a fetch that the lookup's deadline cuts off must not be tried at every lookup.
        self._found[name] = _Found(key=key, record=None, retry_at_s=self._clock() + RETRY_S)
        record = await self._fetch(name, dialable(info))
        if name in self._services and record is not None:
            self._found[name] = _Found(key=key, record=record, retry_at_s=0.0)

    async def _fetch(self, name: str, addresses: Sequence[str]) -> PeerRecord | None:
        if self._session is None:
            self._session = make_session(self._timeout_s)
        for address in addresses:
            try:
                record = await fetch_record(self._session, address, known=self._known)
            except DiscoveryError as exc:
                logger.debug("x mDNS service %r not usable: %s", name, exc)
                continue
            if record.peer_id == name.partition(".")[0]:
                return reached_at(record, address)
            logger.debug("x mDNS service %r is answered by peer=%s", name, short_id(record.peer_id))
        return None


def _check_local(interfaces: tuple[str, ...]) -> None:
    """Raise `OSError` for an address of another machine; zeroconf 0.154 would leak a socket in doing so."""
    for interface in interfaces:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((interface, 0))
