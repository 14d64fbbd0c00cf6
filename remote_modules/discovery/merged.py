"""Several sources of discovery used as one, so that no single one is needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from remote_modules.discovery.base import Discovery
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord
from remote_modules.plan.leases import merge_records

__all__ = ["MergedDiscovery", "build_discovery"]

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class MergedDiscovery:
    """All of ``sources`` at once; see `Discovery` for the contract.

    A call takes as long as its slowest source, which has a timeout of its own. A call succeeds if one source
    does; a source that starts to fail is logged once, and once more when it works again. Closing this closes
    the sources.

    Raises:
        ValueError: no sources.
    """

    def __init__(self, sources: Sequence[Discovery]) -> None:
        if not sources:
            raise ValueError("discovery needs at least one source: a tracker URL, a peer address, or mdns=True")
        self._sources = tuple(sources)
        self._failing: set[tuple[str, int]] = set()  # call and index of the source: some refuse one call only

    async def announce(self, signed: SignedRecord) -> None:
        """Announce to every source.

        Raises:
            DiscoveryError: all of them failed; it names each failure.
        """
        await self._ask_all("announce", lambda source: source.announce(signed))

    async def withdraw(self, signed: SignedRecord) -> None:
        """Withdraw from every source.

        Raises:
            DiscoveryError: all of them failed; it names each failure.
        """
        await self._ask_all("withdraw", lambda source: source.withdraw(signed))

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """What all sources know, one record for each peer; of equally new ones that of the first source.

        Raises:
            DiscoveryError: all sources failed; it names each failure.
        """
        return merge_records(await self._ask_all("lookup", lambda source: source.lookup(model_key)))

    async def aclose(self) -> None:
        """Close every source; idempotent."""
        await asyncio.gather(*(source.aclose() for source in self._sources))

    async def _ask_all(self, what: str, call: Callable[[Discovery], Awaitable[_Answer]]) -> list[_Answer]:
        outcomes = await asyncio.gather(*(_try(call, source) for source in self._sources))
        answers: list[_Answer] = []
        failures: list[DiscoveryError] = []
        for index, (answer, failure) in enumerate(outcomes):
            self._note(what, index, failure)
            if failure is None:
                answers.extend(answer)
            else:
                failures.append(failure)
        if len(failures) == len(self._sources):
            reasons = "; ".join(map(str, failures))
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


async def _try(
    call: Callable[[Discovery], Awaitable[_Answer]], source: Discovery
) -> tuple[list[_Answer], DiscoveryError | None]:
    try:
        return [await call(source)], None
    except DiscoveryError as exc:
        return [], exc


def build_discovery(
    *,
    trackers: Sequence[str] = (),
    mdns: bool = True,
    peers: Sequence[str] = (),
    mdns_interfaces: Sequence[str] = (),
    timeout_s: float = 5.0,
) -> MergedDiscovery:
    """The sources that these settings name, merged; peers first, whose addresses are known to work.

    No I/O; aiohttp and zeroconf are imported only if a source needs them.

    Raises:
        ValueError: a malformed URL or address, or nothing to look at.
        TypeError: a bare string in place of a list.
    """
    sources: list[Discovery] = []
    if peers:
        from remote_modules.discovery.static import StaticDiscovery

        sources.append(StaticDiscovery(peers, timeout_s=timeout_s))
    if mdns:
        from remote_modules.discovery.mdns import MdnsDiscovery

        sources.append(MdnsDiscovery(mdns_interfaces, timeout_s=timeout_s))
    if trackers:
        from remote_modules.config import check_tracker_urls
        from remote_modules.discovery.tracker_client import TrackerClient

        check_tracker_urls(trackers)
        sources.extend(TrackerClient(url, timeout_s=timeout_s) for url in dict.fromkeys(trackers))
    return MergedDiscovery(sources)
