"""Graphs of forwards that a peer keeps for their backwards: a cache with a budget of bytes.

All on the event loop; the device thread gets a graph when its backward begins, and the table has it no more. Whatever
is dropped is recomputed, so nothing here can make a number wrong or a request fail.

Clients are told apart by their connections. Each has a right to an equal share of the budget, and may use what others
leave free. When there is no room, a client within its share takes it from the one furthest beyond its own, and a client
beyond its share from itself; the least recently kept graph goes first. So nobody can drive out what another keeps
within its share.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from remote_modules.server.graphs import Graph
from remote_modules.spans import Span

__all__ = ["Activations"]

MAX_LEASE_S = 600.0
MAX_GRAPHS = 64  # of one connection; as many requests may be under way on it


@dataclass(frozen=True, slots=True)
class _Kept:
    graph: Graph
    expires_s: float


class Activations:
    """The graphs of all connections.

    Args:
        max_bytes: of all together; 0: none is kept.

    Attributes:
        used_bytes: of all that are kept now, and of those whose backward is under way.
        num_used: backwards that used one.
        num_lost: backwards that asked for one that was gone.
        num_recomputed: backwards that brought their inputs.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.used_bytes = 0
        self.num_used = 0
        self.num_lost = 0
        self.num_recomputed = 0
        self._max_bytes = max_bytes
        self._kept: dict[int, OrderedDict[int, _Kept]] = {}  # by connection and request, oldest first; none is empty
        self._token_bytes = 0.0  # of one token in one block, as in the latest graph

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def has_room(self, blocks: Span, num_tokens: int) -> bool:
        """Whether a graph like the latest one, of so many tokens, is no larger than the budget.

        After a no the next is expected to be smaller: the latest may have been unlike it, and nothing else would show.
        """
        if self._token_bytes * num_tokens * len(blocks) <= self._max_bytes:
            return self._max_bytes > 0
        self._token_bytes /= 2
        return False

    def keep(self, connection_id: int, request_id: int, graph: Graph, *, lease_s: float, now_s: float) -> bool:
        """Keep ``graph`` for at most ``lease_s``; whether there was room."""
        self._token_bytes = graph.num_bytes / max(1, graph.num_tokens * len(graph.blocks))
        self.drop(connection_id, request_id)
        if not self._make_room(connection_id, graph.num_bytes):
            return False
        if len(self._kept.get(connection_id, ())) >= MAX_GRAPHS:
            self._drop_oldest(connection_id)
        own = self._kept.setdefault(connection_id, OrderedDict())
        own[request_id] = _Kept(graph, now_s + min(lease_s, MAX_LEASE_S))
        self.used_bytes += graph.num_bytes
        return True

    def take(self, connection_id: int, request_id: int) -> Graph | None:
        """The graph of a forward, for its backward: then call `release`. None: it is gone."""
        own = self._kept.get(connection_id)
        kept = own.pop(request_id, None) if own else None
        if not own:
            self._kept.pop(connection_id, None)
        return None if kept is None else kept.graph

    def drop(self, connection_id: int, request_id: int) -> None:
        """No backward will ask for the graph of this forward, if it is kept at all."""
        graph = self.take(connection_id, request_id)
        if graph is not None:
            self.release(graph)

    def release(self, graph: Graph) -> None:
        """The backward of a graph that was taken is over."""
        self.used_bytes -= graph.num_bytes

    def expire(self, now_s: float) -> None:
        """Drop those whose lease is over."""
        for connection_id, own in list(self._kept.items()):
            for request_id in [request_id for request_id, kept in own.items() if now_s >= kept.expires_s]:
                self.drop(connection_id, request_id)

    def forget(self, connection_id: int) -> None:
        """The connection is lost."""
        for request_id in list(self._kept.get(connection_id, ())):
            self.drop(connection_id, request_id)

    def clear(self) -> int:
        """Drop all; how many."""
        num_graphs = len(self)
        for connection_id in list(self._kept):
            self.forget(connection_id)
        return num_graphs

    def close(self) -> None:
        """Drop all, and keep none from now on."""
        self.clear()
        self._max_bytes = 0

    def _make_room(self, connection_id: int, num_bytes: int) -> bool:
        if num_bytes > self._max_bytes:
            return False
        share = self._max_bytes / len(self._kept.keys() | {connection_id})
        while self.used_bytes + num_bytes > self._max_bytes:
            sizes = {client: self._bytes_of(client) for client in self._kept}
            loser = connection_id
            if sizes and sizes.get(connection_id, 0) + num_bytes <= share:
                loser = max(sizes, key=lambda client: sizes[client])
            if loser not in sizes:  # what else is in use cannot be dropped
                return False
            self._drop_oldest(loser)
        return True

    def _bytes_of(self, connection_id: int) -> int:
        return sum(kept.graph.num_bytes for kept in self._kept[connection_id].values())

    def _drop_oldest(self, connection_id: int) -> None:
        self.drop(connection_id, next(iter(self._kept[connection_id])))
