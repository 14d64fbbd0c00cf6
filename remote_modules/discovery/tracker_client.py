"""Discovery through one HTTP tracker. Not trusted: it can hide peers, but neither invent nor alter one."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from remote_modules.config import check_tracker_urls
from remote_modules.discovery.addresses import parse_ip, usable_addresses
from remote_modules.discovery.http_json import ask, make_session, printable
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord, is_loopback
from remote_modules.plan.leases import merge_records

__all__ = ["TrackerClient"]

logger = logging.getLogger(__name__)

_Decoded = TypeVar("_Decoded")

_VERIFY_BATCH = 64  # signatures checked before others get the loop, at 0.1 ms each


class _Peers(msgspec.Struct):
    peers: list[msgspec.Raw]


class _Refusal(msgspec.Struct):
    error: str


class _Taken(msgspec.Struct):
    lease_s: float


_encoder = msgspec.json.Encoder()
_taken_decoder = msgspec.json.Decoder(_Taken)
_peers_decoder = msgspec.json.Decoder(_Peers)
_record_decoder = msgspec.json.Decoder(SignedRecord)


class TrackerClient:
    """One tracker; see `Discovery` for the contract. ``timeout_s`` bounds each call.

    A tracker that answers 410 (Gone) is never asked again: dead names may come to point at strangers.

    Raises:
        ValueError: ``url`` is not an http(s) URL.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        check_tracker_urls((url,))
        self._url = url.rstrip("/")
        self._who = f"tracker {printable(self._url)}"
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._refusal: str | None = None  # why this tracker is not asked at all
        self._source: str | None = None
        self._verified: dict[SignedRecord, PeerRecord] = {}  # of the last answer, so at most about 1,500
        self._has_warned = False

    async def announce(self, signed: SignedRecord) -> None:
        """See `Discovery.announce`.

        Raises:
            DiscoveryError: the tracker is unreachable or refused, with its reason.
        """
        answer = await self._ask("/api/v1/announce", body=_encoder.encode(signed))
        self._decode(_taken_decoder, answer)

    async def withdraw(self, signed: SignedRecord) -> None:
        """See `Discovery.withdraw`; needs a higher sequence than announced, or an announced drain.

        Raises:
            DiscoveryError: the tracker is unreachable or refused, with its reason.
        """
        await self._ask("/api/v1/withdraw", body=_encoder.encode(signed))

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """See `Discovery.lookup`; what does not verify or cannot be dialled is left out.

        Raises:
            DiscoveryError: the tracker is unreachable, refused, or is no tracker.
        """
        params = None if model_key is None else {"model_key": model_key}
        answer = await self._ask("/api/v1/peers", params=params)
        verified = await self._verify(self._decode(_peers_decoder, answer).peers)
        source = await self._find_source()
        records = []
        for record in verified:
            addresses = usable_addresses(record.addresses, source)
            if addresses and model_key in (None, record.model_key):
                records.append(msgspec.structs.replace(record, addresses=addresses))
        return merge_records([records])

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        self._refusal = f"{self._who} is not asked: this client is closed"
        if self._session is not None:
            await self._session.close()

    async def _ask(self, path: str, *, body: bytes | None = None, params: dict[str, str] | None = None) -> bytes:
        if self._refusal is not None:
            raise DiscoveryError(self._refusal)
        if self._session is None:
            self._session = make_session(self._timeout_s)
        answer = await ask(self._session, self._url + path, who=self._who, body=body, params=params)
        if answer.status == 410:
            self._refusal = f"{self._who} is gone for good (status 410); remove it from the list of trackers"
            raise DiscoveryError(self._refusal)
        if answer.status != 200:
            raise DiscoveryError(f"{self._who} refused: {_read_refusal(answer.body)} (status {answer.status})")
        return answer.body

    def _decode(self, decoder: msgspec.json.Decoder[_Decoded], body: bytes) -> _Decoded:
        try:
            return decoder.decode(body)
        except msgspec.DecodeError as exc:
            raise DiscoveryError(
                f"{self._who} answered JSON of another shape ({exc}); is this a remote-modules tracker?"
            ) from exc

    async def _verify(self, raws: list[msgspec.Raw]) -> list[PeerRecord]:
        verified: dict[SignedRecord, PeerRecord] = {}
        for index, raw in enumerate(raws):
            if index % _VERIFY_BATCH == _VERIFY_BATCH - 1:
                await asyncio.sleep(0)
            try:
                signed = _record_decoder.decode(raw)
                verified[signed] = self._verified.get(signed) or verify_record(signed)
            except (msgspec.DecodeError, RemoteProtocolError) as exc:
                level = logging.DEBUG if self._has_warned else logging.WARNING
                self._has_warned = True
                logger.log(level, "invalid record dropped tracker=%s: %s", self._url, printable(str(exc)))
        self._verified = verified
        return list(verified.values())

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


def _read_refusal(body: bytes) -> str:
    try:
        return printable(msgspec.json.decode(body, type=_Refusal).error)
    except msgspec.DecodeError:
        return "no reason given"
