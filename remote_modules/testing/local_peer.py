"""Handles of a `LocalSwarm`'s peers: to kill, freeze, drain and restart them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from remote_modules.config import ServerConfig
from remote_modules.errors import RemoteModulesError
from remote_modules.peers import PeerId
from remote_modules.spans import Span
from remote_modules.testing.child_process import ChildProcess
from remote_modules.testing.faulty_link import FaultyLink

if TYPE_CHECKING:
    from remote_modules.server.server import Server

__all__ = ["LocalPeer", "ProcessPeer", "ThreadPeer"]

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


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

    def _begin_end(self) -> None:  # noqa: B027 - only a process can end while others are waited for
        """Begin what `kill` does, without waiting."""

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
        from remote_modules.server.server import (
            Server,  # torch takes seconds to import, and processes do without it here
        )

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


class ProcessPeer(LocalPeer):
    """A peer in a process of its own."""

    _child: ChildProcess | None = None

    @property
    def pid(self) -> int:
        return self._running().process.pid

    def _begin_end(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

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
        self._child = ChildProcess("peer", self._options)

    def _await_online(self) -> None:
        message = self._running().first_line()
        if self.link is not None:
            self.link.target = message["listening"]
        self._set_online(message["peer_id"], message["address"])

    def _running(self) -> ChildProcess:
        if self._child is None:
            raise RemoteModulesError("peer is not running; call restart() first")
        return self._child
