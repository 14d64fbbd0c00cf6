"""Keeping a peer's record alive in discovery, for ever.

Each source has a pace of its own, so that a dead tracker slows down nobody and a busy one is left alone:

    taken        again after the interval, within the bounds of the source; +-20 %, so that peers drift apart
    failed       again after a random time of at most 1 s, 2 s, 4 s ... up to the interval: never given up
    overloaded   again after what it asks for, and up to as much again
    replaced     a newer instance with our key proved itself: stop everything, and say so
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import msgspec

from remote_modules.discovery.base import Discovery, NobodyToAskError, OverloadedError, Pace
from remote_modules.discovery.merged import MergedDiscovery
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, PeerState, SignedRecord, decode_record
from remote_modules.plan.leases import DuplicateIdentityError, StaleRecordError

__all__ = ["Announcer"]

logger = logging.getLogger(__name__)

JITTER = 0.2  # of an interval, either way
FIRST_PAUSE_S = 1.0  # longest wait after a first failure; doubles
MAX_RETRY_AFTER_S = 900.0  # a source that wants to be left alone for longer is asked then nevertheless
WITHDRAW_TIMEOUT_S = 2.0
TAKEOVER = 60_000  # sequences left free below a takeover: the older instance must not catch up before it is told


@dataclass(slots=True, eq=False)
class _Lane:
    """One source: when it is told next, on the loop's clock, and how it went lately."""

    source: Discovery
    due_s: float = 0.0
    num_failures: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)


