"""Running the program: in this process, and as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from typer.testing import CliRunner

from remote_modules.cli.main import app

NAMES = SimpleNamespace(model="pydoc-2m")
TIMEOUT_S = 90.0


class Outcome:
    """What a run left behind; texts without colours."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = _plain(out)
        self.err = _plain(err)

    @property
    def json(self) -> dict[str, Any]:
        """The only line of stdout, as JSON."""
        (line,) = self.out.splitlines()
        value: dict[str, Any] = json.loads(line)
        return value

    @property
    def error(self) -> str:
        """The text after ``error: ``, the only line of stderr, with nothing on stdout and exit code 1."""
        assert (self.code, self.out) == (1, "")
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


def invoke(*arguments: str, stdin: str | None = None) -> Outcome:
    """The program in this process."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The program as a process; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "remote_modules", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    value: dict[str, Any] = json.loads(process.stdout.readline())
    return value


def stop(process: subprocess.Popen[str], number: signal.Signals) -> Outcome:
    """Send a signal and wait for the end."""
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return Outcome(process.returncode, out, err)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
