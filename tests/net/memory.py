"""Two ends of a connection joined in memory, and the plain ends that tests hold."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from remote_modules.identity import Identity
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.connection import Connection
from remote_modules.peers import PeerId
from remote_modules.wire import messages
from remote_modules.wire.messages import Message
from remote_modules.wire.protocol import MessageReceived, Protocol, Role

M = TypeVar("M")

SERVER = Identity.from_seed(b"s" * 32)
MAX_BODY_BYTES = 16 * 1024 * 1024
WAIT_S = 2.0


class MemoryTransport(asyncio.Transport):
    """One end of a pair: what is written here arrives at the other end, one write in each turn of the loop.

    Attributes:
        writes: the size of every write, in order.
        is_stalled: while True nothing leaves here, as when the network is stuck.
    """

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self.writes: list[int] = []
        self.is_stalled = False
        self.other: MemoryTransport
        self.protocol = protocol
        self._chunks: deque[bytes] = deque()
        self._num_queued = 0
        self._high_bytes = 64 * 1024
        self._is_paused = False
        self._is_closing = False
        self._is_lost = False

    @property
    def num_queued(self) -> int:
        """Bytes that were written and have not arrived."""
        return self._num_queued

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._is_closing:
            return
        self.writes.append(len(data))
        self._chunks.append(bytes(data))
        self._num_queued += len(data)
        if self._num_queued > self._high_bytes and not self._is_paused:
            self._is_paused = True
            self.protocol.pause_writing()
        self._soon(self._pass_on)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = 64 * 1024 if high is None else high

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        """End of stream for the other end, once everything queued has arrived."""
        if not self._is_closing:
            self._is_closing = True
            self._soon(self._pass_on)

    def abort(self) -> None:
        """Reset the connection; what is queued is lost."""
        self._is_closing = True
        self._chunks.clear()
        self._soon(self._lose, None)
        self._soon(self.other._lose, ConnectionResetError("connection reset by peer"))

    def resume(self) -> None:
        """End a stall."""
        self.is_stalled = False
        self._soon(self._pass_on)

    def _soon(self, callback: Callable[..., object], *args: object) -> None:
        asyncio.get_running_loop().call_soon(callback, *args)

    def _pass_on(self) -> None:
        if self.is_stalled or self._is_lost:
            return
        if self._chunks:
            chunk = self._chunks.popleft()
            self._num_queued -= len(chunk)
            self.other._arrive(chunk)
            if self._is_paused and self._num_queued <= self._high_bytes // 4:
                self._is_paused = False
                self.protocol.resume_writing()
        if self._chunks:
            self._soon(self._pass_on)
        elif self._is_closing:
            self._soon(self.other._end)
            self._soon(self._lose, None)

    def _arrive(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._is_closing:
            buffer = memoryview(self.protocol.get_buffer(len(view)))
            num_bytes = min(len(buffer), len(view))
            buffer[:num_bytes] = view[:num_bytes]
            view = view[num_bytes:]
            self.protocol.buffer_updated(num_bytes)

    def _end(self) -> None:
        if not self._is_closing and not self.protocol.eof_received():
            self.close()

    def _lose(self, reason: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            self.protocol.connection_lost(reason)


def join(client: asyncio.BufferedProtocol, server: asyncio.BufferedProtocol) -> tuple[MemoryTransport, MemoryTransport]:
    """Connect two protocols; the transport of each."""
    ours, theirs = MemoryTransport(client), MemoryTransport(server)
    ours.other, theirs.other = theirs, ours
    server.connection_made(theirs)
    client.connection_made(ours)
    return ours, theirs


class RawEnd(asyncio.BufferedProtocol):
    """An end that knows no protocol: sends any bytes and keeps what comes."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.closed = asyncio.Event()
        self._buffer = bytearray(64 * 1024)
        self._transport: asyncio.Transport | None = None

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


class PlainEnd(Connection):
    """An end that speaks the protocol and does nothing on its own: a test says what it sends.

    Attributes:
        lost_reasons: what `on_lost` was called with, each time.
    """

    def __init__(
        self, role: Role, *, max_body_bytes: int = MAX_BODY_BYTES, max_unsent_bytes: int | None = None
    ) -> None:
        self.lost_reasons: list[Exception | None] = []
        self._events: asyncio.Queue[MessageReceived] = asyncio.Queue()
        super().__init__(
            Protocol(role, max_body_bytes=max_body_bytes),
            on_message=self._events.put_nowait,
            on_lost=self.lost_reasons.append,
            max_unsent_bytes=max_unsent_bytes,
        )

    async def event(self, *, within_s: float = WAIT_S) -> MessageReceived:
        """The next message that comes, with its body."""
        return await asyncio.wait_for(self._events.get(), within_s)

    async def message(self, kind: type[M]) -> M:
        """The next message, which must be of ``kind``."""
        received = (await self.event()).message
        assert isinstance(received, kind), received
        return received

    def messages_so_far(self) -> list[Message]:
        """All messages that came and were not taken."""
        return [self._events.get_nowait().message for _ in range(self._events.qsize())]

    def greet(self, hello: messages.ClientHello, identity: Identity = SERVER, **changes: Any) -> None:
        """Answer a client's hello as the peer of ``identity`` would."""
        signature = identity.sign_hello(nonce=hello.nonce, certificate_sha256="")
        answer = messages.ServerHello(1, 0, identity.public_key, signature, "first", MAX_BODY_BYTES, "plain")
        self.send(msgspec.structs.replace(answer, **changes))


def client_hello(*, max_body_bytes: int = MAX_BODY_BYTES) -> messages.ClientHello:
    return messages.ClientHello(
        messages.VERSION_MAJOR, messages.VERSION_MINOR, b"n" * 32, max_body_bytes, "test client"
    )


def client_connection(
    peer_id: PeerId = SERVER.peer_id,
    *,
    silence_timeout_s: float = 60.0,
    certificate_sha256: str = "",
    keep_warm_s: float = 0.0,
) -> ClientConnection:
    return ClientConnection(
        peer_id,
        nonce=b"n" * 32,
        certificate_sha256=certificate_sha256,
        silence_timeout_s=silence_timeout_s,
        max_body_bytes=MAX_BODY_BYTES,
        software="test client",
        keep_warm_s=keep_warm_s,
    )


async def turns(count: int = 20) -> None:
    """Let the loop go round: everything that is ready gets done, and what follows from it."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(check: Callable[[], bool], *, within_s: float = WAIT_S) -> None:
    """Poll ``check``, for what happens on other threads or sockets; fail after ``within_s``."""
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not check():
        assert asyncio.get_running_loop().time() < deadline_s, f"not true within {within_s} s"
        await asyncio.sleep(0.002)
