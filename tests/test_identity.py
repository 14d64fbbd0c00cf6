from __future__ import annotations

import datetime
import hashlib
import ssl
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from remote_modules.errors import RemoteProtocolError
from remote_modules.identity import Identity, peer_id_of, verify_hello, verify_push, verify_record
from remote_modules.peers import MAX_RECORD_BYTES, PeerRecord, PeerState, SignedRecord

ALICE = Identity.from_seed(b"a" * 32)
MALLORY = Identity.from_seed(b"m" * 32)
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
NONCE = b"n" * 32


def record_of(identity: Identity) -> PeerRecord:
    return PeerRecord(
        peer_id=identity.peer_id,
        instance_id="f00d",
        sequence=0,
        model="tiny",
        model_key="key",
        num_blocks=8,
        start=0,
        end=4,
        addresses=("127.0.0.1:4000",),
        state=PeerState.ONLINE,
    )


def sign_payload(identity: Identity, payload: bytes) -> SignedRecord:
    signature = identity.key.sign(b"rm-record-v3" + payload)
    return SignedRecord(payload=payload, public_key=identity.public_key, signature=signature)


# Keys and ids.


def test_peer_id_is_lower_case_base32_of_the_key_digest() -> None:
    assert len(ALICE.peer_id) == 52
    assert set(ALICE.peer_id) <= set("abcdefghijklmnopqrstuvwxyz234567")
    assert ALICE.peer_id == peer_id_of(ALICE.public_key)
    assert peer_id_of(b"") == "4oymiquy7qobjgx36tejs35zeqt24qpemsnzgtfeswmrw6csxbkq"  # of a known digest


def test_same_seed_gives_the_same_identity() -> None:
    assert Identity.from_seed(b"a" * 32).peer_id == ALICE.peer_id
    assert MALLORY.peer_id != ALICE.peer_id


def test_generated_identities_differ() -> None:
    assert Identity.generate().peer_id != Identity.generate().peer_id


# The key file.


def test_key_file_is_made_private_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "identity.pem"
    made = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path).peer_id == made.peer_id


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"], ids=repr)
def test_corrupt_key_file_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no PEM key; delete it to make a new one") as caught:
        Identity.load_or_create(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_encrypted_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(ALICE.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(ValueError, match="holds no PEM key"):
        Identity.load_or_create(path)


def test_key_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    other = generate_private_key(SECP256R1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ValueError, match="holds no Ed25519 key; delete it to make a new one"):
        Identity.load_or_create(path)


# Records.


def test_signed_record_is_verified() -> None:
    record = record_of(ALICE)
    assert verify_record(ALICE.sign_record(record)) == record


def test_record_changed_after_signing_is_refused() -> None:
    signed = ALICE.sign_record(record_of(ALICE))
    forged = msgspec.structs.replace(signed, payload=signed.payload.replace(b"4000", b"4001"))
    assert forged != signed
    with pytest.raises(RemoteProtocolError, match="signature of the record does not fit its key"):
        verify_record(forged)


def test_record_under_the_key_of_another_is_refused() -> None:
    forged = msgspec.structs.replace(MALLORY.sign_record(record_of(ALICE)), public_key=ALICE.public_key)
    with pytest.raises(RemoteProtocolError, match="signature of the record does not fit its key"):
        verify_record(forged)


def test_record_naming_another_peer_is_refused() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        verify_record(MALLORY.sign_record(record_of(ALICE)))
    assert str(caught.value) == f"record names peer '{ALICE.peer_id[:6]}' but another key signed it"


@pytest.mark.parametrize("field", ["public_key", "signature"])
@pytest.mark.parametrize("value", [b"", b"short", b"\x00" * 32, b"\xff" * 64], ids=repr)
def test_garbage_proof_is_refused(field: str, value: bytes) -> None:
    signed = msgspec.structs.replace(ALICE.sign_record(record_of(ALICE)), **{field: value})
    with pytest.raises(RemoteProtocolError, match="signature of the record does not fit its key"):
        verify_record(signed)


def test_record_over_the_limit_is_refused_before_anything_else() -> None:
    signed = SignedRecord(payload=b"x" * (MAX_RECORD_BYTES + 1), public_key=b"", signature=b"")
    with pytest.raises(RemoteProtocolError) as caught:
        verify_record(signed)
    assert str(caught.value) == f"record of {MAX_RECORD_BYTES + 1} bytes exceeds limit of {MAX_RECORD_BYTES}"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"peer_id": "a"}),
        msgspec.msgpack.encode(record_of(ALICE)) + b"\x00",
        msgspec.msgpack.encode(msgspec.to_builtins(record_of(ALICE)) | {"end": 9}),
        msgspec.msgpack.encode(record_of(ALICE)).replace(b"tiny", b"\xff\xff\xff\xff"),
        b"\x91" * MAX_RECORD_BYTES,
    ],
    ids=[
        "empty",
        "no msgpack",
        "list",
        "fields missing",
        "trailing byte",
        "out of bounds",
        "no utf-8",
        "deep",
    ],
)
def test_well_signed_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="record does not decode"):
        verify_record(sign_payload(ALICE, payload))


