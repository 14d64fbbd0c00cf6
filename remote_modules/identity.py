"""Who a peer is: an Ed25519 key, the id derived from it, and the certificate made from it.

An address is a hint; the key is the identity. The id is the base32 SHA-256 of the raw public key, lower case, without
padding (52 characters), after the example of Syncthing's device ids.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from remote_modules.errors import RemoteProtocolError
from remote_modules.peers import MAX_RECORD_BYTES, PeerId, PeerRecord, SignedRecord, decode_record, short_id

__all__ = ["Certificate", "Identity", "peer_id_of", "verify_hello", "verify_push", "verify_record"]

_RECORD_CONTEXT = b"rm-record-v3"
_HELLO_CONTEXT = b"rm-hello-v1"
_PUSH_CONTEXT = b"rm-push-v1"
_record_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A self-signed TLS certificate in PEM, and the SHA-256 of its DER form in hex."""

    certificate_pem: bytes
    key_pem: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and what follows from it. Build one with `generate`, `from_seed` or `load_or_create`."""

    key: Ed25519PrivateKey
    public_key: bytes = field(init=False)
    peer_id: PeerId = field(init=False)

    def __post_init__(self) -> None:
        public = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        object.__setattr__(self, "public_key", public)
        object.__setattr__(self, "peer_id", peer_id_of(public))

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte seed; for tests and simulations that must repeat."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the PEM key at ``path``, or make one there with mode 0600.

        Raises:
            ValueError: the file holds something else than an Ed25519 key.
        """
        identity = cls.generate()
        pem = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls(_read_key(path))
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        return identity

    def sign_record(self, record: PeerRecord) -> SignedRecord:
        payload = _record_encoder.encode(record)
        return SignedRecord(
            payload=payload,
            public_key=self.public_key,
            signature=self.key.sign(_RECORD_CONTEXT + payload),
        )

    def sign_hello(self, *, nonce: bytes, certificate_sha256: str) -> bytes:
        """Prove this key to whoever sent ``nonce`` over a channel with that certificate ("" without TLS)."""
        return self.key.sign(_hello_text(nonce, certificate_sha256))

    def sign_push(self, *, sender: str, receiver: str, session_id: str) -> bytes:
        """Let ``sender`` bring inputs of this client's session at ``receiver``."""
        return self.key.sign(_push_text(sender, receiver, session_id))

    def certificate(self, *, now: datetime.datetime) -> Certificate:
        """A certificate for this key, valid for ten years from a day before ``now`` (UTC)."""
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.peer_id)])
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=3650))
            .sign(self.key, None)
        )
        return Certificate(
            certificate_pem=built.public_bytes(Encoding.PEM),
            key_pem=self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            sha256=hashlib.sha256(built.public_bytes(Encoding.DER)).hexdigest(),
        )


def _read_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ValueError(f"identity file {path} holds no PEM key; delete it to make a new one") from exc
    except OSError as exc:
        raise ValueError(f"identity file {path} cannot be read: {exc.strerror}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"identity file {path} holds no Ed25519 key; delete it to make a new one")
    return key


def peer_id_of(public_key: bytes) -> PeerId:
    digest = hashlib.sha256(public_key).digest()
    return PeerId(base64.b32encode(digest).decode("ascii").rstrip("=").lower())


def verify_record(signed: SignedRecord) -> PeerRecord:
    """The record inside ``signed``, once its proof holds.

    Raises:
        RemoteProtocolError: too large, badly formed, signed by another key than its id names, or forged.
    """
    if len(signed.payload) > MAX_RECORD_BYTES:
        raise RemoteProtocolError(f"record of {len(signed.payload)} bytes exceeds limit of {MAX_RECORD_BYTES}")
    _verify(signed.public_key, signed.signature, _RECORD_CONTEXT + signed.payload, what="record")
    try:
        record = decode_record(signed.payload)
    except (msgspec.DecodeError, ValueError) as exc:
        raise RemoteProtocolError(f"record does not decode: {exc}") from exc
    if record.peer_id != peer_id_of(signed.public_key):
        raise RemoteProtocolError(f"record names peer '{short_id(record.peer_id)}' but another key signed it")
    return record


def verify_hello(*, public_key: bytes, signature: bytes, nonce: bytes, certificate_sha256: str) -> PeerId:
    """The peer id that a hello proves.

    Raises:
        RemoteProtocolError: the signature does not fit.
    """
    _verify(public_key, signature, _hello_text(nonce, certificate_sha256), what="hello")
    return peer_id_of(public_key)


def verify_push(*, public_key: bytes, grant: bytes, sender: str, receiver: str, session_id: str) -> None:
    """Whether the client of the session, which has ``public_key``, lets ``sender`` bring inputs of it.

    Raises:
        RemoteProtocolError: it does not.
    """
    _verify(public_key, grant, _push_text(sender, receiver, session_id), what="grant")


def _push_text(*names: str) -> bytes:
    parts = [name.encode("utf-8") for name in names]
    return _PUSH_CONTEXT + b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def _hello_text(nonce: bytes, certificate_sha256: str) -> bytes:
    return _HELLO_CONTEXT + len(nonce).to_bytes(2, "big") + nonce + certificate_sha256.encode("ascii")


def _verify(public_key: bytes, signature: bytes, text: bytes, *, what: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text)
    except (InvalidSignature, ValueError) as exc:
        raise RemoteProtocolError(f"signature of the {what} does not fit its key") from exc
