"""A real swarm on this machine: tracker and peers over loopback sockets, as threads or as processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from remote_modules.config import ServerConfig, TrackerConfig
from remote_modules.errors import RemoteModulesError
from remote_modules.peers import PeerId
from remote_modules.spans import Span
from remote_modules.testing.faulty_link import FaultyLink

if TYPE_CHECKING:
    from remote_modules.server.peer import Server
    from remote_modules.server.tracker import Tracker

__all__ = ["LocalPeer", "LocalSwarm", "LocalTracker"]

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
        self._options = {"mdns": False, "announce_interval_s": 1.0, **server_options}
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
        """One more peer; ``options`` override the swarm's. Returns when it is online."""
        peer = self._new_peer(span, options)
        self.peers.append(peer)
        peer._begin()
        peer._await_online()
        return peer

    def stop(self) -> None:
        """End everything; idempotent."""
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


class LocalPeer(ABC):
    """One peer of a `LocalSwarm`.

    Attributes:
        peer_id, address, span: known once it is online; ``address`` is what clients dial.
        link: the `FaultyLink` in front of it, if the swarm has links.
    """

    def __init__(self, options: dict[str, Any], link: FaultyLink | None) -> None:
        self.peer_id = PeerId("")
        self.address = ""
        self.span = Span.parse(options["blocks"])
        self.link = link
        self._options = options

    @property
    @abstractmethod
    def pid(self) -> int:
        """Of the process that it runs in."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL: gone at once, nobody is told."""

    @abstractmethod
    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""

    @abstractmethod
    def thaw(self) -> None:
        """SIGCONT."""

    @abstractmethod
    def drain(self) -> None:
        """SIGTERM: finishes what runs, takes nothing new, then ends. Does not wait: see `wait`."""

    @abstractmethod
    def wait(self, timeout_s: float) -> int | None:
        """The exit status once it has ended, or None after ``timeout_s``."""

    def restart(self) -> None:
        """A new process (or thread) with the same identity; returns when it is online."""
        self.kill()
        self._begin()
        self._await_online()

    def close(self) -> None:
        """End it and its link."""
        self.kill()
        if self.link is not None:
            self.link.close()

    @abstractmethod
    def _begin(self) -> None:
        """Start without waiting."""

    @abstractmethod
    def _await_online(self) -> None:
        """Wait until it is online."""

    def _set_online(self, peer_id: str, address: str) -> None:
        self.peer_id = PeerId(peer_id)
        if self.link is not None:
            self.address = self.link.address
        else:
            self.address = address

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.span} at {self.address})"


class ThreadPeer(LocalPeer):
    """A peer in this process."""

    _server: Server | None = None
    _drainer: threading.Thread | None = None

    @property
    def pid(self) -> int:
        return os.getpid()

    def kill(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.kill()

    def freeze(self) -> None:
        self._running().freeze()

    def thaw(self) -> None:
        self._running().thaw()

    def drain(self) -> None:
        self._drainer = threading.Thread(target=self._running().drain, name="remote-modules-drain")
        self._drainer.start()

    def wait(self, timeout_s: float) -> int | None:
        if self._drainer is None:
            return None
        self._drainer.join(timeout_s)
        if self._drainer.is_alive():
            return None
        self._server = None
        return 0

    def close(self) -> None:
        if self._drainer is not None:
            self._drainer.join(STOP_TIMEOUT_S)
        super().close()

    def _begin(self) -> None:
        from remote_modules.server.peer import Server  # torch takes seconds to import, and processes do without it here

        self._server = Server(ServerConfig(**self._options))
        self._server.start()

    def _await_online(self) -> None:
        server = self._running()
        if self.link is not None:
            self.link.target = server.listening_address
        self._set_online(server.peer_id, server.address)

    def _running(self) -> Server:
        if self._server is None:
            raise RemoteModulesError("peer is not running; call restart() first")
        return self._server


class _Child:
    """A process of `testing.child`."""

    def __init__(self, kind: str, config: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "remote_modules.testing.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"kind": kind, "config": config}, default=str) + "\n")
        self.process.stdin.flush()

    def first_line(self) -> dict[str, Any]:
        """What it says when it is up.

        Raises:
            RemoteModulesError: it failed, or said nothing in time.
        """
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT_S)
        line = self.process.stdout.readline() if ready else ""
        message: dict[str, Any] = json.loads(line) if line else {"error": "it ended or said nothing in time"}
        if "error" in message:
            self.end()
            raise RemoteModulesError(f"process did not start: {message['error']}")
        return message

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """SIGKILL and reap; idempotent."""
        self.signal(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class ProcessPeer(LocalPeer):
    """A peer in a process of its own."""

    _child: _Child | None = None

    @property
    def pid(self) -> int:
        return self._running().process.pid

    def kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def freeze(self) -> None:
        self._running().signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().signal(signal.SIGCONT)

    def drain(self) -> None:
        self._running().signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._running().process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _begin(self) -> None:
        self._child = _Child("peer", self._options)

    def _await_online(self) -> None:
        message = self._running().first_line()
        if self.link is not None:
            self.link.target = message["listening"]
        self._set_online(message["peer_id"], message["address"])

    def _running(self) -> _Child:
        if self._child is None:
            raise RemoteModulesError("peer is not running; call restart() first")
        return self._child


class LocalTracker(ABC):
    """The tracker of a `LocalSwarm`; `restart` comes back empty on the same port."""

    url: str = ""

    @abstractmethod
    def kill(self) -> None:
        """Gone at once, with all leases."""

    @abstractmethod
    def restart(self) -> None:
        """Start anew on the same port; returns when it listens."""

    def _config(self) -> dict[str, Any]:
        return {"port": int(self.url.rpartition(":")[2]) if self.url else 0}


class ThreadTracker(LocalTracker):
    """A tracker in this process."""

    _tracker: Tracker | None = None

    def kill(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.stop()

    def restart(self) -> None:
        self.kill()
        from remote_modules.server.tracker import Tracker

        self._tracker = Tracker(TrackerConfig(**self._config()))
        self._tracker.start()
        self.url = self._tracker.url


class ProcessTracker(LocalTracker):
    """A tracker in a process of its own."""

    _child: _Child | None = None

    def kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def restart(self) -> None:
        self.kill()
        self._child = _Child("tracker", self._config())
        self.url = self._child.first_line()["url"]
