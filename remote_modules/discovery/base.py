"""The interface that mDNS, trackers, static peers and their merger share.

One conformance suite (`tests/discovery/test_conformance.py`) runs against each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord

__all__ = ["Discovery", "NobodyToAskError", "OverloadedError", "Pace"]


class OverloadedError(DiscoveryError):
    """A source has too much to do.

    Attributes:
        retry_after_s: when it wants to be asked again, in seconds from now, or None if it did not say.
    """

    def __init__(self, message: str, *, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NobodyToAskError(DiscoveryError):
    """A source has no one to ask yet: neither an answer nor a failure of anybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Bounds of the pause until the next announcement, in seconds.

    Attributes:
        shortest_s: how often the source can bear it, with so many peers.
        longest_s: how often it takes to stay listed, though an announcement or two are lost.
    """

    shortest_s: float
    longest_s: float


class Discovery(Protocol):
    """Where records are published and found. All methods run on one event loop.

    Guarantees: `lookup` returns only records whose signature was verified, at most one for each peer id (the one
    with the newest instance, then the highest sequence), in no particular order. Nothing else is guaranteed: a
    record may be stale, and a peer that announced may not be seen yet.
    """

    async def announce(self, signed: SignedRecord) -> Pace | None:
        """Publish or renew a record; it lives for at least two of the announcer's intervals.

        Returns:
            When the source wants the next announcement, or None if it does not say.

        Raises:
            StaleRecordError: something newer of this peer is known; the error has the proof, verified.
            OverloadedError: the source has too much to do.
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
