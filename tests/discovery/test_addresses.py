from __future__ import annotations

import pytest
from records import make_identity, make_record

from remote_modules.discovery.addresses import check_announced, usable_addresses
from remote_modules.errors import DiscoveryError

PUBLIC, PRIVATE, LOOPBACK = "9.9.9.9", "192.168.1.7", "127.0.0.1"

NEVER_FROM_ELSEWHERE = [
    "127.0.0.1:4000",
    "127.8.8.8:4000",
    "[::1]:4000",
    "[::ffff:127.0.0.1]:4000",
    "[::127.0.0.1]:4000",
    "0x7f.1:4000",
    "2130706433:4000",
    "localhost:4000",
    "LOCALHOST.:4000",
    "db.localhost:4000",
    "169.254.169.254:8080",
    "[fe80::1]:4000",
    "metadata.google.internal:8080",
    "203.0.113.5:22",
    "203.0.113.5:25",
]
NEVER = [
    "0.0.0.0:4000",
    "[::]:4000",
    "0.1.2.3:4000",
    "224.0.0.251:4000",
    "[ff02::1]:4000",
    "255.255.255.255:4000",
]


@pytest.mark.parametrize("address", [*NEVER_FROM_ELSEWHERE, *NEVER])
@pytest.mark.parametrize("source", [PUBLIC, PRIVATE, "::ffff:9.9.9.9", "not an address"])
def test_dangerous_address_from_elsewhere_is_refused(address: str, source: str) -> None:
    with pytest.raises(DiscoveryError, match="announce one that other peers can dial"):
        check_announced(make_record(make_identity(1), addresses=("8.8.4.4:4000", address)), source)
    assert usable_addresses((address, "8.8.4.4:4000"), source) == ("8.8.4.4:4000",)


@pytest.mark.parametrize("address", NEVER)
def test_address_that_nobody_can_dial_is_refused_on_loopback_too(address: str) -> None:
    with pytest.raises(DiscoveryError):
        check_announced(make_record(make_identity(1), addresses=(address,)), LOOPBACK)


@pytest.mark.parametrize("address", ["127.0.0.1:4000", "[::1]:4000", "localhost:4000", "10.0.0.1:80"])
@pytest.mark.parametrize("source", [LOOPBACK, "::1", "::ffff:127.0.0.1"])
def test_announcer_on_this_machine_may_name_loopback(address: str, source: str) -> None:
    check_announced(make_record(make_identity(1), addresses=(address,)), source)
    assert usable_addresses((address,), source) == (address,)


@pytest.mark.parametrize("address", ["9.9.9.10:4000", "9.9.9.10:443", "[2606:4700::1]:4000", "peer.example.org:4000"])
def test_public_address_passes_everywhere(address: str) -> None:
    for source in (PUBLIC, PRIVATE, LOOPBACK, "2606:4700::2"):
        check_announced(make_record(make_identity(1), addresses=(address,)), source)
        assert usable_addresses((address,), source) == (address,)


@pytest.mark.parametrize("address", ["10.0.0.1:4000", "192.168.1.8:4000", "[fd00::1]:4000", "100.64.0.1:4000"])
def test_private_address_counts_only_when_a_private_source_names_it(address: str) -> None:
    assert usable_addresses((address,), PRIVATE) == (address,)
    assert usable_addresses((address,), PUBLIC) == ()
