"""Token buckets: how often each stranger may ask. The time is passed in.

A table of strangers is filled by strangers: it holds `MAX_KEYS`, and forgets first who has not asked for longest.
Whoever is forgotten starts with a full bucket, so that filling the table buys what one more address buys, and no more.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from remote_modules.discovery.addresses import parse_ip

__all__ = ["MAX_KEYS", "TokenBuckets", "source_key"]

MAX_KEYS = 65_536  # at about 250 bytes each


class TokenBuckets:
    """A bucket of ``burst`` tokens for each key, filled at ``per_s`` tokens a second."""

    def __init__(self, *, per_s: float, burst: float, max_keys: int = MAX_KEYS) -> None:
        self._per_s = per_s
        self._burst = max(1.0, burst)
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens and when; least recent first

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, key: str, now_s: float) -> float:
        """Seconds until ``key`` has a token; 0 if it has one now. Takes nothing."""
        return max(0.0, 1.0 - self._tokens(key, now_s)) / self._per_s

    def take(self, key: str, now_s: float) -> float:
        """Take a token; if there is none, the seconds until there is one, and nothing is taken."""
        tokens = self._tokens(key, now_s)
        is_allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if is_allowed else tokens, now_s)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1.0 - tokens) / self._per_s

    def _tokens(self, key: str, now_s: float) -> float:
        bucket = self._buckets.get(key)
        if bucket is None:
            return self._burst
        tokens, at_s = bucket
        return min(self._burst, tokens + max(0.0, now_s - at_s) * self._per_s)


def source_key(host: str) -> str | None:
    """What counts as one source: an IPv4 address, or an IPv6 network of 64 bits; None for this machine."""
    ip = parse_ip(host)
    if ip is None or ip.is_loopback:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
    return str(ip)
