"""The answer to ``GET /api/v1/peers``, which trackers and peers give alike: signed records, and how old each is.

::

    {"peers": [SignedRecord, ...], "ages_s": [seconds since its peer was known to live, ...]}

Ages are counted on the teller's own clock, and whoever hears them counts on from the moment of asking. So a record
grows older by all the time that passes, whatever way it takes; no two machines' clocks are ever compared.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from remote_modules.discovery.http_json import printable
from remote_modules.errors import DiscoveryError, RemoteProtocolError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerRecord, SignedRecord
from remote_modules.plan.leases import Lease

__all__ = ["PEERS_PATH", "Heard", "PeersReader", "encode_peers"]

logger = logging.getLogger(__name__)

PEERS_PATH = "/api/v1/peers"
MAX_LOOKUP_BYTES = 896 * 1024  # clients stop reading at 1 MiB

_VERIFY_BATCH = 16  # signatures checked before others get the loop, at 0.1 ms each

_encoder = msgspec.json.Encoder()


class _Peers(msgspec.Struct):
    peers: list[msgspec.Raw]
    ages_s: list[float] = []


_peers_decoder = msgspec.json.Decoder(_Peers)
_record_decoder = msgspec.json.Decoder(SignedRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A verified record that somebody passed on. ``age_s``: since its peer was known to live, as told."""

    signed: SignedRecord
    record: PeerRecord
    age_s: float


def encode_peers(leases: Iterable[Lease], now_s: float) -> bytes:
    """As many of the leases, in their order, as fit into `MAX_LOOKUP_BYTES`. ``now_s``: on the clock of the leases."""
    encoded: list[bytes] = []
    ages: list[bytes] = []
    num_bytes = 0
    for lease in leases:
        text = _encoder.encode(lease.signed)
        age = b"%.3f" % max(0.0, now_s - lease.announced_at_s)
        num_bytes += len(text) + len(age) + 2
        if num_bytes > MAX_LOOKUP_BYTES:
            break
        encoded.append(text)
        ages.append(age)
    return b'{"peers":[' + b",".join(encoded) + b'],"ages_s":[' + b",".join(ages) + b"]}"


class PeersReader:
    """Reads the answers of one teller; what it has verified for the last answer need not be verified for the next.

    Args:
        who: the teller in a message, such as ``"tracker http://localhost:8000"``.
        level: at which the first invalid record is logged.
    """

    def __init__(self, who: str, *, level: int = logging.WARNING) -> None:
        self._who = who
        self._verified: dict[SignedRecord, PeerRecord] = {}  # of the last answer, so at most about 1,500
        self._level = level

    async def read(self, body: bytes) -> list[Heard]:
        """What of an answer is properly signed; the rest is dropped, and logged once.

        Raises:
            DiscoveryError: the answer is of another shape.
        """
        try:
            answer = _peers_decoder.decode(body)
        except msgspec.DecodeError as exc:
            kind = self._who.partition(" ")[0]
            raise DiscoveryError(
                f"{self._who} answered JSON of another shape ({exc}); is this a remote-modules {kind}?"
            ) from exc
        verified: dict[SignedRecord, PeerRecord] = {}
        heard: list[Heard] = []
        for index, raw in enumerate(answer.peers):
            if index % _VERIFY_BATCH == _VERIFY_BATCH - 1:
                await asyncio.sleep(0)
            try:
                signed = _record_decoder.decode(raw)
                record = self._verified.get(signed) or verify_record(signed)
            except (msgspec.DecodeError, RemoteProtocolError) as exc:
                self._drop(exc)
                continue
            verified[signed] = record
            age_s = answer.ages_s[index] if index < len(answer.ages_s) else 0.0
            heard.append(Heard(signed=signed, record=record, age_s=age_s if 0.0 <= age_s < math.inf else math.inf))
        self._verified = verified
        return heard

    def _drop(self, exc: Exception) -> None:
        level, self._level = self._level, logging.DEBUG
        logger.log(level, "invalid record dropped from %s: %s", self._who, printable(str(exc)))
