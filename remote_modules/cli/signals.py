"""SIGINT and SIGTERM of a command that serves until it is told to stop.

::

    starting --signal--> raises         (KeyboardInterrupt, or SystemExit on SIGTERM)
    keeping  --signal--> `wait` returns it; then a Ctrl-C raises, and a SIGTERM says nothing new

Once a signal has raised, cleaning up has `GRACE_S`; then the process ends hard, whatever is still stuck. Some senders
(timeout(1), for one) signal a process and its group, so a signal that comes at once after another is the same one.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]

GRACE_S = 1.5
SAME_S = 0.2
POLL_S = 0.2  # a signal that the kernel gives to another thread does not wake the main one, which must handle it
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """A context manager for the main thread; elsewhere it handles nothing and `wait` waits for ever."""

    def __init__(self) -> None:
        self._received: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put may interrupt its get
        self._is_waiting = False
        self._last_s = float("-inf")
        self._previous: dict[int, Any] = {}
        self._is_deferring = False
        self._deferred: BaseException | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """What a signal raises waits for the end of this: extension modules abort if it comes while they are imported.

        `GRACE_S` after the signal the process ends nevertheless.
        """
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
        if self._deferred is not None:
            raise self._deferred

    def keep(self) -> None:
        """From now on the next signal is kept for `wait`; call it before saying that the service is up."""
        self._is_waiting = True

    def wait(self, *, unless: Callable[[], Exception | None] = lambda: None) -> signal.Signals:
        """The next signal since `keep`. Raises what ``unless`` returns, if that comes first."""
        while True:
            with contextlib.suppress(queue.Empty):
                return signal.Signals(self._received.get(timeout=POLL_S))
            if (failure := unless()) is not None:
                raise failure

    def _handle(self, number: int, frame: FrameType | None) -> None:
        age_s, self._last_s = time.monotonic() - self._last_s, time.monotonic()
        if age_s < (math.inf if number == signal.SIGTERM else SAME_S):
            return
        if self._is_waiting:
            self._is_waiting = False
            self._received.put(number)
            return
        if self._timer is None:
            self._timer = threading.Timer(GRACE_S, os._exit, [128 + number])
            self._timer.daemon = True
            self._timer.start()
        stop = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if not self._is_deferring:
            raise stop
        self._deferred = stop
