"""Asking one peer, at an address, who it is: ``GET /api/v1/record`` on the peer's own port."""

from __future__ import annotations

import aiohttp
import msgspec

from remote_modules.discovery.addresses import usable_addresses
from remote_modules.discovery.http_json import ask, make_session
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import MAX_ADDRESSES, PeerRecord, SignedRecord, check_address, is_loopback

__all__ = ["RECORD_PATH", "answers", "fetch_record", "reached_at"]

RECORD_PATH = "/api/v1/record"

_decoder = msgspec.json.Decoder(SignedRecord)


async def fetch_record(session: aiohttp.ClientSession, address: str, *, known: KnownPeers | None = None) -> PeerRecord:
    """The verified record of whoever listens at ``address`` (``host:port``); ``known`` is told of it.

    Raises:
        DiscoveryError: nobody there, not a peer of ours, or a record that does not verify.
    """
    host, _ = check_address(address)
    scheme = "http" if is_loopback(host) else "https"
    who = f"peer {address}"
    # No certificate authority knows a peer. The record proves itself by its signature, and whoever dials the
    # peer later pins the certificate that the record names, so a machine in the middle gains nothing here.
    answer = await ask(session, f"{scheme}://{address}{RECORD_PATH}", who=who, verify_tls=False)
    if answer.status != 200:
        raise DiscoveryError(f"{who} answered status {answer.status}; is this a remote-modules peer?")
    try:
        signed = _decoder.decode(answer.body)
        record = verify_record(signed)
    except (msgspec.DecodeError, RemoteProtocolError) as exc:
        raise DiscoveryError(f"{who} sent no valid record: {exc}") from exc
    if known is not None:
        known.hear(signed, record, via="127.0.0.1" if is_loopback(host) else host)
    return record


async def answers(record: PeerRecord, *, timeout_s: float) -> bool:
    """Whether the peer of ``record`` answers at one of its addresses."""
    async with make_session(timeout_s) as session:
        for address in record.addresses:
            try:
                found = await fetch_record(session, address)
            except DiscoveryError:
                continue
            if found.peer_id == record.peer_id:
                return True
    return False


def reached_at(record: PeerRecord, address: str) -> PeerRecord:
    """``record`` with ``address``, known to work, put first, and without those that must not be dialled."""
    host, _ = check_address(address)
    others = usable_addresses(record.addresses, "127.0.0.1" if is_loopback(host) else host)
    addresses = dict.fromkeys((address, *others))
    return msgspec.structs.replace(record, addresses=tuple(addresses)[:MAX_ADDRESSES])
