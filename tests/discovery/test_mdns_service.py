from __future__ import annotations

import socket

import pytest
from records import make_identity, make_record
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo

from remote_modules.discovery.mdns_service import SERVICE_TYPE, dialable, service_info, text_of
from remote_modules.errors import DiscoveryError

ALICE = make_identity(1)


@pytest.mark.parametrize(
    ("addresses", "port", "ips", "is_local"),
    [
        (("127.0.0.1:4000",), 4000, ["127.0.0.1"], True),
        (("localhost:4000", "[::1]:4000"), 4000, ["127.0.0.1"], True),
        (("10.0.0.1:4000", "192.168.1.1:4000"), 4000, ["10.0.0.1", "192.168.1.1"], False),
        (("10.0.0.1:4000", "10.0.0.2:5000"), 4000, ["10.0.0.1"], False),
        (("127.0.0.1:4000", "10.0.0.1:4000"), 4000, ["10.0.0.1"], False),
        (("peer.example.org:4000", "10.0.0.1:5000"), 5000, ["10.0.0.1"], False),
    ],
    ids=["loopback", "localhost", "two", "two-ports", "loopback-beside-lan", "name-first"],
)
def test_service_names_the_addresses_of_one_port(
    addresses: tuple[str, ...], port: int, ips: list[str], is_local: bool
) -> None:
    info, local = service_info(make_record(ALICE, addresses=addresses))
    assert info.name == f"{ALICE.peer_id}.{SERVICE_TYPE}"
    assert (info.port, info.parsed_addresses(IPVersion.V4Only), local) == (port, ips, is_local)


@pytest.mark.parametrize("addresses", [("[::1]:4000",), ("peer.example.org:4000",), ("0.0.0.0:4000",)])
def test_record_without_ipv4_address_has_no_service(addresses: tuple[str, ...]) -> None:
    with pytest.raises(DiscoveryError, match="mDNS needs an IPv4 address"):
        service_info(make_record(ALICE, addresses=addresses))


def test_texts_name_the_record() -> None:
    info, _ = service_info(make_record(ALICE, sequence=7))
    texts = {key: text_of(info, key) for key in (b"peer_id", b"model_key", b"instance_id", b"span", b"sequence", b"no")}
    assert list(texts.values()) == [ALICE.peer_id, "tiny-key", "first", "0:4", "7", ""]


def test_model_key_too_long_for_a_text_is_left_out() -> None:
    info, _ = service_info(make_record(ALICE, model_key="k" * 256, instance_id="i" * 256))
    assert text_of(info, b"model_key") == ""
    assert text_of(info, b"instance_id") == "i" * 48


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        ("127.0.0.1", 4000, ("127.0.0.1:4000",)),
        ("192.168.1.5", 4000, ("192.168.1.5:4000",)),
        ("100.64.0.1", 4000, ("100.64.0.1:4000",)),
        ("9.9.9.9", 4000, ()),
        ("169.254.169.254", 4000, ()),
        ("224.0.0.1", 4000, ()),
        ("0.0.0.0", 4000, ()),
        ("192.168.1.1", 22, ()),
        ("192.168.1.1", 0, ()),
    ],
)
def test_only_what_a_lan_may_name_is_dialled(address: str, port: int, expected: tuple[str, ...]) -> None:
    info = AsyncServiceInfo(
        SERVICE_TYPE, f"x.{SERVICE_TYPE}", port=port, server="x.local.", addresses=[socket.inet_aton(address)]
    )
    assert dialable(info) == expected


def test_at_most_four_addresses_are_dialled() -> None:
    addresses = [socket.inet_aton(f"192.168.1.{n}") for n in range(50)]
    info = AsyncServiceInfo(SERVICE_TYPE, f"x.{SERVICE_TYPE}", port=4000, server="x.local.", addresses=addresses)
    assert len(dialable(info)) == 4
