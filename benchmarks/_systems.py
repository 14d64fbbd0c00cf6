"""Other systems as an arm of `suite.py`: a command that answers on standard output, line by line, in JSON.

The command is started once for each profile, on the client's host, and asked one thing at a time::

    > {"op": "open", "model": FOLDER, "peers": 3, "profile": "1g5", "hosts": {"client": "10.77.0.2", ...}}
    < {"name": "petals 2.3"}
    > {"op": "decode", "prefix": 128, "tokens": 64, "prompt": [17, 3, ...]}
    < {"prefill_seconds": 0.21, "seconds": 1.34, "output": [5, 9, ...]}

``prompt`` has ``prefix`` ids. ``prefill_seconds`` is the time to the first token, ``seconds`` that of the ``tokens``
steps of one token after it. ``output``, the ``tokens + 1`` greedy ids, may be left out; if given, it must be the local
model's.
``hosts`` is empty on loopback; in a network laboratory it has the addresses, and ``$NETLAB_RUN`` names the laboratory
for `netlab.py exec`. ``{"error": TEXT}`` instead of an answer ends the run. When standard input ends, so does the
command.
"""

from __future__ import annotations

import json
import math
import os
import select
import shlex
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from _arms import Sample

__all__ = ["OtherSystem"]

MAX_LINE_BYTES = 1 << 20
PATIENCE_S = 900.0  # it may load a model first
STOP_TIMEOUT_S = 10.0
READ_BYTES = 65536


class OtherSystem:
    """An arm; a context manager.

    Args:
        command: as a shell would take it; no shell is started.
        opening: fields of its first message.

    Raises:
        SystemExit: it does not start, does not answer in time, or answers nonsense; of all methods.
    """

    is_paced = False

    def __init__(self, command: str, opening: dict[str, Any], *, patience_s: float = PATIENCE_S) -> None:
        self._command = command
        self._patience_s = patience_s
        self._received = b""
        try:
            self._process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except (OSError, ValueError) as exc:
            raise SystemExit(f"cannot start '{command}': {exc}") from exc
        try:
            name = self._ask({"op": "open", **opening}).get("name")
            if not isinstance(name, str) or not name:
                raise self._wrong(f"a name after 'open', got {name!r}")
        except BaseException:
            self.close()
            raise
        self.name = name

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        answer = self._ask({"op": "decode", "prefix": len(prompt), "tokens": tokens, "prompt": list(prompt)})
        seconds = [self._seconds(answer, name) for name in ("prefill_seconds", "seconds")]
        output = answer.get("output")
        if output is not None and not (isinstance(output, list) and all(type(token) is int for token in output)):
            raise self._wrong("ids as 'output'")
        return Sample(seconds[0], seconds[1] / tokens, None if output is None else tuple(output))

    def close(self) -> None:
        """Idempotent."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> OtherSystem:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise SystemExit(f"'{self._command}' has ended: {exc}") from exc
        line = self._line()
        try:
            answer = json.loads(line)
        except ValueError as exc:
            raise self._wrong(f"a line of JSON, got {line[:80]!r}") from exc
        if not isinstance(answer, dict):
            raise self._wrong(f"an object, got {line[:80]!r}")
        if "error" in answer:
            raise SystemExit(f"'{self._command}' says: {answer['error']}")
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        ends_s = time.monotonic() + self._patience_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, ends_s - time.monotonic()))
            if not ready:
                raise SystemExit(f"'{self._command}' did not answer within {self._patience_s:g} s")
            read = os.read(self._process.stdout.fileno(), READ_BYTES)
            if not read:
                raise SystemExit(f"'{self._command}' ended without an answer")
            self._received += read
            if len(self._received) > MAX_LINE_BYTES:
                raise self._wrong(f"lines of at most {MAX_LINE_BYTES} bytes")
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _seconds(self, answer: dict[str, Any], name: str) -> float:
        value: Any = answer.get(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise self._wrong(f"'{name}', got {value!r}")
        return float(value)

    def _wrong(self, expected: str) -> SystemExit:
        return SystemExit(f"'{self._command}' must answer {expected}")
