"""A hub on the loopback that serves one model from a folder, counts what it sends, and misbehaves on command."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "a" * 40
HUB_NAME = "someone/tiny-llama"


@dataclass
class Answer:
    """What is about to be sent; `FakeHub.tamper` may change it.

    Attributes:
        range: the bytes asked for, ``(start, end)``, or None for the whole file.
        cut: close the connection after so many bytes of the body.
    """

    method: str
    name: str
    range: tuple[int, int] | None
    headers: dict[str, str]
    status: int = 200
    body: bytes = b""
    cut: int | None = None


@dataclass
class FakeHub:
    """Attributes:
    url: of the server.
    answers: all that was sent, in order; their bodies are cut to what was really sent.
    tokens: the ``Authorization`` header of each request for a file, or "".
    has_ranges: whether ranges are served; else the whole file is.
    redirect_url: where requests for safetensors are sent, if set: another fake.
    error: ``X-Error-Code`` of every answer, if set.
    """

    folder: Path
    url: str = ""
    commit: str = COMMIT
    has_ranges: bool = True
    redirect_url: str = ""
    error: str = ""
    tamper: Callable[[Answer], None] = lambda answer: None
    answers: list[Answer] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    @property
    def fetched(self) -> list[str]:
        """Names of the files of which something was sent."""
        return [answer.name for answer in self.answers if answer.body]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [answer.range for answer in self.answers if answer.range is not None]

    def sent_bytes(self, suffix: str = ".safetensors") -> int:
        return sum(len(answer.body) for answer in self.answers if answer.name.endswith(suffix))

    def answer(self, method: str, name: str, asked: str | None) -> Answer:
        path = self.folder / name
        error = self.error or ("" if path.is_file() else "EntryNotFound")
        if error:
            return Answer(method, name, None, {"X-Repo-Commit": self.commit, "X-Error-Code": error}, status=404)
        data = path.read_bytes()
        kind = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1  # as for large and small files there
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{kind(data).hexdigest()}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        wanted = (int(found[1]), min(int(found[2]) + 1, len(data))) if found else None
        if self.redirect_url and name.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": headers.pop("ETag"), "X-Linked-Size": str(len(data))}
            headers["Location"] = f"{self.redirect_url}/{HUB_NAME}/resolve/{COMMIT}/{name}"
            return Answer(method, name, wanted, headers, status=302)
        if wanted and self.has_ranges:
            headers["Content-Range"] = f"bytes {wanted[0]}-{wanted[1] - 1}/{len(data)}"
            return Answer(method, name, wanted, headers, status=206, body=data[slice(*wanted)])
        return Answer(method, name, wanted, headers, body=data)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, method: str) -> None:
        if "/resolve/" in self.path:  # huggingface_hub asks for other things, too
            self.hub.tokens.append(self.headers.get("Authorization", ""))
        answer = self.hub.answer(method, self.path.rpartition("/")[2], self.headers.get("Range"))
        self.hub.tamper(answer)
        headers = {"Content-Length": str(len(answer.body))} | answer.headers
        if method == "HEAD":
            answer.body = b""
        if answer.cut is not None and len(answer.body) > answer.cut:
            answer.body = answer.body[: answer.cut]
            self.close_connection = True
        self.hub.answers.append(answer)  # before anything is sent: the test may look as soon as it has arrived
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """The server runs inside the block."""
    handler = type("OneHub", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = False  # leaving joins them
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            huggingface_hub.close_session()
            server.shutdown()
            thread.join()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of the model in ``folder``, reached instead of the real one; retries do not wait."""
    with running(FakeHub(folder)) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # else a bar leaves a thread behind
        monkeypatch.setattr("remote_modules.model.ranges._RETRY_DELAYS_S", (0.0, 0.0, 0.0))
        yield hub
