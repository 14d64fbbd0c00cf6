"""Sessions of a peer, and the memory that their KV caches may take.

Bytes are reserved before work begins and given back when the session ends, so the sum never exceeds the budget: a
request that does not fit is refused, and nobody else's session is hurt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from remote_modules.config import ServerConfig
from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.kv import SpanCache, grown_capacity
from remote_modules.spans import Span
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import Output

__all__ = ["KVBudget", "KVCost", "Session", "SessionTable"]

_MAX_FREE_TOKENS = 2**31  # of caches that do not grow
_MAX_SPANS = 1024  # whose costs are kept: 100 bytes each


@dataclass(frozen=True, slots=True)
class KVCost:
    """What one block keeps for each row of a session.

    Attributes:
        row_bytes: however long the text is.
        token_bytes: for each token.
    """

    row_bytes: int
    token_bytes: int


class KVBudget:
    """Bytes of KV cache, reserved and free.

    Args:
        total_bytes: what all sessions together may hold.
        costs: of each block.
    """

    def __init__(self, total_bytes: int, costs: Mapping[int, KVCost]) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._costs = costs
        self._all = _summed(costs.values())
        self._by_span: dict[Span, KVCost] = {}

    @property
    def free_tokens(self) -> int:
        """Tokens of one row that still fit, over all blocks."""
        free_bytes = self.total_bytes - self.used_bytes - self._all.row_bytes
        if free_bytes < 0:
            return 0
        return min(free_bytes // self._all.token_bytes if self._all.token_bytes else _MAX_FREE_TOKENS, _MAX_FREE_TOKENS)

    def needed_bytes(self, span: Span, *, rows: int, capacity: int) -> int:
        cost = self._by_span.get(span)
        if cost is None:
            cost = _summed(self._costs[block] for block in span)
            if len(self._by_span) < _MAX_SPANS:
                self._by_span[span] = cost
        return rows * (cost.row_bytes + capacity * cost.token_bytes)

    def resize(self, old_bytes: int, new_bytes: int) -> None:
        """Change one session's reservation.

        Raises:
            PeerRefused: ``out_of_memory``; nothing is changed.
        """
        if self.used_bytes - old_bytes + new_bytes > self.total_bytes:
            free = self.total_bytes - self.used_bytes
            raise PeerRefused(
                f"KV cache needs {new_bytes - old_bytes} more bytes, {free} of {self.total_bytes} are free",
                peer_id="",
                reason=RefusalReason.OUT_OF_MEMORY,
                retry_after_s=5.0,
            )
        self.used_bytes += new_bytes - old_bytes


def _summed(costs: Iterable[KVCost]) -> KVCost:
    costs = list(costs)
    return KVCost(sum(cost.row_bytes for cost in costs), sum(cost.token_bytes for cost in costs))


@dataclass(slots=True)
class Session:
    """One client's KV cache on this peer.

    Attributes:
        span: blocks that the session uses; fixed when it opens.
        rows: batch size now.
        capacity: tokens per row that are reserved.
        reserved_bytes: what the budget holds for it.
        version: cache operations that it has seen; a copy takes over the count of its source.
        mask: attention mask of all tokens so far, ``[B, P]``, as int64 rows; None while the client sends none.
        last_step_id, last_reply: answered again when the client repeats the step.
        lock: held while a step runs.
        connection_id: the connection that used it last; None once that is lost.
        client_key: which signs who may bring inputs; empty until the client tells it.
    """

    session_id: str
    span: Span
    cache: SpanCache
    rows: int
    used_s: float
    capacity: int = 0
    reserved_bytes: int = 0
    version: int = 0
    mask: torch.Tensor | None = None
    last_step_id: int = -1
    last_reply: tuple[Output, list[Buffer]] | None = None
    connection_id: int | None = None
    client_key: bytes = b""
    is_closed: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SessionTable:
    """All sessions of a peer, at most ``max_sessions``.

    Args:
        budget: where their bytes are reserved.
        idle_s, orphan_s: a session unused for so long is dropped; the second once its connection is lost.
    """

    def __init__(self, budget: KVBudget, *, max_sessions: int, idle_s: float, orphan_s: float) -> None:
        self.budget = budget
        self._max_sessions = max_sessions
        self._idle_s = idle_s
        self._orphan_s = orphan_s
        self._sessions: dict[str, Session] = {}

    @classmethod
    def configured(cls, config: ServerConfig, budget: KVBudget) -> SessionTable:
        """With the limits of ``config``."""
        return cls(
            budget, max_sessions=config.max_sessions, idle_s=config.session_idle_s, orphan_s=config.orphan_session_s
        )

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

    def open(self, session: Session) -> None:
        """Add a session without reserving for it yet.

        Raises:
            PeerRefused: ``busy``, there are too many.
        """
        if len(self._sessions) >= self._max_sessions:
            text = f"{len(self._sessions)} sessions are open already"
            raise PeerRefused(text, peer_id="", reason=RefusalReason.BUSY, retry_after_s=5.0)
        self._sessions[session.session_id] = session

    def reserve(self, session: Session, *, rows: int, tokens: int) -> None:
        """Reserve for ``rows`` x ``tokens``. Raises as `KVBudget.resize`; then nothing is changed."""
        capacity = grown_capacity(session.capacity, tokens)
        new_bytes = self.budget.needed_bytes(session.span, rows=rows, capacity=capacity)
        self.budget.resize(session.reserved_bytes, new_bytes)
        session.capacity, session.rows, session.reserved_bytes = capacity, rows, new_bytes

    def close(self, session_id: str) -> None:
        """Drop a session and its bytes; unknown ids are ignored."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.is_closed = True
            self.budget.used_bytes -= session.reserved_bytes
            session.reserved_bytes = 0

    def disown(self, connection_id: int) -> None:
        """A connection is lost: its sessions live on for the orphan time."""
        for session in self._sessions.values():
            if session.connection_id == connection_id:
                session.connection_id = None

    def expire(self, now_s: float) -> list[str]:
        """Drop what was not used for too long; the ids."""
        expired = []
        for session in self._sessions.values():
            limit_s = self._idle_s if session.connection_id is not None else self._orphan_s
            if not session.lock.locked() and now_s - session.used_s >= limit_s:
                expired.append(session.session_id)
        for session_id in expired:
            self.close(session_id)
        return expired

    def close_all(self) -> None:
        for session_id in list(self._sessions):
            self.close(session_id)
