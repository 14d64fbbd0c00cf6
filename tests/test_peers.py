from __future__ import annotations

from typing import Any

import msgspec
import pytest

from remote_modules.peers import PeerRecord, PeerState, SignedRecord, check_address, is_loopback, short_id
from remote_modules.spans import MAX_BLOCKS, Span

RECORD = PeerRecord(
    peer_id="a" * 52,
    instance_id="f00d",
    sequence=3,
    model="tiny",
    model_key="key",
    num_blocks=8,
    start=2,
    end=5,
    addresses=("127.0.0.1:4000", "[::1]:4000"),
    state=PeerState.ONLINE,
    block_digests=("x", "y", "z"),
    certificate_sha256="00ff",
    prefill_tokens_per_s=1000.5,
    load=2,
)


def changed(**changes: Any) -> PeerRecord:
    return msgspec.structs.replace(RECORD, **changes)


def test_record_survives_the_wire() -> None:
    encoded = msgspec.msgpack.encode(RECORD)
    assert msgspec.msgpack.decode(encoded, type=PeerRecord) == RECORD


def test_signed_record_survives_the_wire() -> None:
    signed = SignedRecord(payload=b"\x00\xff", public_key=b"k" * 32, signature=b"s" * 64)
    for codec in (msgspec.msgpack, msgspec.json):
        assert codec.decode(codec.encode(signed), type=SignedRecord) == signed


def test_record_knows_its_span() -> None:
    assert RECORD.span == Span(2, 5)


def test_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        RECORD.load = 3  # type: ignore[misc]


ADAPTER = f"someone/pirate-v1.0@{'0a' * 16}"
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"start": -1, "block_digests": ()}, "record spans -1:5 of 8 blocks"),
    ({"start": 5}, "record spans 5:5 of 8 blocks"),
    ({"end": 9}, "record spans 2:9 of 8 blocks"),
    ({"num_blocks": MAX_BLOCKS + 1}, f"record spans 2:5 of {MAX_BLOCKS + 1} blocks"),
    ({"addresses": ()}, "record must name 1 to 4 addresses, got 0"),
    ({"addresses": ("a:1",) * 5}, "record must name 1 to 4 addresses, got 5"),
    ({"addresses": ("nowhere",)}, "address must look like HOST:PORT, got 'nowhere'"),
    ({"block_digests": ("x", "y")}, "record must give one digest for each block of its span, or none"),
    ({"adapters": ("a",)}, "record must name up to 16 adapters as name@digest, got ('a',)"),
    ({"adapters": (ADAPTER,) * 17}, f"record must name up to 16 adapters as name@digest, got {(ADAPTER, ADAPTER)}"),
    ({"peer_id": "a" * 257}, "record has a text of more than 256 characters"),
    ({"version": "a" * 257}, "record has a text of more than 256 characters"),
    ({"certificate_sha256": "a" * 257}, "record has a text of more than 256 characters"),
    ({"block_digests": ("x", "y", "z" * 257)}, "record has a text of more than 256 characters"),
    ({"sequence": -1}, "record counts must be in 0:2**53, got -1"),
    ({"sequence": 2**53}, f"record counts must be in 0:2**53, got {2**53}"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS)
def test_record_out_of_bounds_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        changed(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS)
def test_record_out_of_bounds_on_the_wire_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = msgspec.to_builtins(RECORD) | changes
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=PeerRecord)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"surprise": 1}, {"load": "2"}, {"state": "asleep"}, {"addresses": "a:1"}, {"sequence": 1.5}],
    ids=str,
)
def test_record_of_another_shape_on_the_wire_is_refused(changes: dict[str, Any]) -> None:
    fields = msgspec.to_builtins(RECORD) | changes
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=PeerRecord)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 0, "end": 8, "block_digests": ()},
        {"adapters": (ADAPTER,) * 16},
        {"addresses": ("a:1", "b:1", "c:1", "d:1")},
        {"model": "m" * 256},
        {"sequence": 2**53 - 1},
        {"certificate_sha256": None},
    ],
    ids=["whole model", "16 adapters", "4 addresses", "256 characters", "last sequence", "plain TCP"],
)
def test_record_at_its_bounds_is_accepted(changes: dict[str, Any]) -> None:
    record = changed(**changes)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=PeerRecord) == record


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("localhost:1", ("localhost", 1)),
        ("peer-7.example.org:65535", ("peer-7.example.org", 65535)),
        ("[::1]:31337", ("::1", 31337)),
        ("[2001:db8::ff]:443", ("2001:db8::ff", 443)),
        ("[::ffff:10.0.0.1]:443", ("::ffff:10.0.0.1", 443)),
    ],
)
def test_address_is_split_into_host_and_port(address: str, expected: tuple[str, int]) -> None:
    assert check_address(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":80",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "host:-1",
        "host:80x",
        "host:80\n",
        " host:80",
        "ho st:80",
        "::1:80",
        "[::1]",
        "[::1:80",
        "[fe80::1%eth0]:80",
        "[host]:80",
        "http://host:80",
        "user@host:80",
        "host/path:80",
        "a" * 254 + ":80",
    ],
)
def test_garbage_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="address must look like HOST:PORT") as caught:
        check_address(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("127.0.0.1.example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_short_id_is_the_first_six_characters() -> None:
    assert short_id("a3f09c77be10") == "a3f09c"


def test_states_keep_their_wire_values() -> None:
    assert [state.value for state in PeerState] == ["joining", "online", "draining"]