class Announcer:
    """Announces at once, at every change of state, and each interval.

    Args:
        discovery: where to; each source of a `MergedDiscovery` on its own.
        describe: the record as of now, apart from its sequence and state.
        interval_s: between renewals.
        first_sequence: milliseconds of wall-clock time, so that a later start has higher numbers than an earlier one
            and nobody can replay a record of the past; see `plan.leases`.
        on_replaced: called once if a newer instance has taken the identity over.
        rng: for the pauses; None: one of its own that the identity and ``first_sequence`` decide.

    Attributes:
        signed: what was announced last.
        replaced: why there are no more announcements.
    """

    def __init__(
        self,
        discovery: Discovery,
        identity: Identity,
        *,
        describe: Callable[[], PeerRecord],
        interval_s: float,
        first_sequence: int,
        on_replaced: Callable[[DuplicateIdentityError], None] | None = None,
        rng: Random | None = None,
    ) -> None:
        sources = discovery.sources if isinstance(discovery, MergedDiscovery) else (discovery,)
        self._lanes = [_Lane(source) for source in sources]
        self._identity = identity
        self._describe = describe
        self._interval_s = interval_s
        self._on_replaced = on_replaced
        self._rng = rng or Random(f"{identity.peer_id}/{first_sequence}")
        self._state = PeerState.JOINING
        self._sequence = first_sequence
        self._is_established = False  # whether any source has taken a record of this instance
        self._tasks: list[asyncio.Task[None]] = []
        self.signed: SignedRecord | None = None
        self.replaced: DuplicateIdentityError | None = None

    def start(self) -> None:
        """Renew each interval from now on; `set_state` announces at once."""
        loop = asyncio.get_running_loop()
        for lane in self._lanes:
            if lane.due_s == 0.0:
                lane.due_s = loop.time() + self._renewal_s(None)
        self._tasks = [loop.create_task(self._run(lane)) for lane in self._lanes]

    async def set_state(self, state: PeerState) -> None:
        """Change the state and announce it now; failures are logged and mended by the next renewal."""
        self._state = state
        if self.replaced is None:
            signed = self._sign()
            await asyncio.gather(*(self._announce(lane, signed) for lane in self._lanes))

    def abandon(self) -> None:
        """Stop without withdrawing, as a killed process does."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Withdraw and stop; idempotent."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.signed is not None and self.replaced is None:
            signed = self._sign()
            await asyncio.gather(*(_withdraw(lane.source, signed) for lane in self._lanes))

    async def _run(self, lane: _Lane) -> None:
        loop = asyncio.get_running_loop()
        while self.replaced is None:
            wait_s = lane.due_s - loop.time()
            if wait_s <= 0:
                await self._announce(lane, self._sign())
                continue
            lane.moved.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lane.moved.wait(), wait_s)

    async def _announce(self, lane: _Lane, signed: SignedRecord) -> None:
        wait_s: float
        try:
            try:
                pace = await lane.source.announce(signed)
            except StaleRecordError as exc:
                if self._is_own(exc):  # trackers that share their leases: another of them was told first
                    pace = None
                elif self._take_over(exc):
                    pace = await lane.source.announce(self._sign())
                else:
                    raise
        except DiscoveryError as exc:
            if self._is_replaced(exc):
                return
            wait_s = self._after_failure_s(lane, exc)
        else:
            self._is_established = True
            if lane.num_failures:
                logger.info("announced again state=%s", self._state.value)
            lane.num_failures = 0
            wait_s = self._renewal_s(pace)
        lane.due_s = asyncio.get_running_loop().time() + wait_s
        lane.moved.set()

    def _renewal_s(self, pace: Pace | None) -> float:
        interval_s = self._interval_s
        if pace is not None:
            interval_s = min(max(interval_s, pace.shortest_s), pace.longest_s)
        return interval_s * self._rng.uniform(1 - JITTER, 1 + JITTER)

    def _after_failure_s(self, lane: _Lane, exc: DiscoveryError) -> float:
        lane.num_failures += 1
        longest_s = min(self._interval_s, FIRST_PAUSE_S * 2 ** min(lane.num_failures - 1, 32))
        if isinstance(exc, OverloadedError) and exc.retry_after_s is not None:
            return min(exc.retry_after_s, MAX_RETRY_AFTER_S) * self._rng.uniform(1.0, 2.0)
        if lane.num_failures == 1 and not isinstance(exc, NobodyToAskError):
            logger.warning("announce failed, trying again at least every %.0f s: %s", self._interval_s, exc)
        return self._rng.uniform(0.0, longest_s)

    def _is_own(self, exc: StaleRecordError) -> bool:
        return decode_record(exc.newest.payload).instance_id == self._describe().instance_id

    def _take_over(self, exc: StaleRecordError) -> bool:
        """A dead instance of ours, or one that must give way, counted further than our clock: count on from there."""
        newest = decode_record(exc.newest.payload)
        is_newcomer = not self._is_established and not isinstance(exc, DuplicateIdentityError)
        if not is_newcomer or newest.sequence < self._sequence:
            return False
        logger.info("counting on from another instance of this identity instance=%s", ascii(newest.instance_id[:6]))
        self._sequence = newest.sequence + TAKEOVER
        return True

    def _is_replaced(self, exc: DiscoveryError) -> bool:
        """Whether a newer instance proved itself; an old record of a dead one, repeated by somebody, proves nothing."""
        if not isinstance(exc, DuplicateIdentityError):
            return False
        newest = decode_record(exc.newest.payload)
        if newest.sequence <= self._sequence:
            return False
        if self.replaced is None:
            self.replaced = exc
            logger.error("stopped announcing: %s", exc)
            for lane in self._lanes:
                lane.moved.set()
            if self._on_replaced is not None:
                self._on_replaced(exc)
        return True

    def _sign(self) -> SignedRecord:
        self._sequence += 1
        record = msgspec.structs.replace(self._describe(), sequence=self._sequence, state=self._state)
        self.signed = self._identity.sign_record(record)
        return self.signed


async def _withdraw(source: Discovery, signed: SignedRecord) -> None:
    try:
        await asyncio.wait_for(source.withdraw(signed), WITHDRAW_TIMEOUT_S)
    except NobodyToAskError:
        return
    except (DiscoveryError, asyncio.TimeoutError) as exc:
        logger.info("record not withdrawn, its lease will run out: %s", exc)
