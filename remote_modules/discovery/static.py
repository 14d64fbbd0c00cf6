"""Discovery without a tracker or a LAN: a fixed list of peers, each asked for its own record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp

from remote_modules.discovery.http_json import make_session
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.record_fetch import fetch_record, reached_at
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord, check_address
from remote_modules.plan.leases import merge_records

__all__ = ["StaticDiscovery"]

logger = logging.getLogger(__name__)


class StaticDiscovery:
    """The peers at ``addresses``, as long as they answer; see `Discovery` for the contract.

    Announcing here tells nobody: a peer is found by whoever was given its address. ``known`` is told of who answers.

    Raises:
        ValueError: no address, or one that is not ``host:port``.
        TypeError: a bare string instead of a list.
    """

    def __init__(self, addresses: Sequence[str], *, timeout_s: float = 3.0, known: KnownPeers | None = None) -> None:
        if isinstance(addresses, str):
            raise TypeError(f"peers must be a list of addresses, got the string {addresses!r}")
        if not addresses:
            raise ValueError("peers must name at least one HOST:PORT")
        for address in addresses:
            check_address(address)
        self._addresses = tuple(dict.fromkeys(addresses))
        self._timeout_s = timeout_s
        self._known = known
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def announce(self, signed: SignedRecord) -> None:
        """Accepted without effect."""

    async def withdraw(self, signed: SignedRecord) -> None:
        """Accepted without effect."""

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """Ask every address at once; the address that answered comes first in its record.

        Raises:
            DiscoveryError: none of them answered.
        """
        if self._is_closed:
            raise DiscoveryError("static discovery is closed")
        if self._session is None:
            self._session = make_session(self._timeout_s)
        outcomes = await asyncio.gather(*(self._try_fetch(self._session, address) for address in self._addresses))
        records = [outcome for outcome in outcomes if isinstance(outcome, PeerRecord)]
        if not records:
            failures = "; ".join(str(outcome) for outcome in outcomes)
            raise DiscoveryError(f"no static peer answered: {failures}")
        return merge_records([[record for record in records if model_key in (None, record.model_key)]])

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()

    async def _try_fetch(self, session: aiohttp.ClientSession, address: str) -> PeerRecord | DiscoveryError:
        try:
            return reached_at(await fetch_record(session, address, known=self._known), address)
        except DiscoveryError as exc:
            logger.debug("x static peer failed: %s", exc)
            return exc
