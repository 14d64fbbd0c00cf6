"""Whether a connection that is silent now should be kept ready for the next large message.

TCP that sent nothing for a round trip and 200 ms begins anew with a window of ten segments: a message that is larger
than those then takes two round trips more, in each direction that was silent. A frame of a few bytes each way in that
time is enough to keep the window. It is sent while sessions are open here, for a while after the last of their steps.
"""

from __future__ import annotations

__all__ = ["TICK_S", "Warmth"]

TICK_S = 0.05  # no silence lasts longer than two of them
INITIAL_WINDOW_BYTES = 14_000  # ten segments, less headers: what fits them never waits
MIN_RTT_S = 0.002  # what would be saved below is not worth a frame
MAX_SESSIONS = 1024  # remembered for each connection; the oldest are forgotten


class Warmth:
    """The sessions of one connection, and what they have sent.

    Args:
        limit_s: after the last step; 0: never kept warm.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._sessions: dict[str, None] = {}  # in the order of their first steps
        self._has_large = False
        self._used_s = float("-inf")
        self._moved = (0, 0)

    def use(self, session_id: str, num_bytes: int, now_s: float) -> None:
        """A step of a session sends, or brought, so many bytes."""
        if session_id not in self._sessions:
            if len(self._sessions) >= MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[session_id] = None
        self._has_large = self._has_large or num_bytes > INITIAL_WINDOW_BYTES
        self._used_s = now_s

    def forget(self, session_id: str) -> None:
        """The session is closed."""
        self._sessions.pop(session_id, None)
        self._has_large = self._has_large and bool(self._sessions)

    def has_others(self, session_id: str) -> bool:
        """Whether sessions other than this one are open here."""
        return len(self._sessions) > (session_id in self._sessions)

    def is_wanted(self, now_s: float, rtt_s: float | None) -> bool:
        """Whether a silence would cost the next step something."""
        is_far = rtt_s is None or rtt_s >= MIN_RTT_S
        return self._has_large and is_far and now_s - self._used_s < self._limit_s

    def is_silent(self, num_sent: int, num_received: int) -> bool:
        """Whether nothing moved, in one direction at least, since the last call, when so much had been moved."""
        before, self._moved = self._moved, (num_sent, num_received)
        return num_sent == before[0] or num_received == before[1]
