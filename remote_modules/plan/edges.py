"""From which peers to which others outputs go directly: what one client saw of it."""

from __future__ import annotations

from collections import OrderedDict

from remote_modules.peers import PeerId

__all__ = ["Edges"]

MAX_EDGES = 1024
DIAL_S = 4.0  # a peer that sent nothing on for so long cannot dial the other
MAX_LOST = 3  # in a row
SHUT_S = 60.0

Edge = tuple[PeerId, PeerId]


class Edges:
    """All edges are open at first; one over which nothing comes is left alone for a while."""

    def __init__(self) -> None:
        self._trouble: OrderedDict[Edge, tuple[float, int]] = OrderedDict()  # since when, and how much was lost
        self._shut_until_s: OrderedDict[Edge, float] = OrderedDict()

    def is_open(self, source: PeerId, target: PeerId, *, now_s: float) -> bool:
        """Whether to ask ``source`` to send to ``target``."""
        return source != target and now_s >= self._shut_until_s.get((source, target), now_s)

    def work(self, source: PeerId, target: PeerId) -> None:
        """Outputs went this way."""
        self._trouble.pop((source, target), None)

    def miss(self, source: PeerId, target: PeerId, *, now_s: float) -> None:
        """They were to, but the source had no connection yet."""
        since_s, num_lost = self._trouble.get((source, target), (now_s, 0))
        self._note((source, target), since_s, num_lost, now_s=now_s, is_shut=now_s - since_s >= DIAL_S)

    def lose(self, source: PeerId, target: PeerId, *, now_s: float) -> None:
        """They were sent, and did not come, or late."""
        since_s, num_lost = self._trouble.get((source, target), (now_s, 0))
        self._note((source, target), since_s, num_lost + 1, now_s=now_s, is_shut=num_lost + 1 >= MAX_LOST)

    def _note(self, edge: Edge, since_s: float, num_lost: int, *, now_s: float, is_shut: bool) -> None:
        self._trouble.pop(edge, None)
        if is_shut:
            self._shut_until_s.pop(edge, None)
            self._shut_until_s[edge] = now_s + SHUT_S
        else:
            self._trouble[edge] = (since_s, num_lost)
        if len(self._trouble) > MAX_EDGES:
            self._trouble.popitem(last=False)
        if len(self._shut_until_s) > MAX_EDGES:
            self._shut_until_s.popitem(last=False)
