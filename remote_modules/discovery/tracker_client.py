"""Discovery through one HTTP tracker. Not trusted: it can hide peers, but neither invent nor alter one."""

from __future__ import annotations

import asyncio
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from remote_modules.config import check_tracker_urls
from remote_modules.discovery.addresses import parse_ip, usable_addresses
from remote_modules.discovery.base import OverloadedError, Pace
from remote_modules.discovery.http_json import Answer, ask, make_session, printable
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.peers_answer import PEERS_PATH, PeersReader
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord, is_loopback
from remote_modules.plan.leases import DuplicateIdentityError, StaleRecordError, merge_records

__all__ = ["ANNOUNCES_PER_LEASE", "ANNOUNCE_PATH", "WITHDRAW_PATH", "Refusal", "TrackerClient", "refusal_of"]

_Decoded = TypeVar("_Decoded")

ANNOUNCE_PATH = "/api/v1/announce"
WITHDRAW_PATH = "/api/v1/withdraw"
ANNOUNCES_PER_LEASE = 3  # a peer may miss two announcements in a row and stay listed
MAX_REANNOUNCE_S = 900.0  # a tracker that asks for more is asked after this nevertheless


class Refusal(msgspec.Struct, omit_defaults=True):
    """Why a tracker, or a peer, refused.

    Attributes:
        is_duplicate: the refused instance was replaced by the one of ``newest``.
        newest: what stands against the refused record, for its owner to verify.
    """

    error: str
    is_duplicate: bool = False
    newest: SignedRecord | None = None


class _Taken(msgspec.Struct):
    lease_s: float
    reannounce_after_s: float = 0.0


_encoder = msgspec.json.Encoder()
_taken_decoder = msgspec.json.Decoder(_Taken)
_refusal_decoder = msgspec.json.Decoder(Refusal)


class TrackerClient:
    """One tracker; see `Discovery` for the contract. ``timeout_s`` bounds each call.

    A tracker that answers 410 (Gone) is never asked again: dead names may come to point at strangers.

    Args:
        known: is told of what lookups find.

    Raises:
        ValueError: ``url`` is not an http(s) URL.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, known: KnownPeers | None = None) -> None:
        check_tracker_urls((url,))
        self._url = url.rstrip("/")
        self._who = f"tracker {printable(self._url)}"
        self._timeout_s = timeout_s
        self._known = known
        self._session: aiohttp.ClientSession | None = None
        self._refusal: str | None = None  # why this tracker is not asked at all
        self._source: str | None = None
        self._reader = PeersReader(self._who)

    async def announce(self, signed: SignedRecord) -> Pace | None:
        """See `Discovery.announce`.

        Raises:
            StaleRecordError: it knows something newer of the same peer, and has proved it.
            OverloadedError: it has too much to do.
            DiscoveryError: the tracker is unreachable or refused, with its reason.
        """
        answer = await self._ask(ANNOUNCE_PATH, signed=signed)
        taken = self._decode(_taken_decoder, answer)
        if not taken.lease_s > 0 <= taken.reannounce_after_s:
            return None
        shortest_s = min(taken.reannounce_after_s, MAX_REANNOUNCE_S)
        return Pace(shortest_s=shortest_s, longest_s=max(shortest_s, taken.lease_s / ANNOUNCES_PER_LEASE))

    async def withdraw(self, signed: SignedRecord) -> None:
        """See `Discovery.withdraw`; needs a higher sequence than announced, or an announced drain.

        Raises:
            DiscoveryError: the tracker is unreachable or refused, with its reason.
        """
        await self._ask(WITHDRAW_PATH, signed=signed)

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """See `Discovery.lookup`; what does not verify or cannot be dialled is left out.

        Raises:
            DiscoveryError: the tracker is unreachable, refused, or is no tracker.
        """
        params = None if model_key is None else {"model_key": model_key}
        asked_s = self._known.clock() if self._known is not None else 0.0
        heard = await self._reader.read(await self._ask(PEERS_PATH, params=params))
        source = await self._find_source()
        records = []
        for one in heard:
            addresses = usable_addresses(one.record.addresses, source)
            if addresses and model_key in (None, one.record.model_key):
                records.append(msgspec.structs.replace(one.record, addresses=addresses))
                if self._known is not None:
                    self._known.hear(one.signed, one.record, at_s=asked_s - one.age_s, via=source)
        return merge_records([records])

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        self._refusal = f"{self._who} is not asked: this client is closed"
        if self._session is not None:
            await self._session.close()

    async def _ask(
        self, path: str, *, signed: SignedRecord | None = None, params: dict[str, str] | None = None
    ) -> bytes:
        if self._refusal is not None:
            raise DiscoveryError(self._refusal)
        if self._session is None:
            self._session = make_session(self._timeout_s)
        body = None if signed is None else _encoder.encode(signed)
        answer = await ask(self._session, self._url + path, who=self._who, body=body, params=params)
        if answer.status == 410:
            self._refusal = f"{self._who} is gone for good (status 410); remove it from the list of trackers"
            raise DiscoveryError(self._refusal)
        if answer.status != 200:
            raise refusal_of(answer, self._who, signed)
        return answer.body

    def _decode(self, decoder: msgspec.json.Decoder[_Decoded], body: bytes) -> _Decoded:
        try:
            return decoder.decode(body)
        except msgspec.DecodeError as exc:
            raise DiscoveryError(
                f"{self._who} answered JSON of another shape ({exc}); is this a remote-modules tracker?"
            ) from exc

    async def _find_source(self) -> str:
        """The IP address of the tracker, by which `usable_addresses` judges what it says; resolved once."""
        if self._source is None:
            host = urlsplit(self._url).hostname or ""
            if is_loopback(host):
                host = "127.0.0.1"
            elif parse_ip(host) is None:
                host = await self._resolve(host)
            self._source = host
        return self._source

    async def _resolve(self, host: str) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await asyncio.wait_for(loop.getaddrinfo(host, None), self._timeout_s)
        except (asyncio.TimeoutError, OSError) as exc:
            raise DiscoveryError(f"{self._who} is unreachable: its name does not resolve") from exc
        return str(found[0][4][0])


def refusal_of(answer: Answer, who: str, signed: SignedRecord | None) -> DiscoveryError:
    """The error for an answer that is no 200. That ``signed`` is outdated counts only if its own key signed so."""
    try:
        refusal = _refusal_decoder.decode(answer.body)
    except msgspec.DecodeError:
        refusal = Refusal(error="no reason given")
    text = f"{who} refused: {printable(refusal.error)} (status {answer.status})"
    if answer.status in (429, 503):
        return OverloadedError(text, retry_after_s=answer.retry_after_s)
    newest = refusal.newest
    if newest is None or signed is None or newest.public_key != signed.public_key:
        return DiscoveryError(text)
    try:
        verify_record(newest)
    except RemoteProtocolError:
        return DiscoveryError(f"{text}; its proof is not valid")
    return (DuplicateIdentityError if refusal.is_duplicate else StaleRecordError)(text, newest=newest)
