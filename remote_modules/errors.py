"""The error tree of the package.

::

    RemoteModulesError
    ├── NoRouteError            no live peers for some blocks          (.missing)
    │   └── SpanUnavailable     and none came until the deadline
    ├── PeerError               that peer; another may do: retryable   (.peer_id)
    │   ├── PeerUnreachable     dial failed or the connection was lost
    │   ├── PeerTimeout         no answer by the deadline
    │   └── PeerRefused         answered no                            (.reason)
    ├── ProtocolError
    │   ├── LocalProtocolError  we called the API wrongly
    │   └── RemoteProtocolError they sent nonsense: close, ban
    ├── SessionError            full, closed, lost beyond repair
    ├── DiscoveryError          a tracker or the LAN gave no usable answer
    ├── CheckpointError         the model folder cannot be served or used
    └── UnsupportedCallError    transformers asked for what we do not carry

Messages are one line, lower case, without a full stop, and say what was expected, what came, and the next move.
Only `PeerError` is ever retried (see `plan/recovery.py`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "DiscoveryError",
    "LocalProtocolError",
    "NoRouteError",
    "PeerError",
    "PeerRefused",
    "PeerTimeout",
    "PeerUnreachable",
    "ProtocolError",
    "RefusalReason",
    "RemoteModulesError",
    "RemoteProtocolError",
    "SessionError",
    "SpanUnavailable",
    "UnsupportedCallError",
]


class RemoteModulesError(Exception):
    """Base of every error that this package raises on purpose."""


class NoRouteError(RemoteModulesError):
    """No live peer covers some of the blocks.

    Attributes:
        missing: the uncovered spans, in order.
    """

    def __init__(self, message: str, *, missing: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class SpanUnavailable(NoRouteError):
    """No live peer covered some of the blocks until the deadline of the pass; a later pass may succeed."""


class PeerError(RemoteModulesError):
    """One peer failed; another may do.

    Attributes:
        peer_id: full id of the peer, or its address where no id was known yet.
    """

    def __init__(self, message: str, *, peer_id: str) -> None:
        super().__init__(message)
        self.peer_id = peer_id


class PeerUnreachable(PeerError):
    """The peer could not be dialled, or its connection broke."""


class PeerTimeout(PeerError):
    """The peer gave no sign of life, or no answer, by the deadline."""


class RefusalReason(enum.Enum):
    """Why a peer answered no. The values travel on the wire."""

    BAD_REQUEST = "bad_request"  # the request itself is wrong: retrying anywhere cannot mend it
    NOT_SERVED = "not_served"  # this peer does not hold those blocks (it may have moved)
    SESSION_LOST = "session_lost"  # unknown session or wrong position: replay mends it
    OUT_OF_MEMORY = "out_of_memory"  # no room for the KV cache or the batch
    BUSY = "busy"  # queue full
    ADAPTER_MISSING = "adapter_missing"  # the request names an adapter that this peer does not have: send it along
    DRAINING = "draining"  # leaving: takes no new sessions
    INTERNAL = "internal"  # the peer's own fault


class PeerRefused(PeerError):
    """The peer answered no.

    Attributes:
        reason: the `RefusalReason`.
        retry_after_s: the peer's hint, seconds, or None.
    """

    def __init__(
        self, message: str, *, peer_id: str, reason: RefusalReason, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, peer_id=peer_id)
        self.reason = reason
        self.retry_after_s = retry_after_s


class ProtocolError(RemoteModulesError):
    """A rule of docs/protocol.md was broken."""


class LocalProtocolError(ProtocolError):
    """We broke it: a bug or a wrong call on this side."""


class RemoteProtocolError(ProtocolError):
    """The other side broke it."""


class SessionError(RemoteModulesError):
    """The session is full, closed, or lost beyond repair."""


class DiscoveryError(RemoteModulesError):
    """A tracker, peer or LAN gave no usable answer to an announce or lookup."""


class CheckpointError(RemoteModulesError):
    """The checkpoint is missing, incomplete or of a format that is never loaded."""


class UnsupportedCallError(RemoteModulesError):
    """transformers, or the caller, asked for something that remote blocks do not carry."""


def first_line(exc: BaseException) -> str:
    """What another library's error says, cut to one line for a message of ours."""
    lines = str(exc).strip().splitlines()
    return lines[0][:300] if lines else type(exc).__name__
