"""What the microbatches of one pass know of its failures together: a peer that is lost is lost once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from remote_modules.client.stats import StatsRecorder
from remote_modules.peers import PeerId

__all__ = ["PassFailures"]


class PassFailures:
    """Counts a failure that several microbatches meet, and the time that it costs, once."""

    def __init__(self, stats: StatsRecorder) -> None:
        self._stats = stats
        self._most: dict[tuple[PeerId, str], int] = defaultdict(int)  # that one microbatch met
        self._met: dict[tuple[Hashable, PeerId, str], int] = defaultdict(int)
        self._waiting: set[Hashable] = set()  # microbatches that have failed and not gone on
        self._since_s = 0.0

    def meet(self, who: Hashable, peer_id: PeerId, instance_id: str, now_s: float) -> bool:
        """The microbatch ``who`` failed at a peer; whether another one told of it already."""
        if not self._waiting:
            self._since_s = now_s
        self._waiting.add(who)
        self._met[who, peer_id, instance_id] += 1
        times = self._met[who, peer_id, instance_id]
        is_known = times <= self._most[peer_id, instance_id]
        self._most[peer_id, instance_id] = max(times, self._most[peer_id, instance_id])
        return is_known

    def go_on(self, who: Hashable, now_s: float) -> None:
        """The microbatch ``who`` did a hop."""
        if who in self._waiting:
            self._waiting.remove(who)
            if not self._waiting:
                self._stats.stall_s += now_s - self._since_s
