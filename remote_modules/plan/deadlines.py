"""How long to wait for a peer: two questions, answered apart.

*Is it alive?* A peer with work of ours must say something (an answer, a pong, bytes of either) within the silence
timeout. A pong costs it nothing even while it computes, so a frozen or unreachable peer is noticed in seconds
whatever the work is.

*Does it get on?* A live peer gets several times the time that the same work took before, doubled after each miss, as
TCP does for its retransmissions (RFC 6298).
"""

from __future__ import annotations

from remote_modules.peers import PeerId

__all__ = ["Beat", "Heartbeat", "WorkEstimator"]

import enum

SAFETY_FACTOR = 8.0
SMOOTHING = 0.25
MAX_BACKOFF = 64.0
MAX_KEYS = 4096  # (peer, kind) pairs remembered; about 150 bytes each


class WorkEstimator:
    """Seconds per token and block of each peer, from what was observed.

    Args:
        min_timeout_s: least time given to any request.
    """

    def __init__(self, *, min_timeout_s: float) -> None:
        self._min_timeout_s = min_timeout_s
        self._rates: dict[tuple[PeerId, str], float] = {}
        self._backoffs: dict[PeerId, float] = {}

    def timeout_s(self, peer_id: PeerId, kind: str, *, work: float, announced_rate: float) -> float:
        """Time to give a request.

        Args:
            kind: ``"decode"``, ``"prefill"``, ``"forward"`` or ``"backward"``.
            work: tokens times blocks.
            announced_rate: tokens x blocks per second that the peer claims; 0 for unknown.
        """
        rate_s = self._rates.get((peer_id, kind), 1.0 / announced_rate if announced_rate > 0 else 0.0)
        expected_s = rate_s * work * SAFETY_FACTOR * self._backoffs.get(peer_id, 1.0)
        return max(self._min_timeout_s * self._backoffs.get(peer_id, 1.0), expected_s)

    def observe(self, peer_id: PeerId, kind: str, *, work: float, took_s: float) -> None:
        """Learn from an answer."""
        self._backoffs.pop(peer_id, None)
        key = (peer_id, kind)
        rate_s = took_s / max(work, 1.0)
        if key not in self._rates and len(self._rates) >= MAX_KEYS:
            self._rates.pop(next(iter(self._rates)))
        old = self._rates.get(key, rate_s)
        self._rates[key] = old + SMOOTHING * (rate_s - old)

    def miss(self, peer_id: PeerId) -> None:
        """Learn from a missing answer: give the peer twice the time from now on."""
        if peer_id not in self._backoffs and len(self._backoffs) >= MAX_KEYS:
            self._backoffs.pop(next(iter(self._backoffs)))
        self._backoffs[peer_id] = min(MAX_BACKOFF, 2.0 * self._backoffs.get(peer_id, 1.0))


class Beat(enum.Enum):
    """What to do at a tick of the heartbeat."""

    NOTHING = "nothing"
    PING = "ping"
    DEAD = "dead"


class Heartbeat:
    """Liveness of one connection while answers are awaited.

    Args:
        silence_timeout_s: silence after which the other side counts as dead.
    """

    def __init__(self, *, silence_timeout_s: float) -> None:
        self.interval_s = silence_timeout_s / 4
        self._silence_timeout_s = silence_timeout_s
        self._waiting_since_s = 0.0
        self._last_heard_s = 0.0

    def wait_begins(self, now_s: float) -> None:
        """The first outstanding request was sent."""
        self._waiting_since_s = now_s

    def heard(self, now_s: float) -> None:
        """Some bytes came, or some of ours were taken by the network."""
        self._last_heard_s = now_s

    def beat(self, now_s: float, *, awaits_answer: bool) -> Beat:
        """Ask at each tick, ``interval_s`` apart."""
        if not awaits_answer:
            return Beat.NOTHING
        silent_s = now_s - max(self._waiting_since_s, self._last_heard_s)
        if silent_s >= self._silence_timeout_s:
            return Beat.DEAD
        return Beat.PING if silent_s >= self.interval_s * 0.9 else Beat.NOTHING
