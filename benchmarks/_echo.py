"""An echo server, and clients of it, over raw blocking sockets and over our connections: what `transport.py` compares.

As a script it is the server: ``python benchmarks/_echo.py KIND [--host 127.0.0.1]`` prints a line of JSON and echoes
until its standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from remote_modules.config import ClientConfig
from remote_modules.identity import Identity
from remote_modules.net.connection import Connection
from remote_modules.net.http import HttpDialer, PeerSite
from remote_modules.net.loop import new_body
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.wire import messages
from remote_modules.wire import protocol as wire
from remote_modules.wire.protocol import MessageReceived, Role
from remote_modules.wire.tensors import encode_tensors

__all__ = ["KINDS", "Client", "ConnectionClient", "RawClient", "Where", "make_client"]

KINDS = ("raw", "uvloop", "asyncio", "uvloop+tls", "asyncio+tls")
MAX_BODY_BYTES = 256 * 1024 * 1024
TIMEOUT_S = 60.0
SESSION_ID = "e" * 32
IDENTITY = Identity.from_seed(b"e" * 32)


@dataclass(frozen=True, slots=True)
class Where:
    """An echo server: its kind, its address, and the certificate that it shows."""

    kind: str
    host: str
    port: int
    certificate_sha256: str | None


class Client(Protocol):
    """Sends bodies of one size and waits for each to come back."""

    def seconds(self, count: int, pause_s: float = 0.0) -> list[float]:
        """Of ``count`` round trips, each after a pause."""

    def close(self) -> None: ...


class RawClient:
    """Blocking sockets, buffers made once."""

    def __init__(self, where: Where, num_bytes: int) -> None:
        self._sock = socket.create_connection((where.host, where.port), TIMEOUT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.sendall(num_bytes.to_bytes(8, "little"))
        self._payload = memoryview(bytearray(torch.randint(256, (num_bytes,), dtype=torch.uint8).numpy().tobytes()))
        self._buffer = memoryview(bytearray(num_bytes))

    def seconds(self, count: int, pause_s: float = 0.0) -> list[float]:
        took_s = []
        for _ in range(count):
            time.sleep(pause_s)
            began_s = time.perf_counter()
            self._sock.sendall(self._payload)
            receive(self._sock, self._buffer)
            took_s.append(time.perf_counter() - began_s)
        assert self._buffer == self._payload, "what came back is not what was sent"
        return took_s

    def close(self) -> None:
        self._sock.close()


class ConnectionClient:
    """Our connection on an event loop of its own.

    Args:
        is_request: through `ClientConnection.request`, with its deadline and the decoding of tensors; otherwise frames
            go out and come in, and nothing more is done with them.
        keep_warm_s: as in `ClientConfig`.
    """

    def __init__(self, where: Where, num_bytes: int, *, is_request: bool = False, keep_warm_s: float = 0.0) -> None:
        self._loop = new_loop(where.kind)
        self._is_request = is_request
        self._tensor = torch.randint(256, (num_bytes,), dtype=torch.uint8)
        self._metas, self._body = encode_tensors({"hidden_states": self._tensor})
        config = ClientConfig(max_request_bytes=MAX_BODY_BYTES, keep_warm_s=keep_warm_s)
        self._dialer = HttpDialer(config, software="benchmark")
        self.connection = self._loop.run_until_complete(self._dialer.dial(record_of(where)))
        self._answer: asyncio.Future[MessageReceived] = self._loop.create_future()
        if not is_request:
            self.connection._on_message = self._receive

    def seconds(self, count: int, pause_s: float = 0.0) -> list[float]:
        return self._loop.run_until_complete(self._seconds(count, pause_s))

    async def _seconds(self, count: int, pause_s: float) -> list[float]:
        exchange = self._request if self._is_request else self._echo
        took_s = []
        for number in range(count):
            if pause_s:
                await asyncio.sleep(pause_s)
            request_id = self.connection.new_request_id()
            message = messages.StepRequest(request_id, SESSION_ID, number, 0, 1, 0, (), self._metas, TIMEOUT_S)
            began_s = time.perf_counter()
            back = await exchange(message)
            took_s.append(time.perf_counter() - began_s)
        assert torch.equal(back[: len(self._tensor)], self._tensor), "what came back is not what was sent"
        return took_s

    async def _request(self, message: messages.StepRequest) -> torch.Tensor:
        _, tensors = await self.connection.request(message, self._body, timeout_s=TIMEOUT_S)
        return tensors["hidden_states"]

    async def _echo(self, message: messages.StepRequest) -> torch.Tensor:
        self._answer = self._loop.create_future()
        self.connection.send(message, self._body)
        return torch.frombuffer((await self._answer).body, dtype=torch.uint8)

    def _receive(self, event: MessageReceived) -> None:
        if isinstance(event.message, messages.Output):
            self._answer.set_result(event)

    def close(self) -> None:
        self.connection.abort()
        self._loop.run_until_complete(self._dialer.aclose())
        self._loop.close()


def make_client(where: Where, num_bytes: int) -> Client:
    if where.kind == "raw":
        return RawClient(where, num_bytes)
    return ConnectionClient(where, num_bytes)


def record_of(where: Where) -> PeerRecord:
    return PeerRecord(
        peer_id=IDENTITY.peer_id,
        instance_id="echo",
        sequence=1,
        model="echo",
        model_key="echo",
        num_blocks=1,
        start=0,
        end=1,
        addresses=(f"{where.host}:{where.port}",),
        state=PeerState.ONLINE,
        certificate_sha256=where.certificate_sha256,
    )


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if not kind.startswith("uvloop"):
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


def receive(sock: socket.socket, buffer: memoryview) -> None:
    """Fill ``buffer``.

    Raises:
        ConnectionError: the other side is gone.
    """
    while buffer:
        num_bytes = sock.recv_into(buffer)
        if not num_bytes:
            raise ConnectionError("the other side is gone")
        buffer = buffer[num_bytes:]


@contextmanager
def raw_server(host: str) -> Iterator[Where]:
    """Each connection says how long its messages are, and is served by a thread."""
    listener = socket.create_server((host, 0))

    def echo(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = memoryview(bytearray(8))
        with sock, suppress(ConnectionError):
            receive(sock, size)
            buffer = memoryview(bytearray(int.from_bytes(size, "little")))
            while True:
                receive(sock, buffer)
                sock.sendall(buffer)

    def accept() -> None:
        with suppress(OSError):  # at the end
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=echo, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield Where("raw", host, listener.getsockname()[1], None)
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        listener.close()
        thread.join()


class Echo:
    """The server's side of one connection."""

    def __init__(self, certificate_sha256: str | None) -> None:
        self._certificate_sha256 = certificate_sha256 or ""
        protocol = wire.Protocol(Role.SERVER, max_body_bytes=MAX_BODY_BYTES, new_body=new_body)
        self.connection = Connection(protocol, on_message=self._receive, on_lost=lambda _: None)

    def _receive(self, event: MessageReceived) -> None:
        match event.message:
            case messages.ClientHello(nonce=nonce):
                signature = IDENTITY.sign_hello(nonce=nonce, certificate_sha256=self._certificate_sha256)
                major, minor = messages.VERSION_MAJOR, messages.VERSION_MINOR
                hello = messages.ServerHello(major, minor, IDENTITY.public_key, signature, "echo", MAX_BODY_BYTES)
                self.connection.send(hello)
            case messages.StepRequest() as request:
                self.connection.send(messages.Output(request.request_id, request.tensors, 0.0, 0.0), [event.body])
            case messages.Ping(nonce):
                self.connection.send(messages.Pong(nonce))


def new_site(kind: str, host: str) -> tuple[PeerSite, str | None]:
    """What listens as a peer does, and the digest of its certificate."""
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = IDENTITY.certificate(now=now) if kind.endswith("tls") else None
    digest = None if certificate is None else certificate.sha256
    site = PeerSite(
        host=host,
        port=0,
        certificate=certificate,
        record=lambda: None,
        metrics=lambda: b"",
        accept=partial(_accept, digest),
    )
    return site, digest


def _accept(certificate_sha256: str | None) -> Connection:
    return Echo(certificate_sha256).connection


def say_where(where: Where) -> None:
    print(json.dumps({name: getattr(where, name) for name in where.__slots__}), flush=True)


async def serve(kind: str, host: str) -> None:
    """Until standard input ends."""
    site, digest = new_site(kind, host)
    say_where(Where(kind, host, await site.start(), digest))
    try:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    finally:
        await site.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description="an echo server")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--host", default="127.0.0.1")
    options = parser.parse_args()
    if options.kind == "raw":
        with raw_server(options.host) as where:
            say_where(where)
            sys.stdin.read()
    else:
        new_loop(options.kind).run_until_complete(serve(options.kind, options.host))


if __name__ == "__main__":
    main()
