"""Handles of a `LocalSwarm`'s tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from remote_modules.config import TrackerConfig
from remote_modules.testing.child_process import ChildProcess

if TYPE_CHECKING:
    from remote_modules.server.tracker import Tracker

__all__ = ["LocalTracker", "ProcessTracker", "ThreadTracker"]

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


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

    _child: ChildProcess | None = None

    def kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def restart(self) -> None:
        self.kill()
        self._child = ChildProcess("tracker", self._config())
        self.url = self._child.first_line()["url"]
