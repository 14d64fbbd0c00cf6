"""What a peer says about itself: the signed record that discovery carries.

A `PeerRecord` is a claim. It is believed only inside a `SignedRecord` whose key hashes to the record's peer id
(`identity.verify_record`), and even then only as a hint of where to dial: the peer proves its id again in the hello.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from typing import NewType

import msgspec

from remote_modules.spans import MAX_BLOCKS, Span

__all__ = [
    "ADAPTER_NAME",
    "MAX_ADAPTERS",
    "PeerId",
    "PeerRecord",
    "PeerState",
    "SignedRecord",
    "check_address",
    "decode_record",
    "is_loopback",
    "short_id",
]

PeerId = NewType("PeerId", str)

MAX_RECORD_BYTES = 16384  # 4,096 block digests would not fit: models beyond ~1,000 blocks announce none
MAX_ADDRESSES = 4
MAX_ADAPTERS = 16
ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}"

_ADAPTER = re.compile(rf"{ADAPTER_NAME}@[0-9a-f]{{32}}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9][A-Za-z0-9._-]{0,252}):([0-9]{1,5})\Z")


class PeerState(enum.Enum):
    """Where a server is in its life. The values travel on the wire."""

    JOINING = "joining"  # loading; takes no requests yet
    ONLINE = "online"
    DRAINING = "draining"  # finishes its sessions, takes no new ones


class PeerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server's announcement.

    Attributes:
        peer_id: base32 SHA-256 of the peer's Ed25519 public key.
        instance_id: random per process start; tells a restarted peer from the one that died.
        sequence: rises with every announcement of one instance.
        model: what the operator named: hub id or folder name; for people, never compared.
        model_key: digest of the architecture (`model.fingerprint.model_key`): what lookups ask for.
        block_digests: per block of the span, a digest of sampled weights; equal digests mean equal blocks.
        num_blocks: blocks in the whole model.
        start, end: the span held.
        addresses: ``host:port``, at most 4.
        certificate_sha256: hex digest of the TLS certificate to pin; None means plain TCP (loopback).
        dtype: torch dtype name of the computation, such as ``"float32"``.
        quantization: ``"none"``, ``"int8"`` or ``"nf4"``.
        prefill_tokens_per_s, decode_tokens_per_s: measured, tokens per second through one block.
        free_kv_tokens: tokens of one sequence that the KV budget still admits, over the whole span.
        load: requests queued or running when announced.
        max_blocks: how many blocks it could hold; 0 if it would hold no others than it does.
        bandwidth_bytes_per_s: of its link, the slower direction; 0 if unknown.
        adapters: ``name@digest`` of those that it offers, at most 16; equal digests mean equal adapters.
    """

    peer_id: str
    instance_id: str
    sequence: int
    model: str
    model_key: str
    num_blocks: int
    start: int
    end: int
    addresses: tuple[str, ...]
    state: PeerState
    block_digests: tuple[str, ...] = ()
    certificate_sha256: str | None = None
    dtype: str = "float32"
    quantization: str = "none"
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    free_kv_tokens: int = 0
    load: int = 0
    version: str = ""
    max_blocks: int = 0
    bandwidth_bytes_per_s: float = 0.0
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= self.num_blocks <= MAX_BLOCKS:
            raise ValueError(f"record spans {self.start}:{self.end} of {self.num_blocks} blocks")
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES:
            raise ValueError(f"record must name 1 to {MAX_ADDRESSES} addresses, got {len(self.addresses)}")
        for address in self.addresses:
            check_address(address)
        if self.block_digests and len(self.block_digests) != self.end - self.start:
            raise ValueError("record must give one digest for each block of its span, or none")
        _check_adapters(self.adapters)
        texts = (self.peer_id, self.instance_id, self.model, self.model_key, self.dtype, self.quantization)
        if max(map(len, (*texts, self.version, *self.block_digests, self.certificate_sha256 or ""))) > 256:
            raise ValueError("record has a text of more than 256 characters")
        for number in (self.sequence, self.free_kv_tokens, self.load, self.max_blocks):
            if not 0 <= number < 2**53:
                raise ValueError(f"record counts must be in 0:2**53, got {number}")
        for speed in (self.prefill_tokens_per_s, self.decode_tokens_per_s, self.bandwidth_bytes_per_s):
            if not 0 <= speed < 1e12:  # refuses NaN and infinity too
                raise ValueError(f"record speeds must be in 0:1e12 tokens or bytes per second, got {speed}")

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)


class SignedRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record with its proof.

    Attributes:
        payload: the record as msgpack, at most `MAX_RECORD_BYTES`.
        public_key: raw Ed25519 key, 32 bytes.
        signature: over ``b"rm-record-v3" + payload``, 64 bytes.
    """

    payload: bytes
    public_key: bytes
    signature: bytes


_record_decoder = msgspec.msgpack.Decoder(PeerRecord)


def decode_record(payload: bytes) -> PeerRecord:
    """The record in the payload of a `SignedRecord`; says nothing about its signature (`identity.verify_record`).

    Raises:
        msgspec.DecodeError, ValueError: it is none.
    """
    return _record_decoder.decode(payload)


def short_id(peer_id: str) -> str:
    """The first 6 characters, for logs and messages."""
    return peer_id[:6]


def check_address(address: str) -> tuple[str, int]:
    """Split ``host:port``.

    Raises:
        ValueError: the text is not a host name or IP address with a port in 1:65536.
    """
    match = _ADDRESS.match(address)
    if match is None or not 0 < int(match[2]) < 65536 or not _is_host(match[1]):
        raise ValueError(f"address must look like HOST:PORT, got {address!r}")
    return match[1].strip("[]"), int(match[2])


def is_loopback(host: str) -> bool:
    """Whether ``host`` can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_adapters(adapters: tuple[str, ...]) -> None:
    if len(adapters) > MAX_ADAPTERS or not all(map(_ADAPTER.fullmatch, adapters)):
        raise ValueError(f"record must name up to {MAX_ADAPTERS} adapters as name@digest, got {adapters[:2]}")


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(text[1:-1])
    except ValueError:
        return False
    return True
