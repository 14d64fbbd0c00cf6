"""Which announced addresses may be handed on or dialled, judged by where the announcement came from.

Pure: names are never resolved here, and nothing is dialled. An announcement from this machine may name
loopback; one from elsewhere may not, or it would make its readers dial themselves. ``source`` is always an IP
address: of the announcer at a tracker, of the tracker at a client.

Source: the rules follow libtorrent's ``ssrf_mitigation`` and Syncthing's discovery server.
"""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache

from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, check_address

__all__ = ["check_announced", "parse_ip", "usable_addresses"]

_METADATA_NAMES = ("metadata", "metadata.google.internal", "instance-data")  # cloud credentials live there
_OPEN_LOW_PORTS = (80, 443)  # pass firewalls; other low ones would make clients knock on ssh or mail

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_announced(record: PeerRecord, source: str) -> None:
    """Refuse a record that names an address which its readers must never dial.

    Raises:
        DiscoveryError: naming the first such address and why.
    """
    for address in record.addresses:
        reason = _refusal(address, parse_ip(source))
        if reason is not None:
            raise DiscoveryError(f"address {address} {reason}; announce one that other peers can dial")


def usable_addresses(addresses: tuple[str, ...], source: str) -> tuple[str, ...]:
    """The addresses worth dialling when ``source`` named them.

    Private ones count only if the source is itself on a private network: on the internet they would mean a
    machine of the reader's own network.
    """
    origin = parse_ip(source)
    is_public = origin is not None and origin.is_global
    return tuple(
        address
        for address in addresses
        if _refusal(address, origin) is None and not (is_public and _is_private(address))
    )


@lru_cache(maxsize=4096)  # a tracker reads the same ones at each announcement, in 10 us
def parse_ip(host: str) -> _IPAddress | None:
    """The address that dialling ``host`` would reach, or None for a name.

    Spellings that libc takes for IPv4 (``0x7f.1``, ``2130706433``) and IPv4 inside IPv6 are unwrapped.
    """
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    if isinstance(ip, ipaddress.IPv6Address):
        is_compatible = ip.packed[:12] == bytes(12) and int(ip) > 1  # ::127.0.0.1, but neither :: nor ::1
        if ip.ipv4_mapped is not None or is_compatible:
            return ipaddress.IPv4Address(ip.packed[12:])
    return ip


def _refusal(address: str, origin: _IPAddress | None) -> str | None:
    host, port = check_address(address)
    is_local = origin is not None and origin.is_loopback
    ip = parse_ip(host)
    reason = _name_refusal(host, is_local) if ip is None else _ip_refusal(ip, is_local)
    if reason is None and not is_local and port < 1024 and port not in _OPEN_LOW_PORTS:
        return "has a privileged port"
    return reason


def _name_refusal(host: str, is_local: bool) -> str | None:
    name = host.lower().rstrip(".")
    if name in _METADATA_NAMES:
        return "is a cloud metadata service"
    if not is_local and (name == "localhost" or name.endswith((".localhost", ".localdomain"))):
        return "is loopback"
    return None


def _ip_refusal(ip: _IPAddress, is_local: bool) -> str | None:
    if ip.is_unspecified or (ip.version == 4 and ip.packed[0] == 0):
        return "is unspecified"
    if ip.is_multicast or (ip.version == 4 and ip.packed[0] >= 224):  # with class E and broadcast
        return "is multicast"
    if is_local:
        return None
    if ip.is_loopback:
        return "is loopback"
    return "is link-local" if ip.is_link_local else None


def _is_private(address: str) -> bool:
    ip = parse_ip(check_address(address)[0])
    return ip is not None and not ip.is_global
