"""The interface that mDNS, trackers, static peers and their merger share.

One conformance suite (`tests/discovery/test_conformance.py`) runs against each of them.
"""

from __future__ import annotations

from typing import Protocol

from remote_modules.peers import PeerRecord, SignedRecord

__all__ = ["Discovery"]


class Discovery(Protocol):
    """Where records are published and found. All methods run on one event loop.

    Guarantees: `lookup` returns only records whose signature was verified, at most one for each peer id (the one
    with the newest instance, then the highest sequence), in no particular order. Nothing else is guaranteed: a
    record may be stale, and a peer that announced may not be seen yet.
    """

    async def announce(self, signed: SignedRecord) -> None:
        """Publish or renew a record; it lives for at least two of the announcer's intervals.

        Raises:
            DiscoveryError: no source took it.
        """

    async def withdraw(self, signed: SignedRecord) -> None:
        """Retract what the peer of this record announced; unknown peers are no error.

        Raises:
            DiscoveryError: no source could be told.
        """

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """Records of one model, or of all models for None.

        Raises:
            DiscoveryError: no source answered. A source that answers "nobody" is no error.
        """

    async def aclose(self) -> None:
        """Free sockets and tasks; idempotent."""
