"""From which peers to which others outputs go directly: what one client saw of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from remote_modules.peers import PeerId

__all__ = ["Edges"]

MAX_EDGES = 1024
MAX_MISSES = 4  # in a row
LEAST_S = 4.0  # between the first and the last of them: a connection is dialled meanwhile
SHUT_S = 60.0

T = TypeVar("T")
Edge = tuple[PeerId, PeerId]


class Edges:
    """All edges are open at first; one that did not carry several times in a row is left alone for a while."""

    def __init__(self) -> None:
        self._misses: OrderedDict[Edge, tuple[int, float]] = OrderedDict()  # how many, and since when
        self._shut_until_s: OrderedDict[Edge, float] = OrderedDict()

    def is_open(self, source: PeerId, target: PeerId, *, now_s: float) -> bool:
        """Whether to ask ``source`` to send to ``target``."""
        return source != target and now_s >= self._shut_until_s.get((source, target), now_s)

    def note(self, source: PeerId, target: PeerId, *, is_used: bool, now_s: float) -> None:
        """Outputs went this way, or were to and did not."""
        edge = (source, target)
        num_misses, since_s = self._misses.pop(edge, (0, now_s))
        if is_used:
            return
        if num_misses + 1 < MAX_MISSES or now_s - since_s < LEAST_S:
            _put(self._misses, edge, (num_misses + 1, since_s))
        else:
            self._shut_until_s.pop(edge, None)
            _put(self._shut_until_s, edge, now_s + SHUT_S)


def _put(table: OrderedDict[Edge, T], edge: Edge, value: T) -> None:
    table[edge] = value
    if len(table) > MAX_EDGES:
        table.popitem(last=False)
