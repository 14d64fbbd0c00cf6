"""The process behind a `LocalSwarm` peer or tracker: ``python -m remote_modules.testing.child``.

Reads one line of JSON (``{"kind": "peer" | "tracker", "config": {...}}``) from standard input, prints one line of
JSON when it is up, and runs until SIGTERM (drains), or until standard input ends: the death of the parent. A peer's
``"pace": {"block_s": ..., "token_s": ...}`` makes it as slow as that (`testing.pace`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from remote_modules.config import ServerConfig, TrackerConfig
from remote_modules.errors import RemoteModulesError

__all__ = ["main"]


def main() -> int:
    """Serve; the exit status."""
    job = json.loads(sys.stdin.readline())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_watch_parent, daemon=True).start()
    try:
        if job["kind"] == "tracker":
            _run_tracker(job["config"], stop)
        else:
            with _pace_of(job):
                _run_peer(job["config"], stop)
    except (RemoteModulesError, ValueError, TypeError, OSError) as exc:
        _say({"error": f"{type(exc).__name__}: {exc}"})
        return 1
    return 0


def _run_tracker(options: dict[str, object], stop: threading.Event) -> None:
    from remote_modules.server.tracker import Tracker  # a tracker needs no torch, which takes seconds to import

    with Tracker(TrackerConfig(**options)) as tracker:  # type: ignore[arg-type]  # checked by TrackerConfig
        _say({"url": tracker.url, "pid": os.getpid()})
        stop.wait()


def _run_peer(options: dict[str, object], stop: threading.Event) -> None:
    from remote_modules.server.server import Server

    for name in ("trackers", "peers", "announce_addresses"):
        options[name] = tuple(options.get(name) or ())  # type: ignore[arg-type]
    for name in ("identity_path", "peer_cache"):
        if options.get(name):
            options[name] = Path(str(options[name]))
    server = Server(ServerConfig(**options))  # type: ignore[arg-type]  # checked by ServerConfig
    server.start()
    _say(
        {
            "peer_id": server.peer_id,
            "address": server.address,
            "listening": server.listening_address,
            "span": str(server.span),
            "pid": os.getpid(),
        }
    )
    while not stop.wait(0.2):
        if server.failure is not None:
            server.stop()
            raise RemoteModulesError(f"stopped: {server.failure}")
    server.drain()


def _pace_of(job: dict[str, Any]) -> AbstractContextManager[None]:
    if not job.get("pace"):
        return nullcontext()
    from remote_modules.testing.pace import Pace, paced

    return paced(Pace(**job["pace"]))


def _watch_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(0)


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
