"""What to do after a hop failed, or when there is no route.

Pure: outcomes and the time go in, one action comes out; nothing here waits, sends or draws random numbers on its own.

::

    hop failed, session lost      -> Replay on the same peer; the third time in a row it is a hard failure, Reroute
    hop failed, not served        -> avoid the peer for a second (its record is stale), Reroute
    hop failed, busy or draining  -> avoid the peer for the hinted time, Reroute; no failure of the peer's
    hop failed, bad request       -> GiveUp: the request is wrong and no peer can mend that; nobody is blamed
    hop failed, internal error    -> a failure; avoid the peer for a second, Reroute
    hop failed, anything else     -> a hard failure: the peer's breaker opens (`plan.breakers`), Reroute
    no route                      -> Wait (full jitter below a doubling limit), then look again
    deadline passed               -> GiveUp with the last error, `SpanUnavailable` if there was no route

A Reroute beyond the retry budget comes with a time to wait first. Local errors (ValueError, LocalProtocolError) never
come here: they are ours, and retrying cannot mend them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from remote_modules.errors import (
    NoRouteError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalReason,
    RemoteModulesError,
    SpanUnavailable,
)
from remote_modules.peers import PeerId
from remote_modules.plan.breakers import Breakers, RetryBudget

if TYPE_CHECKING:
    from random import Random

__all__ = ["Action", "Failure", "GiveUp", "Recovery", "Replay", "Reroute", "Wait", "failure_of"]

MAX_REPLAYS_IN_A_ROW = 2
MIN_WAIT_S = 0.2
MAX_WAIT_S = 2.0
DEFAULT_AVOID_S = 1.0


class Failure(enum.Enum):
    """Why a hop failed, as far as the decision goes."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    NONSENSE = "nonsense"  # protocol broken, wrong shape, not finite
    BAD_REQUEST = "bad_request"
    NOT_SERVED = "not_served"
    SESSION_LOST = "session_lost"
    BUSY = "busy"
    INTERNAL = "internal"


_OF_REASON = {
    RefusalReason.BAD_REQUEST: Failure.BAD_REQUEST,
    RefusalReason.NOT_SERVED: Failure.NOT_SERVED,
    RefusalReason.SESSION_LOST: Failure.SESSION_LOST,
    RefusalReason.OUT_OF_MEMORY: Failure.BUSY,
    RefusalReason.BUSY: Failure.BUSY,
    RefusalReason.ADAPTER_MISSING: Failure.BUSY,  # also by those that do not offer what others do
    RefusalReason.DRAINING: Failure.BUSY,
    RefusalReason.INTERNAL: Failure.INTERNAL,
}


def failure_of(error: RemoteModulesError) -> Failure:
    """Which failure an error of a hop means."""
    if isinstance(error, PeerRefused):
        return _OF_REASON[error.reason]
    if isinstance(error, PeerTimeout):
        return Failure.TIMEOUT
    return Failure.UNREACHABLE if isinstance(error, PeerUnreachable) else Failure.NONSENSE


@dataclass(frozen=True, slots=True)
class Reroute:
    """Find other peers for the failed hop's blocks, after so long: at once, unless there were too many retries."""

    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Replay:
    """Rebuild the session on the same peer and go on."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nobody covers the blocks now: wait so long, look the swarm up again, then route."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Raise this error to the caller."""

    error: RemoteModulesError


Action: TypeAlias = Reroute | Replay | Wait | GiveUp


class Recovery:
    """The decisions of one pass (a step, a forward, a backward).

    Args:
        breakers, budget: shared by all passes of a client.
        deadline_s: time at which to give up.
        rng: for the jitter of waits.
    """

    def __init__(self, breakers: Breakers, budget: RetryBudget, *, deadline_s: float, rng: Random) -> None:
        self.deadline_s = deadline_s
        self.num_failures = 0
        self._breakers = breakers
        self._budget = budget
        self._rng = rng
        self._num_waits = 0
        self._replays: dict[PeerId, int] = {}
        self._last_error: RemoteModulesError | None = None

    def on_hop_failed(
        self, peer_id: PeerId, instance_id: str, error: RemoteModulesError, *, now_s: float, is_known: bool = False
    ) -> Reroute | Replay | GiveUp:
        """Decide after a hop failed; breakers take effect here.

        Args:
            is_known: another microbatch of the pass met the same failure: one retry is taken for all.
        """
        failure = failure_of(error)
        if failure is Failure.BAD_REQUEST:
            return GiveUp(error)
        self._last_error = error
        self.num_failures += 1
        if failure is Failure.SESSION_LOST:
            self._replays[peer_id] = self._replays.get(peer_id, 0) + 1
            if self._replays[peer_id] <= MAX_REPLAYS_IN_A_ROW and now_s < self.deadline_s:
                return Replay()
        self.blame(peer_id, instance_id, error, now_s=now_s)
        if now_s >= self.deadline_s:
            return GiveUp(error)
        return Reroute() if is_known or self._budget.take(now_s=now_s) else Reroute(self._wait_s(now_s))

    def on_hop_done(self, peer_id: PeerId, instance_id: str) -> None:
        """Note a success: its breaker closes, waits start afresh."""
        self._breakers.succeed(peer_id, instance_id)
        self._budget.earn()
        self._replays.pop(peer_id, None)
        self._num_waits = 0

    def on_no_route(self, error: NoRouteError, *, now_s: float) -> Wait | GiveUp:
        """Decide when nobody covers the blocks."""
        if now_s < self.deadline_s:
            return Wait(self._wait_s(now_s))
        given_up = SpanUnavailable(str(error), missing=error.missing)
        given_up.__cause__ = self._last_error
        return GiveUp(given_up)

    def blame(self, peer_id: PeerId, instance_id: str, error: RemoteModulesError, *, now_s: float) -> None:
        """Note a failure without deciding anything: some other request does the work."""
        failure = failure_of(error)
        if failure is Failure.BUSY:
            hint_s = getattr(error, "retry_after_s", None) or DEFAULT_AVOID_S
            self._breakers.avoid(peer_id, instance_id, wait_s=hint_s, now_s=now_s)
        elif failure is Failure.NOT_SERVED:
            self._breakers.avoid(peer_id, instance_id, wait_s=DEFAULT_AVOID_S, now_s=now_s)
        elif failure is Failure.INTERNAL:
            self._breakers.fail(peer_id, instance_id, is_hard=False, now_s=now_s)
            self._breakers.avoid(peer_id, instance_id, wait_s=DEFAULT_AVOID_S, now_s=now_s)
        elif failure is not Failure.BAD_REQUEST:
            self._breakers.fail(peer_id, instance_id, is_hard=True, now_s=now_s)

    def _wait_s(self, now_s: float) -> float:
        longest_s = min(MAX_WAIT_S, MIN_WAIT_S * 2.0 ** min(self._num_waits, 64))
        self._num_waits += 1
        return min(self._rng.uniform(0.0, longest_s), max(0.0, self.deadline_s - now_s))
