"""How long to wait for a peer: two questions, answered apart.

*Is it alive?* A peer with work of ours must say something (an answer, a pong, bytes of either) within the silence
timeout. A pong costs it nothing even while it computes, so a frozen or unreachable peer is noticed in seconds
whatever the work is.

*Does it get on?* A live peer gets a multiple of the longest time that such work took before, doubled after each miss,
as TCP does for its retransmissions (RFC 6298). Long before that it is slower than expected, and somebody else may be
asked too.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from remote_modules.peers import PeerId

__all__ = ["Beat", "Heartbeat", "WorkEstimator"]

SAFETY_FACTOR = 4.0  # of the time that all but one answer in a hundred keep to
ANNOUNCED_FACTOR = 8.0  # of the time that the peer's announced speed promises, while nothing was observed
OWN_FACTOR = 1.5  # slow work gets at least so much of that time, whatever the limit
LAG_FACTOR = 3.0  # of the time that all but one answer in twenty keep to: later is slow
SMOOTHING = 0.25
MIN_SAMPLES = 3  # before anything is called slow
MAX_BACKOFF = 64.0
MAX_KEYS = 4096  # (peer, kind) pairs remembered; up to 1 KB each


@dataclass(slots=True)
class _Times:
    """Work of one size: smoothed seconds, their mean deviation, and how much work it was."""

    mean_s: float
    deviation_s: float
    work: float
    num_samples: int = 1

    def add(self, took_s: float, work: float) -> None:
        self.deviation_s += SMOOTHING * (abs(took_s - self.mean_s) - self.deviation_s)
        self.mean_s += SMOOTHING * (took_s - self.mean_s)
        self.work += SMOOTHING * (work - self.work)
        self.num_samples += 1

    def within_s(self, deviations: float, work: float) -> float:
        """Time that nearly all answers keep to; more work than was observed takes longer in proportion."""
        return (self.mean_s + deviations * self.deviation_s) * max(1.0, work / self.work)


@dataclass(slots=True)
class _Kind:
    by_size: dict[int, _Times] = field(default_factory=dict)  # by the logarithm of the work

    def add(self, took_s: float, work: float) -> None:
        size = _size(work)
        if (times := self.by_size.get(size)) is None:
            self.by_size[size] = _Times(took_s, took_s / 2, work)
        else:
            times.add(took_s, work)

    def nearest(self, work: float) -> _Times:
        """Of the size that is most like ``work``; the larger one of two."""
        size = _size(work)
        if (times := self.by_size.get(size)) is not None:
            return times
        return self.by_size[min(self.by_size, key=lambda known: (abs(known - size), -known))]


class WorkEstimator:
    """How long requests of each peer take, by kind and size, from what was observed.

    Args:
        min_timeout_s: least time given to any request.
        max_timeout_s: most, unless such work is known to take longer; and what is given while nothing is known.
    """

    def __init__(self, *, min_timeout_s: float, max_timeout_s: float) -> None:
        self._min_timeout_s = min_timeout_s
        self._max_timeout_s = max_timeout_s
        self._kinds: dict[tuple[PeerId, str], _Kind] = {}
        self._backoffs: dict[PeerId, float] = {}

    def timeout_s(
        self, peer_id: PeerId, kind: str, *, work: float, announced_rate: float, transfer_s: float = 0.0
    ) -> float:
        """Time to give a request.

        Args:
            kind: ``"decode"``, ``"prefill"``, ``"forward"``, ``"backward"`` or ``"kept_backward"``.
            work: tokens times blocks.
            announced_rate: tokens x blocks per second that the peer claims; 0 for unknown.
            transfer_s: what the bytes take.
        """
        known = self._kinds.get((peer_id, kind))
        if known is None:
            promised_s = work / announced_rate if announced_rate > 0 else 0.0
            base_s = max(self._max_timeout_s, ANNOUNCED_FACTOR * promised_s)
        else:
            within_s = known.nearest(work).within_s(4.0, work)
            clamped_s = min(max(SAFETY_FACTOR * within_s, self._min_timeout_s), self._max_timeout_s)
            base_s = max(clamped_s, OWN_FACTOR * within_s)
        return base_s * self._backoffs.get(peer_id, 1.0) + transfer_s

    def patience_s(self, peer_id: PeerId, kind: str, *, work: float) -> float:
        """Time after which a request is slower than expected; infinite while too little was observed."""
        known = self._kinds.get((peer_id, kind))
        times = None if known is None else known.nearest(work)
        if times is None or times.num_samples < MIN_SAMPLES:
            return math.inf
        return LAG_FACTOR * times.within_s(2.0, work)

    def expected_s(self, peer_id: PeerId, kind: str, *, work: float) -> float | None:
        """What such a request took lately, on average; None while nothing was observed."""
        known = self._kinds.get((peer_id, kind))
        return None if known is None else known.nearest(work).within_s(0.0, work)

    def observe(self, peer_id: PeerId, kind: str, *, work: float, took_s: float) -> None:
        """Learn from an answer."""
        self._backoffs.pop(peer_id, None)
        key = (peer_id, kind)
        if key not in self._kinds and len(self._kinds) >= MAX_KEYS:
            self._kinds.pop(next(iter(self._kinds)))
        self._kinds.setdefault(key, _Kind()).add(took_s, max(work, 1.0))

    def miss(self, peer_id: PeerId) -> None:
        """Learn from a missing answer: give the peer twice the time from now on."""
        if peer_id not in self._backoffs and len(self._backoffs) >= MAX_KEYS:
            self._backoffs.pop(next(iter(self._backoffs)))
        self._backoffs[peer_id] = min(MAX_BACKOFF, 2.0 * self._backoffs.get(peer_id, 1.0))


def _size(work: float) -> int:
    return int(max(work, 1.0)).bit_length()


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
