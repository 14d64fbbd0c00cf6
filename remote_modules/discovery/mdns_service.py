"""A peer as a DNS-SD service: what we publish of a record, and what we take from what others publish."""

from __future__ import annotations

import ipaddress

from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo

from remote_modules.discovery.addresses import parse_ip, usable_addresses
from remote_modules.errors import DiscoveryError
from remote_modules.peers import MAX_ADDRESSES, PeerRecord, check_address

__all__ = ["SERVICE_TYPE", "dialable", "service_info", "text_of"]

SERVICE_TYPE = "_remote-modules._tcp.local."
TTL_S = 120  # of all our DNS records: a crashed peer fades out, where the usual 4,500 s kept it for an hour

_LAN_SOURCE = "192.168.0.1"  # stands for whoever answered: the address rule asks only for the kind of network


def service_info(record: PeerRecord) -> tuple[AsyncServiceInfo, bool]:
    """The service of ``record``, on its first IPv4 address's port, and whether it is on loopback only."""
    targets = [check_address(address) for address in record.addresses]
    dialable = [(ip, port) for host, port in targets if (ip := _ipv4(host)) is not None]
    if not dialable:
        raise DiscoveryError(f"mDNS needs an IPv4 address to announce, got {', '.join(record.addresses)}")
    port = dialable[0][1]
    ips = [ip for ip, other in dialable if other == port]
    # Loopback means another machine to each reader, so it never leaves this one beside a real address.
    ips = [ip for ip in ips if not ip.is_loopback] or ips
    texts = {
        "peer_id": record.peer_id,
        "model_key": record.model_key if len(record.model_key.encode()) <= 200 else "",  # one TXT item: 255 bytes
        "instance_id": record.instance_id[:48],
        "span": str(record.span),
        "sequence": str(record.sequence),
    }
    info = AsyncServiceInfo(
        SERVICE_TYPE,
        f"{record.peer_id}.{SERVICE_TYPE}",
        port=port,
        properties=texts,
        server=f"rm-{record.peer_id[:16]}.local.",
        host_ttl=TTL_S,
        other_ttl=TTL_S,
        addresses=[ip.packed for ip in ips],
    )
    return info, all(ip.is_loopback for ip in ips)


def text_of(info: AsyncServiceInfo, key: bytes) -> str:
    """One item of the service's TXT record, "" if absent."""
    value = info.properties.get(key)
    return "" if value is None else value.decode("utf-8", "replace")


def dialable(info: AsyncServiceInfo) -> tuple[str, ...]:
    """Loopback, since peers of this machine answer too, and private addresses; see `usable_addresses`."""
    ips = map(ipaddress.ip_address, info.parsed_addresses(IPVersion.V4Only)[:MAX_ADDRESSES])
    addresses = [(ip, f"{ip}:{info.port}") for ip in ips if info.port and not ip.is_global]
    return tuple(address for ip, address in addresses if ip.is_loopback or usable_addresses((address,), _LAN_SOURCE))


def _ipv4(host: str) -> ipaddress.IPv4Address | None:
    ip = parse_ip("127.0.0.1" if host == "localhost" else host)
    return ip if isinstance(ip, ipaddress.IPv4Address) and not ip.is_unspecified else None
