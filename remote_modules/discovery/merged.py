"""Several sources of discovery used as one, so that no single one is needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from remote_modules.discovery.base import Discovery, NobodyToAskError
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord
from remote_modules.plan.leases import StaleRecordError, merge_records

if TYPE_CHECKING:
    from remote_modules.discovery.exchange import ExchangeDiscovery
    from remote_modules.discovery.known_peers import KnownPeers

__all__ = ["MergedDiscovery", "build_discovery"]

logger = logging.getLogger(__name__)

GRACE_S = 2.0  # for sources that are slower than another that found somebody; mDNS takes 1.3 s
EXCHANGE_TIMEOUT_S = 2.0  # one request to a peer; it may be dead, and others are asked after it

_Answer = TypeVar("_Answer")
_Outcome: TypeAlias = tuple[_Answer | None, DiscoveryError | None]


class MergedDiscovery:
    """All of ``sources`` at once, and peers that are asked for others; see `Discovery` for the contract.

    A call takes as long as its slowest source, which has a timeout of its own; but once a lookup has found somebody,
    the others have `GRACE_S` more. A call succeeds if one source does; a source that starts to fail is logged once,
    and once more when it works again. Closing this closes the sources.

    Args:
        sources: trackers, the local network, given peers.
        exchange: asked as well now and then, and at once when a source fails or nobody is found.

    Raises:
        ValueError: no sources.
    """

    def __init__(self, sources: Sequence[Discovery], *, exchange: ExchangeDiscovery | None = None) -> None:
        if not sources:
            raise ValueError("discovery needs at least one source: a tracker URL, a peer address, or mdns=True")
        self._primary = tuple(sources)
        self._exchange = exchange
        self._is_troubled = True  # whether the last lookup of the primary sources was not as it should be
        self._failing: set[tuple[str, int]] = set()  # call and index of the source: some refuse one call only

    @property
    def sources(self) -> tuple[Discovery, ...]:
        """All of them, the exchange last: whoever announces often does so to each at its own pace."""
        return self._primary if self._exchange is None else (*self._primary, self._exchange)

    async def announce(self, signed: SignedRecord) -> None:
        """Announce to every source.

        Raises:
            StaleRecordError: all of them failed, this one with proof of something newer.
            DiscoveryError: all of them failed; it names each failure.
        """
        self._sum_up("announce", await asyncio.gather(*(_try(source.announce(signed)) for source in self.sources)))

    async def withdraw(self, signed: SignedRecord) -> None:
        """Withdraw from every source.

        Raises:
            DiscoveryError: all of them failed; it names each failure.
        """
        self._sum_up("withdraw", await asyncio.gather(*(_try(source.withdraw(signed)) for source in self.sources)))

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """What all sources know, one record for each peer; of equally new ones that of the first source.

        Raises:
            DiscoveryError: all sources failed; it names each failure.
        """
        exchange = self._exchange
        asks = exchange is not None and (self._is_troubled or exchange.is_due)
        asked = (*self._primary, exchange) if exchange is not None and asks else self._primary
        outcomes = await _first_and_grace([_try(source.lookup(model_key)) for source in asked])
        primary = outcomes[: len(self._primary)]
        self._is_troubled = any(failure is not None for _, failure in primary) or not any(
            answer for answer, _ in primary
        )
        if exchange is not None and not asks:
            outcomes.append(
                await _try(exchange.lookup(model_key)) if self._is_troubled else (exchange.recall(model_key), None)
            )
        return merge_records(self._sum_up("lookup", outcomes))

    async def aclose(self) -> None:
        """Close every source; idempotent."""
        await asyncio.gather(*(source.aclose() for source in self.sources))

    def _sum_up(self, what: str, outcomes: Sequence[_Outcome[_Answer]]) -> list[_Answer]:
        answers: list[_Answer] = []
        failures: list[DiscoveryError] = []
        num_nobody = 0
        for index, (answer, failure) in enumerate(outcomes):
            if isinstance(failure, NobodyToAskError):
                num_nobody += 1
                continue
            self._note(what, index, failure)
            if failure is None:
                answers.append(cast(_Answer, answer))
            else:
                failures.append(failure)
        if not answers and failures:
            reasons = "; ".join(map(str, failures))
            stale = next((failure for failure in failures if isinstance(failure, StaleRecordError)), None)
            if stale is not None:
                raise type(stale)(f"{what} failed at every source: {reasons}", newest=stale.newest) from stale
            raise DiscoveryError(f"{what} failed at every source: {reasons}") from failures[0]
        return answers

    def _note(self, what: str, index: int, failure: DiscoveryError | None) -> None:
        key = (what, index)
        if failure is None and key in self._failing:
            self._failing.discard(key)
            logger.info("discovery source works again call=%s source=%d", what, index)
        elif failure is not None and key not in self._failing:
            self._failing.add(key)
            logger.warning("discovery source fails call=%s source=%d: %s", what, index, failure)


async def _try(call: Awaitable[_Answer]) -> _Outcome[_Answer]:
    try:
        return await call, None
    except DiscoveryError as exc:
        return None, exc


async def _first_and_grace(calls: Sequence[Coroutine[Any, Any, _Outcome[_Answer]]]) -> list[_Outcome[_Answer]]:
    """The outcomes of all calls; those that are not done `GRACE_S` after one has found something count as failed."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    pending = set(tasks)
    deadline_s: float | None = None
    clock = asyncio.get_running_loop().time
    try:
        while pending and (deadline_s is None or clock() < deadline_s):
            timeout_s = None if deadline_s is None else deadline_s - clock()
            done, pending = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if deadline_s is None and any(task.result()[0] for task in done):
                deadline_s = clock() + GRACE_S
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    late = DiscoveryError(f"no answer within {GRACE_S} s of the first")
    return [(None, late) if task in pending else task.result() for task in tasks]


def build_discovery(
    *,
    trackers: Sequence[str] = (),
    mdns: bool = True,
    peers: Sequence[str] = (),
    mdns_interfaces: Sequence[str] = (),
    timeout_s: float = 5.0,
    known: KnownPeers | None = None,
) -> MergedDiscovery:
    """The sources that these settings name, merged; peers first, whose addresses are known to work.

    No I/O; aiohttp and zeroconf are imported only if a source needs them.

    Args:
        known: the table that all sources fill, and from which peers are asked for others; None: none are asked.

    Raises:
        ValueError: a malformed URL or address, or nothing to look at.
        TypeError: a bare string in place of a list.
    """
    sources: list[Discovery] = []
    if peers:
        from remote_modules.discovery.static import StaticDiscovery

        sources.append(StaticDiscovery(peers, timeout_s=timeout_s, known=known))
    if mdns:
        from remote_modules.discovery.mdns import MdnsDiscovery

        sources.append(MdnsDiscovery(mdns_interfaces, timeout_s=timeout_s, known=known))
    if trackers:
        from remote_modules.config import check_tracker_urls
        from remote_modules.discovery.tracker_client import TrackerClient

        check_tracker_urls(trackers)
        sources.extend(TrackerClient(url, timeout_s=timeout_s, known=known) for url in dict.fromkeys(trackers))
    exchange: ExchangeDiscovery | None = None
    if known is not None and sources:
        from remote_modules.discovery.exchange import ExchangeDiscovery

        exchange = ExchangeDiscovery(known, seeds=peers, feeders=sources, timeout_s=min(timeout_s, EXCHANGE_TIMEOUT_S))
    return MergedDiscovery(sources, exchange=exchange)
