"""A real swarm on this machine: tracker and peers over loopback sockets, as threads or as processes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from remote_modules.spans import Span
from remote_modules.testing.faulty_link import FaultyLink
from remote_modules.testing.local_peer import LocalPeer, ProcessPeer, ThreadPeer
from remote_modules.testing.local_tracker import LocalTracker, ProcessTracker, ThreadTracker

if TYPE_CHECKING:
    pass

__all__ = ["LocalSwarm"]

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class LocalSwarm:
    """Peers of one checkpoint on loopback; a context manager.

    Args:
        checkpoint: folder, or the name of the built-in model.
        spans: one peer for each, in order.
        mode: ``"thread"`` runs them in this process, ``"process"`` as processes of their own.
        tracker: whether to run a tracker that they announce to.
        links: whether to put a `FaultyLink` in front of each peer (``peer.link``).
        server_options: fields of `ServerConfig` for every peer. mDNS is off unless asked for.

    Attributes:
        peers: handles in the order of ``spans``, then of `add`.
        tracker: handle of the tracker, or None.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        spans: Sequence[str],
        mode: Literal["thread", "process"] = "thread",
        tracker: bool = True,
        links: bool = False,
        **server_options: Any,
    ) -> None:
        if mode not in ("thread", "process"):
            raise ValueError(f"mode must be 'thread' or 'process', got {mode!r}")
        for span in spans:
            Span.parse(span)
        self.checkpoint = str(checkpoint)
        self.peers: list[LocalPeer] = []
        self.tracker: LocalTracker | None = None
        self._spans = list(spans)
        self._mode = mode
        self._wants_tracker = tracker
        self._links = links
        self._options = {"mdns": False, "peer_cache": None, "announce_interval_s": 1.0, **server_options}
        self._folder = tempfile.TemporaryDirectory(prefix="remote-modules-swarm-")

    @property
    def trackers(self) -> list[str]:
        """Tracker URLs to pass on."""
        return [self.tracker.url] if self.tracker is not None else []

    @property
    def addresses(self) -> list[str]:
        """What to pass on as ``peers``, for a swarm without tracker."""
        return [peer.address for peer in self.peers]

    def start(self) -> None:
        """Start tracker and peers; returns when all are online.

        Raises:
            RemoteModulesError: one did not start.
        """
        try:
            if self._wants_tracker:
                self.tracker = ProcessTracker() if self._mode == "process" else ThreadTracker()
                self.tracker.restart()
            self.peers = [self._new_peer(span, {}) for span in self._spans]
            for peer in self.peers:
                peer._begin()
            for peer in self.peers:
                peer._await_online()
        except BaseException:
            self.stop()
            raise

    def add(self, span: str, **options: Any) -> LocalPeer:
        """One more peer; ``options`` override the swarm's. Returns when it is online.

        Raises:
            RemoteModulesError, ValueError: it did not start, and is not among `peers`.
        """
        Span.parse(span)
        peer = self._new_peer(span, options)
        try:
            peer._begin()
            peer._await_online()
        except BaseException:
            peer.close()
            raise
        self.peers.append(peer)
        return peer

    def stop(self) -> None:
        """End everything; idempotent."""
        for peer in self.peers:  # all at once: a peer that outlives the others would warn that nobody is there
            peer._begin_end()
        for peer in self.peers:
            peer.close()
        if self.tracker is not None:
            self.tracker.kill()
        self._folder.cleanup()

    def __enter__(self) -> LocalSwarm:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _new_peer(self, span: str, options: dict[str, Any]) -> LocalPeer:
        identity_path = Path(self._folder.name) / f"peer-{len(self.peers)}-{time.monotonic_ns()}.pem"
        merged = {
            **self._options,
            "model": self.checkpoint,
            "blocks": span,
            "trackers": tuple(self.trackers),
            "identity_path": identity_path,
            **options,
        }
        link = FaultyLink() if self._links else None
        if link is not None:
            merged["announce_addresses"] = (link.address,)
        kind = ProcessPeer if self._mode == "process" else ThreadPeer
        return kind(merged, link)
