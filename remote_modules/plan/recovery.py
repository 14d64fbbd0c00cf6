"""What to do after a hop failed, or when there is no route.

Pure: outcomes and the time go in, one action comes out; nothing here waits, sends or draws random numbers on its own.

::

    hop failed, session lost      -> Replay on the same peer; the third time in a row, ban and Reroute
    hop failed, not served        -> avoid for a second (its record is stale), Reroute
    hop failed, busy or draining  -> avoid for the hinted time, Reroute
    hop failed, bad request       -> GiveUp: the request is wrong and no peer can mend that; nobody is banned
    hop failed, anything else     -> ban (doubling from ban_s to max_ban_s), Reroute
    no route                      -> Wait (doubling, with jitter), then look again
    deadline passed               -> GiveUp with the last error

Local errors (ValueError, LocalProtocolError) never come here: they are ours, and retrying cannot mend them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from remote_modules.errors import PeerRefused, PeerTimeout, PeerUnreachable, RefusalReason, RemoteModulesError
from remote_modules.peers import PeerId

if TYPE_CHECKING:
    from random import Random

__all__ = ["Action", "BanTable", "Failure", "GiveUp", "Recovery", "Replay", "Reroute", "Wait", "failure_of"]

MAX_REPLAYS_IN_A_ROW = 2
MIN_WAIT_S = 0.1
MAX_WAIT_S = 2.0
DEFAULT_AVOID_S = 1.0
MAX_BANS = 4096  # peers remembered; about 200 bytes each


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
    RefusalReason.ADAPTER_MISSING: Failure.INTERNAL,  # asked for in the request that brings it
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
    """Find other peers for the failed hop's blocks, at once."""


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


@dataclass(slots=True)
class _Ban:
    until_s: float
    strikes: int
    instance_id: str


class BanTable:
    """Peers that are not routed to for a while. Takes effect with the call that bans.

    Args:
        ban_s, max_ban_s: length of the first ban, and of the longest.
    """

    def __init__(self, *, ban_s: float, max_ban_s: float) -> None:
        self._ban_s = ban_s
        self._max_ban_s = max_ban_s
        self._bans: dict[PeerId, _Ban] = {}

    def ban(self, peer_id: PeerId, instance_id: str, *, now_s: float) -> float:
        """Ban after a failure, longer with each in a row; the time until which."""
        strikes = 1
        if (old := self._bans.get(peer_id)) is not None and old.instance_id == instance_id:
            strikes = old.strikes + 1
        length_s = min(self._max_ban_s, self._ban_s * 2.0 ** (strikes - 1))
        self._put(peer_id, _Ban(now_s + length_s, strikes, instance_id))
        return now_s + length_s

    def avoid(self, peer_id: PeerId, instance_id: str, *, until_s: float) -> None:
        """Route around a healthy peer that said no; not a strike."""
        old = self._bans.get(peer_id)
        strikes = 0 if old is None or old.instance_id != instance_id else old.strikes
        self._put(peer_id, _Ban(until_s, strikes, instance_id))

    def clear(self, peer_id: PeerId) -> None:
        """The peer did its work: forget its strikes."""
        self._bans.pop(peer_id, None)

    def is_banned(self, peer_id: PeerId, instance_id: str, *, now_s: float) -> bool:
        """Whether to route around this instance; a restarted peer (new instance) starts clean."""
        ban = self._bans.get(peer_id)
        return ban is not None and ban.instance_id == instance_id and now_s < ban.until_s

    def _put(self, peer_id: PeerId, ban: _Ban) -> None:
        if len(self._bans) >= MAX_BANS and peer_id not in self._bans:
            soonest = min(self._bans, key=lambda peer: self._bans[peer].until_s)
            del self._bans[soonest]
        self._bans[peer_id] = ban


class Recovery:
    """The decisions of one pass (a step, a forward, a backward).

    Args:
        bans: shared by all passes of a client.
        deadline_s: time at which to give up.
        rng: for the jitter of waits.
    """

    def __init__(self, bans: BanTable, *, deadline_s: float, rng: Random) -> None:
        self.deadline_s = deadline_s
        self.num_failures = 0
        self._bans = bans
        self._rng = rng
        self._num_waits = 0
        self._replays: dict[PeerId, int] = {}
        self._last_error: RemoteModulesError | None = None

    def on_hop_failed(
        self, peer_id: PeerId, instance_id: str, error: RemoteModulesError, *, now_s: float
    ) -> Reroute | Replay | GiveUp:
        """Decide after a hop failed; bans take effect here."""
        failure = failure_of(error)
        if failure is Failure.BAD_REQUEST:
            return GiveUp(error)
        self._last_error = error
        self.num_failures += 1
        if failure is Failure.SESSION_LOST:
            self._replays[peer_id] = self._replays.get(peer_id, 0) + 1
            if self._replays[peer_id] <= MAX_REPLAYS_IN_A_ROW and now_s < self.deadline_s:
                return Replay()
        self._shun(peer_id, instance_id, failure, error, now_s)
        return Reroute() if now_s < self.deadline_s else GiveUp(error)

    def on_hop_done(self, peer_id: PeerId) -> None:
        """Note a success: strikes and waits start afresh."""
        self._bans.clear(peer_id)
        self._replays.pop(peer_id, None)
        self._num_waits = 0

    def on_no_route(self, error: RemoteModulesError, *, now_s: float) -> Wait | GiveUp:
        """Decide when nobody covers the blocks."""
        if now_s >= self.deadline_s:
            return GiveUp(error if self._last_error is None else _chain(error, self._last_error))
        wait_s = min(MAX_WAIT_S, MIN_WAIT_S * 2.0**self._num_waits) * self._rng.uniform(0.5, 1.0)
        self._num_waits += 1
        return Wait(min(wait_s, self.deadline_s - now_s))

    def _shun(
        self, peer_id: PeerId, instance_id: str, failure: Failure, error: RemoteModulesError, now_s: float
    ) -> None:
        if failure is Failure.NOT_SERVED:
            self._bans.avoid(peer_id, instance_id, until_s=now_s + DEFAULT_AVOID_S)
        elif failure is Failure.BUSY:
            hint_s = getattr(error, "retry_after_s", None) or DEFAULT_AVOID_S
            self._bans.avoid(peer_id, instance_id, until_s=now_s + hint_s)
        else:
            self._bans.ban(peer_id, instance_id, now_s=now_s)


def _chain(error: RemoteModulesError, cause: RemoteModulesError) -> RemoteModulesError:
    error.__cause__ = cause
    return error
