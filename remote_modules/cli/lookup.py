"""Asking discovery from the command line: who is there, and do they cover a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from remote_modules.cli.options import Sources
from remote_modules.config import default_peer_cache
from remote_modules.errors import DiscoveryError, NoRouteError
from remote_modules.net.loop import LoopThread
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.spans import Span, missing_spans

__all__ = ["ModelName", "look_up", "online_spans", "wait_for_cover"]

POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName:
    """A model as lookups know it."""

    name: str
    key: str
    num_blocks: int


def look_up(sources: Sources, model_key: str | None) -> list[PeerRecord]:
    """The records of all peers, or of one model's.

    Raises:
        DiscoveryError: no source gave an answer.
        ValueError: a malformed URL or address, or no source.
    """
    with _failures_told_once():
        return _ask(sources, model_key)


def online_spans(records: Iterable[PeerRecord], num_blocks: int) -> list[Span]:
    """Spans of the peers that take requests for a model of this size."""
    return [record.span for record in records if record.state is PeerState.ONLINE and record.num_blocks == num_blocks]


def wait_for_cover(sources: Sources, model: ModelName, *, wait_s: float) -> None:
    """Return once online peers hold all blocks.

    Raises:
        NoRouteError: some blocks are still missing after ``wait_s``.
        DiscoveryError: no source gave an answer.
    """
    with _failures_told_once():
        if _is_covered_by_named(sources, model):
            return
        deadline_s = time.monotonic() + wait_s
        while missing := _missing(records := _ask(sources, model.key), model):
            if time.monotonic() >= deadline_s:
                raise _no_route(sources, model, records, missing)
            time.sleep(min(POLL_S, max(0.0, deadline_s - time.monotonic())))


def _is_covered_by_named(sources: Sources, model: ModelName) -> bool:
    """Whether trackers and given peers are enough: the local network takes a second to ask."""
    named = replace(sources, mdns=False)
    if named.is_empty or not sources.mdns:
        return False
    try:
        return not _missing(_ask(named, model.key), model)
    except DiscoveryError:
        return False  # the local network may know more


def _ask(sources: Sources, model_key: str | None) -> list[PeerRecord]:
    from remote_modules.discovery import merged
    from remote_modules.discovery.known_peers import KnownPeers

    known = KnownPeers.kept_in(default_peer_cache())
    discovery = merged.build_discovery(trackers=sources.trackers, mdns=sources.mdns, peers=sources.peers, known=known)
    io = LoopThread("remote-modules-lookup")
    try:
        return io.run(discovery.lookup(model_key))
    finally:
        io.run(discovery.aclose())
        io.stop()


@contextmanager
def _failures_told_once() -> Iterator[None]:
    """Hold back warnings of failed sources: they are logged once, or not at all if the error itself names them."""
    logger = logging.getLogger("remote_modules.discovery.merged")
    held: dict[str, logging.LogRecord] = {}

    def hold(record: logging.LogRecord) -> bool:
        held.setdefault(record.getMessage(), record)
        return False

    logger.addFilter(hold)
    is_told = False
    try:
        yield
    except DiscoveryError:
        is_told = True
        raise
    finally:
        logger.removeFilter(hold)
        for record in () if is_told else held.values():
            logger.handle(record)


def _missing(records: Sequence[PeerRecord], model: ModelName) -> tuple[Span, ...]:
    return missing_spans(online_spans(records, model.num_blocks), Span(0, model.num_blocks))


def _no_route(
    sources: Sources, model: ModelName, records: Sequence[PeerRecord], missing: tuple[Span, ...]
) -> NoRouteError:
    spans = ", ".join(map(str, missing))
    number = f"{len(records)} peers" if len(records) > 1 else "1 peer"
    known = f"{number} known, none holds them" if records else f"no peers found (asked: {sources})"
    command = f"remote-modules serve {model.name} --blocks {missing[0]} {sources.arguments()}".rstrip()
    return NoRouteError(
        f"no route for blocks {spans} of '{model.name}': {known}; start one by: {command}", missing=missing
    )
