"""The parent's side of `testing.child`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from remote_modules.errors import RemoteModulesError

if TYPE_CHECKING:
    pass

__all__ = ["ChildProcess"]

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class ChildProcess:
    """A process of `testing.child`.

    Args:
        pace: fields of `testing.pace.Pace`, for a peer that is as slow as that.
        program: arguments of Python; a script that ends in `testing.child.main`.
    """

    def __init__(
        self,
        kind: str,
        config: dict[str, Any],
        *,
        pace: dict[str, float] | None = None,
        program: Sequence[str] = ("-m", "remote_modules.testing.child"),
    ) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"kind": kind, "config": config, "pace": pace}, default=str) + "\n")
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
