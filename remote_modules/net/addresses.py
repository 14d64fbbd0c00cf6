"""Which address a peer that listens on all interfaces should announce."""

from __future__ import annotations

import socket

__all__ = ["dialable_host"]

_WILDCARDS = {  # a documentation address picks the interface of the default route: RFC 5737, RFC 3849
    "0.0.0.0": (socket.AF_INET, "192.0.2.1"),
    "::": (socket.AF_INET6, "2001:db8::1"),
}


def dialable_host(host: str) -> str:
    """``host`` itself, or this machine's own address where ``host`` means all interfaces; IPv6 in brackets.

    Raises:
        ValueError: this machine has no route to anywhere, so the operator must say what to announce.
    """
    host = host.strip("[]")
    if host in _WILDCARDS:
        family, anywhere = _WILDCARDS[host]
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((anywhere, 9))  # sends nothing
                host = probe.getsockname()[0]
        except OSError as exc:
            raise ValueError(f"no address found to announce for host {host}; name one with --announce") from exc
    return f"[{host}]" if ":" in host else host
