"""`Server`: a peer as a synchronous object that owns an event-loop thread."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from remote_modules.config import ServerConfig
from remote_modules.errors import RemoteModulesError
from remote_modules.identity import Identity
from remote_modules.net.loop import LoopThread
from remote_modules.peers import PeerId, short_id
from remote_modules.server.peer import Peer
from remote_modules.spans import Span

__all__ = ["Server"]


class ServerState(enum.Enum):
    CREATED = "created"
    ONLINE = "online"
    STOPPED = "stopped"


class Server:
    """One peer.

    Use as a context manager, or call `start` and `stop`. Loading happens in `start`.

    Args:
        config: what to serve.
        on_progress: called with a stage name and a fraction in 0..1 while starting.
    """

    def __init__(self, config: ServerConfig, *, on_progress: Callable[[str, float], None] | None = None) -> None:
        self.config = config
        self._identity = (
            Identity.generate() if config.identity_path is None else Identity.load_or_create(config.identity_path)
        )
        self._progress = on_progress or (lambda stage, fraction: None)
        self._peer: Peer | None = None
        self._io: LoopThread | None = None
        self._state = ServerState.CREATED
        self._frozen: threading.Event | None = None

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def span(self) -> Span:
        """Blocks held. Raises `RemoteModulesError` before `start`."""
        return self._running().span

    @property
    def address(self) -> str:
        """``host:port`` that it announces first. Raises `RemoteModulesError` before `start`."""
        return self._running().addresses[0]

    @property
    def listening_address(self) -> str:
        """``host:port`` that it really listens on. Raises `RemoteModulesError` before `start`."""
        return self._running().listening_address

    def start(self) -> None:
        """Load the span, listen, and announce; returns once the peer is online.

        Raises:
            CheckpointError, UnsupportedCallError: the model cannot be served.
            ValueError: the span is outside the model, or nothing fits.
            RemoteModulesError: the port is in use.
        """
        self._io = LoopThread(f"remote-modules-peer-{short_id(self.peer_id)}")
        try:
            self._peer = Peer(self.config, self._identity, self._progress)
            self._io.run(self._peer.start())
        except BaseException:
            self.stop()
            raise
        self._state = ServerState.ONLINE

    def drain(self, timeout_s: float | None = None) -> None:
        """Take no new sessions, wait for the running ones (by default `ServerConfig.drain_s`), then stop."""
        peer, io = self._peer, self._io
        if peer is not None and io is not None and self._state is ServerState.ONLINE:
            io.run(peer.drain(self.config.drain_s if timeout_s is None else timeout_s))
        self.stop()

    def move(self, span: str) -> None:
        """Hold the blocks ``span`` instead; returns once the peer is online with them. See `Peer.move`.

        Raises:
            RemoteModulesError, ValueError: they cannot be held; the peer goes on with what it had.
        """
        peer, io = self._running(), self._io
        assert io is not None
        io.run(peer.move(Span.parse(span)))

    def stop(self) -> None:
        """Withdraw, close all connections and free the model; idempotent."""
        self.thaw()
        io, self._io = self._io, None
        peer, self._peer = self._peer, None
        self._state = ServerState.STOPPED
        if io is not None:
            if peer is not None:
                io.run(peer.stop())
            io.stop()

    def kill(self) -> None:
        """Vanish as a killed process does: sockets are reset, nobody is told. For tests."""
        self.thaw()
        io, self._io = self._io, None
        peer, self._peer = self._peer, None
        self._state = ServerState.STOPPED
        if io is not None and peer is not None:
            io.run(peer.vanish())
            io.stop()

    def freeze(self) -> None:
        """Stop the event loop as SIGSTOP does: sockets stay open, nothing is answered. For tests."""
        if self._io is not None and self._frozen is None:
            self._frozen = threading.Event()
            self._io.call_soon(self._frozen.wait)

    def thaw(self) -> None:
        """Undo `freeze`."""
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            frozen.set()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _running(self) -> Peer:
        if self._peer is None:
            raise RemoteModulesError("server is not running; call start() first")
        return self._peer