# The hello.


def test_hello_proves_the_peer_id() -> None:
    signature = ALICE.sign_hello(nonce=NONCE, certificate_sha256="00ff")
    proven = verify_hello(public_key=ALICE.public_key, signature=signature, nonce=NONCE, certificate_sha256="00ff")
    assert proven == ALICE.peer_id


@pytest.mark.parametrize(
    ("nonce", "certificate_sha256", "public_key"),
    [
        (b"o" * 32, "00ff", ALICE.public_key),
        (b"", "00ff", ALICE.public_key),
        (NONCE, "00fe", ALICE.public_key),
        (NONCE, "", ALICE.public_key),
        (NONCE + b"0", "0ff", ALICE.public_key),
        (NONCE, "00ff", MALLORY.public_key),
    ],
    ids=[
        "another nonce",
        "no nonce",
        "another certificate",
        "no certificate",
        "shifted border",
        "another key",
    ],
)
def test_hello_for_another_connection_is_refused(nonce: bytes, certificate_sha256: str, public_key: bytes) -> None:
    signature = ALICE.sign_hello(nonce=NONCE, certificate_sha256="00ff")
    with pytest.raises(RemoteProtocolError, match="signature of the hello does not fit its key"):
        verify_hello(public_key=public_key, signature=signature, nonce=nonce, certificate_sha256=certificate_sha256)


def test_record_signature_is_no_hello() -> None:
    signature = ALICE.key.sign(b"rm-record-v3" + NONCE)
    with pytest.raises(RemoteProtocolError, match="hello"):
        verify_hello(public_key=ALICE.public_key, signature=signature, nonce=NONCE, certificate_sha256="")


# The certificate.


def test_certificate_carries_the_key_the_id_and_its_digest() -> None:
    made = ALICE.certificate(now=NOW)
    parsed = x509.load_pem_x509_certificate(made.certificate_pem)
    der = ssl.PEM_cert_to_DER_cert(made.certificate_pem.decode("ascii"))
    assert made.sha256 == hashlib.sha256(der).hexdigest()
    assert parsed.public_key() == ALICE.key.public_key()
    assert parsed.subject.rfc4514_string() == f"CN={ALICE.peer_id}"
    parsed.verify_directly_issued_by(parsed)


def test_certificate_is_valid_from_the_day_before_for_ten_years() -> None:
    parsed = x509.load_pem_x509_certificate(ALICE.certificate(now=NOW).certificate_pem)
    assert parsed.not_valid_before_utc == NOW - datetime.timedelta(days=1)
    assert parsed.not_valid_after_utc == NOW + datetime.timedelta(days=3650)


def test_certificate_and_key_are_accepted_by_ssl(tmp_path: Path) -> None:
    made = ALICE.certificate(now=NOW)
    path = tmp_path / "both.pem"
    path.write_bytes(made.key_pem + made.certificate_pem)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)


def test_grant_of_a_push_holds_for_what_it_names_alone() -> None:
    client = Identity.from_seed(b"c" * 32)
    names = {"sender": "one", "receiver": "two", "session_id": "s" * 32}
    grant = client.sign_push(**names)
    verify_push(public_key=client.public_key, grant=grant, **names)
    others: list[dict[str, str]] = [{"sender": ""}, {"receiver": "one"}, {"session_id": "t" * 32}]
    for changed in (*others, {"sender": "onet", "receiver": "wo"}):  # the same letters, cut elsewhere
        with pytest.raises(RemoteProtocolError, match="signature of the grant does not fit its key"):
            verify_push(public_key=client.public_key, grant=grant, **(names | changed))
    for public_key in (Identity.from_seed(b"d" * 32).public_key, b""):
        with pytest.raises(RemoteProtocolError, match="signature of the grant does not fit its key"):
            verify_push(public_key=public_key, grant=grant, **names)
