"""Links with a delay and a rate in front of peers, where there is no network laboratory: a process of its own.

Each link listens on loopback and passes bytes on to its target: a chunk waits for the chunks before it, of all
connections in its direction, then for as long as the rate says, then for the delay. Connections end here, so TCP's slow
start, its restart after a pause and lost packets are not emulated: these are the links of a warm connection. What this
process itself takes, tens of microseconds for each passage, is in the figures.

It reads one line of JSON after the other from standard input, and answers each with one::

    > {"links": 3}                                < {"addresses": ["127.0.0.1:4001", ...]}
    > {"targets": ["127.0.0.1:5001", ...]}        < {}
    > {"delay_s": 0.0025, "bytes_per_s": 1.25e8}  < {}       of all links, each way; 0: no limit
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["DelayedLinks"]

CHUNK_BYTES = 1 << 16
MAX_QUEUED = 1 << 12  # chunks of one direction of a connection: 256 MiB
STOP_TIMEOUT_S = 10.0


class DelayedLinks:
    """The parent's side; a context manager. Without delay and rate at first."""

    def __init__(self, links: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.addresses: list[str] = self._ask({"links": links})["addresses"]

    def aim(self, targets: Sequence[str]) -> None:
        self._ask({"targets": list(targets)})

    def become(self, mbit: float, rtt_ms: float) -> None:
        """Args: each way, 0 for no limit; half of ``rtt_ms`` is each way's delay."""
        self._ask({"delay_s": rtt_ms / 2e3, "bytes_per_s": mbit * 125_000})

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

    def __enter__(self) -> DelayedLinks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process of the delayed links has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Direction:
    """One way of a link, shared by its connections."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def due_s(self, num_bytes: int) -> float:
        """When bytes that came now are there."""
        with self._lock:
            begins_s = max(time.monotonic(), self._free_at_s)
            self._free_at_s = begins_s + (num_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)
            return self._free_at_s + self.delay_s


class _Link:
    def __init__(self) -> None:
        self.target = ""
        self.ways = (_Direction(), _Direction())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            host, _, port = self.target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)))
            except (OSError, ValueError):
                near.close()
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for way, source, sink in ((self.ways[0], near, far), (self.ways[1], far, near)):
                chunks: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_QUEUED)
                threading.Thread(target=_read, args=(way, source, chunks), daemon=True).start()
                threading.Thread(target=_write, args=(chunks, sink), daemon=True).start()


def _read(way: _Direction, source: socket.socket, chunks: queue.Queue[tuple[float, bytes]]) -> None:
    data = b"begin"
    while data:
        try:
            data = source.recv(CHUNK_BYTES)
        except OSError:
            data = b""
        chunks.put((way.due_s(len(data)), data))


def _write(chunks: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
    """Until the source has ended, or the sink takes no more: then what is left is dropped."""
    is_open = True
    while True:
        due_s, data = chunks.get()
        if is_open and (wait_s := due_s - time.monotonic()) > 0:
            time.sleep(wait_s)
        if not data:
            break
        if is_open:
            try:
                sink.sendall(data)
            except OSError:
                is_open = False
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def main() -> int:
    links: list[_Link] = []
    for line in sys.stdin:
        message, answer = json.loads(line), {}
        if "links" in message:
            links = [_Link() for _ in range(message["links"])]
            answer["addresses"] = [link.address for link in links]
        elif "targets" in message:
            for link, target in zip(links, message["targets"], strict=True):
                link.target = target
        else:
            for way in (way for link in links for way in link.ways):
                way.delay_s, way.bytes_per_s = message["delay_s"], message["bytes_per_s"]
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
