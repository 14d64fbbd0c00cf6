"""``remote-modules tracker``."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from remote_modules.cli import output
from remote_modules.cli.options import JsonOption
from remote_modules.cli.signals import StopSignals
from remote_modules.config import TrackerConfig

__all__ = ["tracker"]

DEFAULTS = TrackerConfig()


def tracker(
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0: any free one.")] = 8000,
    lease_s: Annotated[
        float, typer.Option("--lease-s", metavar="SECONDS", help="How long an announcement lives.")
    ] = DEFAULTS.lease_s,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            metavar="memory|redis://HOST:PORT",
            help="Where leases are kept; trackers that name one Redis or Valkey share them. "
            "Needs pip install 'remote-modules\\[redis]'.",
        ),
    ] = DEFAULTS.storage,
    as_json: JsonOption = False,
) -> None:
    """Run a tracker: the place where peers announce themselves, with a page that shows the swarm."""
    config = TrackerConfig(host=host, port=port, lease_s=lease_s, storage=storage)
    with StopSignals() as signals:
        from remote_modules.server.tracker import Tracker

        with Tracker(config) as running:
            signals.keep()
            if as_json:
                output.print_json({"event": "online", "url": running.url, "pid": os.getpid()})
            else:
                output.out.print(output.fields_table({"tracker": running.url, "page": f"{running.url}/"}))
                output.print_command("peers join by", f"remote-modules serve MODEL --tracker {running.url}")
                output.out.print("Ctrl-C stops it.", style="dim")
            received = signals.wait()
    if received == signal.SIGINT:
        raise KeyboardInterrupt
