"""`Tracker`: the bootstrap tracker as a synchronous object."""

from __future__ import annotations

from remote_modules.config import TrackerConfig
from remote_modules.discovery.tracker_server import TrackerServer
from remote_modules.errors import RemoteModulesError
from remote_modules.net.loop import LoopThread

__all__ = ["Tracker"]


class Tracker:
    """An HTTP bootstrap tracker with its own thread; use as a context manager, or call `start` and `stop`."""

    def __init__(self, config: TrackerConfig | None = None) -> None:
        self.config = config or TrackerConfig()
        self._io: LoopThread | None = None
        self._server: TrackerServer | None = None

    @property
    def url(self) -> str:
        """``http://host:port``. Raises `RemoteModulesError` before `start`."""
        if self._server is None:
            raise RemoteModulesError("tracker is not running; call start() first")
        return self._server.url

    def start(self) -> None:
        """Listen.

        Raises:
            DiscoveryError: the port is in use.
            ValueError: the storage is of no kind that is known, or its package is not installed.
        """
        self._server = TrackerServer(self.config)
        self._io = LoopThread("remote-modules-tracker")
        try:
            self._io.run(self._server.start())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop listening and forget all leases; idempotent."""
        io, self._io = self._io, None
        server, self._server = self._server, None
        if io is not None:
            if server is not None:
                io.run(server.aclose())
            io.stop()

    def __enter__(self) -> Tracker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
