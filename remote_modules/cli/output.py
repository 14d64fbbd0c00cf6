"""What the commands share in printing: two consoles, streamed text, one-line errors, logs.

Data goes to stdout, all else to stderr. Text may be left without its end of line while it streams; whoever prints a
line then calls `end_line` first, and the log handler does so on its own.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remote_modules.peers import short_id
from remote_modules.spans import Span

__all__ = [
    "configure_logging",
    "describe_route",
    "end_line",
    "err",
    "fields_table",
    "out",
    "print_command",
    "print_error",
    "print_json",
    "quiet_transformers",
    "stream",
]

MAX_ERROR_CHARACTERS = 600

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class _Line:
    """Whether streamed text stands without its end of line."""

    is_open = False


class _Hop(Protocol):
    @property
    def span(self) -> Span: ...
    @property
    def peer_id(self) -> str: ...


def stream(text: str) -> None:
    """Write part of a text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
    if text:
        _Line.is_open = not text.endswith("\n")


def end_line() -> None:
    """End a line that `stream` left open."""
    if _Line.is_open:
        stream("\n")


def print_json(value: Mapping[str, object]) -> None:
    """One object, on one line of stdout, flushed: programs wait for it."""
    stream(json.dumps(value) + "\n")


def print_error(error: BaseException) -> None:
    """``error: ...`` on one line of stderr."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror.lower()}"
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {text[:MAX_ERROR_CHARACTERS]}", err=True)


def describe_route(route: Iterable[_Hop]) -> list[str]:
    """Each hop as ``"0:3 a3f09c"``."""
    return [f"{hop.span} {short_id(hop.peer_id)}" for hop in route]


def fields_table(rows: Mapping[str, str]) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def print_command(what: str, command: str) -> None:
    """A command to copy: never wrapped, whatever the width."""
    out.print(Text.assemble((f"{what}:\n", "dim"), f"  {command}"), soft_wrap=True)


def quiet_transformers() -> None:
    """No hints and no loading bars of transformers in this process. Imports it."""
    from transformers.utils import logging as transformers_logging

    switches: Any = transformers_logging  # not annotated
    switches.set_verbosity_error()
    switches.disable_progress_bar()


def configure_logging(*, is_debug: bool) -> None:
    """Our own log to stderr: warnings, or everything. Idempotent."""
    logger = logging.getLogger("remote_modules")
    for handler in list(logger.handlers):
        if isinstance(handler, _StderrHandler):
            logger.removeHandler(handler)
    logger.addHandler(_StderrHandler(is_debug=is_debug))
    logger.setLevel(logging.DEBUG if is_debug else logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.DEBUG if is_debug else logging.CRITICAL)


class _StderrHandler(logging.Handler):
    """Writes to what is stderr at the time, on a line of its own."""

    def __init__(self, *, is_debug: bool) -> None:
        super().__init__()
        pattern = "%(asctime)s %(levelname)s %(name)s: %(message)s" if is_debug else "%(message)s"
        self.setFormatter(logging.Formatter(pattern))
        self._is_debug = is_debug

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if self._is_debug else f"{record.levelname.lower()}: "
        gap = "\n" if _Line.is_open and sys.stderr.isatty() else ""
        typer.echo(f"{gap}{prefix}{self.format(record)}", err=True)
