"""Which peers are given no work for a while, and how often a client may try again.

A `Breakers` table has a circuit breaker for each peer that failed::

    closed     the peer is used; it opens at a hard failure, at three failures in a row, or when a quarter of the last
               requests failed (gray failure)
    open       for a back-off that doubles with each opening, with jitter: the peer gets nothing
    half-open  the back-off is over: the peer gets one probe, whoever sends it; its outcome closes or opens

A restarted process starts clean. Saying no (busy, draining) is no failure: such a peer is avoided for the time that it
asks for. Pure: the time and a `Random` are passed in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from remote_modules.peers import PeerId

if TYPE_CHECKING:
    from random import Random

__all__ = ["Breakers", "RetryBudget"]

MAX_PEERS = 4096  # remembered; about 400 bytes each
WINDOW = 32  # outcomes remembered of each peer
MIN_REQUESTS = 8  # outcomes on which a rate of failures is judged, and successes in a row after which all is forgotten
MAX_FAILED = 0.25  # of them
MAX_FAILED_IN_A_ROW = 3
PROBE_S = 10.0  # a probe without outcome for so long was abandoned
NEEDED_S = 1.0  # the longest back-off of a peer that nobody can stand in for
MAX_AVOID_S = 10.0  # a peer may ask for any time


@dataclass(slots=True)
class _Breaker:
    instance_id: str
    is_open: bool = False
    strikes: int = 0  # openings since the peer was last healthy
    opened_s: float = 0.0
    until_s: float = 0.0  # end of the back-off
    avoid_until_s: float = float("-inf")
    probe_until_s: float = float("-inf")
    is_proved: bool = False  # the back-off is over and the peer answers pings
    outcomes: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def is_failing(self) -> bool:
        outcomes = list(self.outcomes)
        if len(outcomes) >= MAX_FAILED_IN_A_ROW and not any(outcomes[-MAX_FAILED_IN_A_ROW:]):
            return True
        num_requests, num_failed = len(outcomes) - 1, outcomes.count(False) - 1  # they are noted from a failure on
        return num_requests >= MIN_REQUESTS and num_failed >= MAX_FAILED * num_requests


class Breakers:
    """The circuit breakers of a client, shared by all its passes. Each call takes effect at once.

    Args:
        base_s, max_s: shortest back-off, and longest.
        rng: for the jitter of back-offs.
    """

    def __init__(self, *, base_s: float, max_s: float, rng: Random) -> None:
        self._base_s = base_s
        self._max_s = max_s
        self._rng = rng
        self._breakers: dict[PeerId, _Breaker] = {}

    def fail(self, peer_id: PeerId, instance_id: str, *, is_hard: bool, now_s: float) -> bool:
        """Note a failure; whether the breaker is open now.

        Args:
            is_hard: the peer is gone, silent or talks nonsense, rather than having failed at this one request.
        """
        breaker = self._of(peer_id, instance_id)
        if breaker.is_open and breaker.probe_until_s <= now_s < breaker.until_s:
            return True  # no probe: work that was given before the breaker opened
        breaker.outcomes.append(False)
        if is_hard or breaker.is_open or breaker.is_failing():
            breaker.outcomes.clear()
            breaker.strikes += 1
            longest_s = min(self._max_s, self._base_s * 2.0 ** min(breaker.strikes, 64))
            breaker.is_open = True
            breaker.opened_s, breaker.until_s = now_s, now_s + self._rng.uniform(self._base_s, longest_s)
            breaker.is_proved, breaker.probe_until_s = False, float("-inf")
        return breaker.is_open

    def succeed(self, peer_id: PeerId, instance_id: str) -> None:
        """Note that the peer did its work: the breaker closes."""
        breaker = self._breakers.get(peer_id)
        if breaker is None:
            return
        breaker.outcomes.append(True)
        breaker.is_open = False
        recent = list(breaker.outcomes)[-MIN_REQUESTS:]
        if breaker.instance_id != instance_id or (len(recent) == MIN_REQUESTS and all(recent)):
            del self._breakers[peer_id]

    def avoid(self, peer_id: PeerId, instance_id: str, *, wait_s: float, now_s: float) -> None:
        """Use others for a while than a healthy peer that said no."""
        self._of(peer_id, instance_id).avoid_until_s = now_s + min(wait_s, MAX_AVOID_S)

    def is_usable(self, peer_id: PeerId, instance_id: str, *, now_s: float, is_needed: bool = False) -> bool:
        """Whether the peer may get work that is not given yet.

        Args:
            is_needed: nobody can stand in for it. Then it need not be proved alive before its probe, and a long
                back-off ends early.
        """
        breaker = self._breakers.get(peer_id)
        if breaker is None or breaker.instance_id != instance_id:
            return True
        if now_s < breaker.avoid_until_s:
            return False
        if not breaker.is_open:
            return True
        until_s = min(breaker.until_s, breaker.opened_s + NEEDED_S) if is_needed else breaker.until_s
        return now_s >= max(until_s, breaker.probe_until_s) and (is_needed or breaker.is_proved)

    def is_backing_off(self, peer_id: PeerId, instance_id: str, *, now_s: float) -> bool:
        """Whether the peer failed so recently that it is better left alone, even by those who use it."""
        breaker = self._breakers.get(peer_id)
        same = breaker is not None and breaker.instance_id == instance_id
        return breaker is not None and same and breaker.is_open and now_s < breaker.until_s

    def claim(self, peer_id: PeerId, instance_id: str, *, now_s: float) -> None:
        """Give the peer work: if its breaker is not closed, this is the probe, and others wait for the outcome."""
        breaker = self._breakers.get(peer_id)
        if breaker is not None and breaker.instance_id == instance_id and breaker.is_open:
            breaker.probe_until_s = now_s + PROBE_S

    def take_due(self, *, now_s: float) -> list[tuple[PeerId, str]]:
        """Peers (with their instances) to find out about: back-off over and nothing known. Each is claimed."""
        due = []
        for peer_id, breaker in self._breakers.items():
            is_over = breaker.is_open and now_s >= max(breaker.until_s, breaker.probe_until_s)
            if is_over and not breaker.is_proved:
                breaker.probe_until_s = now_s + PROBE_S
                due.append((peer_id, breaker.instance_id))
        return due

    def prove(self, peer_id: PeerId, instance_id: str) -> None:
        """The peer answered a ping: the next work that comes to it is its probe."""
        breaker = self._breakers.get(peer_id)
        if breaker is not None and breaker.instance_id == instance_id:
            breaker.is_proved, breaker.probe_until_s = True, float("-inf")

    def _of(self, peer_id: PeerId, instance_id: str) -> _Breaker:
        breaker = self._breakers.get(peer_id)
        if breaker is None or breaker.instance_id != instance_id:
            if breaker is None and len(self._breakers) >= MAX_PEERS:
                del self._breakers[next(iter(self._breakers))]
            breaker = self._breakers[peer_id] = _Breaker(instance_id)
        return breaker


class RetryBudget:
    """How often a client may try again, so that the end of a swarm is not met with a storm of requests.

    Each request that is done earns a part of a retry; besides, a few are always there after some time.

    Args:
        ratio: retries that one request earns.
        floor: retries that come back by themselves, one a second.
    """

    def __init__(self, *, ratio: float = 0.1, floor: float = 16.0) -> None:
        self._ratio = ratio
        self._floor = floor
        self._most = max(floor, 100.0)
        self._saved = floor
        self._seen_s: float | None = None

    def earn(self) -> None:
        """A request was done."""
        self._saved = min(self._most, self._saved + self._ratio)

    def take(self, *, now_s: float, keep: float = 0.0) -> bool:
        """Take one retry, if more than ``keep`` are left."""
        if self._saved < self._floor and self._seen_s is not None:
            self._saved = min(self._floor, self._saved + now_s - self._seen_s)
        self._seen_s = now_s
        if self._saved < 1.0 + keep:
            return False
        self._saved -= 1.0
        return True
