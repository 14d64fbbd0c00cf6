"""One connection, either side: the sans-I/O protocol driven over an asyncio transport.

Frames are never interleaved: they leave in the order of `send`, bulk in slices, so that at most one slice is copied by
the transport.

Nobody holds a connection to somebody who is gone: the kernel gives up on a host that acknowledges nothing
(`USER_TIMEOUT_S`, keepalive), and a side that says nothing for `IDLE_PING_S` is pinged and, after `IDLE_DEAD_S` of
silence, cut off. Nobody fills our memory by not reading: at most ``max_unsent_bytes`` wait for one client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import cast

from remote_modules.errors import (
    ProtocolError,
    RemoteProtocolError,
)
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import Message, Ping
from remote_modules.wire.protocol import MessageReceived, Protocol, State

__all__ = ["Connection"]

logger = logging.getLogger(__name__)

SLICE_BYTES = 256 * 1024
JOIN_BYTES = 64 * 1024  # below this one joined write is cheaper than several
NOTSENT_LOWAT_BYTES = 128 * 1024  # bounds what lies in the kernel, so that a ping behind bulk data gets out soon
IDLE_PING_S = 10.0
IDLE_DEAD_S = 25.0
IDLE_CHECK_S = 2.5
USER_TIMEOUT_S = 10  # of unacknowledged bytes; RFC 5482
KEEPALIVE_S = 10  # of silence until the first probe
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3


class Connection(asyncio.BufferedProtocol):
    """Frames in and out of one transport.

    Args:
        protocol: the state of the connection.
        on_message: called on the loop for each message, in order.
        on_lost: called once, when the connection is gone, with the reason or None.
        max_unsent_bytes: the connection is cut off when more than this waits for the other side to read; None: never,
            for one's own requests.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        on_message: Callable[[MessageReceived], None],
        on_lost: Callable[[Exception | None], None],
        max_unsent_bytes: int | None = None,
    ) -> None:
        self._protocol = protocol
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._outgoing: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._max_unsent_bytes = max_unsent_bytes
        self._now_s: Callable[[], float] = lambda: 0.0  # the loop's clock
        self._heard_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._can_write = True
        self._is_closing = False
        self._is_lost = False
        self._error: Exception | None = None
        self._close_callbacks: list[Callable[[Exception | None], object]] = []
        self.closed = asyncio.Event()
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def is_open(self) -> bool:
        transport = self._transport
        return not (self._is_closing or transport is None or self._is_lost or transport.is_closing())

    @property
    def max_peer_body_bytes(self) -> int:
        """Largest message body that the other side takes."""
        return self._protocol.their_max_body_bytes

    @property
    def remote_host(self) -> str:
        """IP address of the other side; "" if unknown."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(name[0]) if isinstance(name, tuple) else ""

    @property
    def unsent_bytes(self) -> int:
        """That wait for the other side to read."""
        return self._unsent_bytes

    @property
    def has_unsent(self) -> bool:
        """Whether something that was sent has not left yet."""
        return bool(self._outgoing) or (self._transport is not None and self._transport.get_write_buffer_size() > 0)

    def send(self, message: Message, body: list[Buffer] | None = None) -> None:
        """Put a message on the wire, after those before it; never waits. Lost silently on a closed connection.

        Raises:
            LocalProtocolError: not allowed now, or too large for the other side.
        """
        if self.is_open:
            self._protocol.send(message, body or ())
            self._write(self._protocol.data_to_send())

    def on_close(self, callback: Callable[[Exception | None], object]) -> None:
        """Call once, with the transport's reason, when the connection is gone; keeps ``callback`` alive until then."""
        self._close_callbacks.append(callback)

    def close(self) -> None:
        """Close after what was sent has left."""
        self._is_closing = True
        self._pump()

    def abort(self, error: Exception | None = None) -> None:
        """Close at once; `on_lost` gets ``error``."""
        self._error = self._error or error
        self._drop_unsent()
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=SLICE_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            _set_options(sock)
        self._now_s = asyncio.get_running_loop().time
        self._heard_s = self._now_s()
        self._watch(self._heard_s)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._protocol.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_received += nbytes
        self._hear()
        try:
            self._protocol.buffer_updated(nbytes)
            for event in self._protocol.events_received():
                self._on_message(event)
        except ProtocolError as exc:
            logger.debug("! protocol error=%s", exc)
            if self.is_open:
                self._write(self._protocol.data_to_send())
            self.abort(exc)

    def eof_received(self) -> bool:
        try:
            self._protocol.receive_eof()
        except RemoteProtocolError as exc:
            self._error = self._error or exc
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = True
            self.closed.set()
            self._drop_unsent()
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            self._on_lost(self._error or exc)
            callbacks, self._close_callbacks = self._close_callbacks, []
            for callback in callbacks:
                callback(exc)

    def pause_writing(self) -> None:
        self._can_write = False

    def resume_writing(self) -> None:
        self._can_write = True
        self._hear()
        self._pump()

    def _hear(self) -> None:
        self._heard_s = self._now_s()
        self._progress(self._heard_s)

    def _watch(self, now_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._idle_timer = loop.call_at(now_s + IDLE_CHECK_S, self._check_idle, now_s + IDLE_CHECK_S)

    def _check_idle(self, due_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - due_s > IDLE_CHECK_S:  # our own loop stood still: what the other side said is yet to be read
            self._heard_s = now_s
        silent_s = now_s - self._heard_s
        if silent_s >= IDLE_DEAD_S:
            self.abort(TimeoutError(f"no sign of life for {silent_s:.0f} s"))
            return
        if silent_s >= IDLE_PING_S and self._protocol.state is State.OPEN:
            self.send(Ping(0))
        self._watch(now_s)

    def _progress(self, now_s: float) -> None:
        """Bytes moved, either way."""

    def _has_transport(self) -> bool:
        return self._transport is not None and not self._is_lost and not self._transport.is_closing()

    def _write(self, buffers: list[Buffer]) -> None:
        """Put frames on the open connection."""
        total = sum(map(len, buffers))
        self.bytes_sent += total
        if total <= JOIN_BYTES and not self._outgoing and self._can_write:
            assert self._transport is not None
            self._transport.write(b"".join(buffers))
            return
        self._unsent_bytes += total
        if self._max_unsent_bytes is not None and self._unsent_bytes > self._max_unsent_bytes:
            text = f"{self._unsent_bytes} bytes wait to be read by the other side, limit {self._max_unsent_bytes}"
            self.abort(RemoteProtocolError(text))
            return
        self._outgoing.extend(memoryview(buffer).cast("B") for buffer in buffers)
        self._pump()

    def _pump(self) -> None:
        while self._outgoing and self._can_write and self._has_transport():
            view = self._outgoing.popleft()
            if len(view) > SLICE_BYTES:
                self._outgoing.appendleft(view[SLICE_BYTES:])
                view = view[:SLICE_BYTES]
            self._unsent_bytes -= len(view)
            assert self._transport is not None
            self._transport.write(view)
        if self._is_closing and not self._outgoing and self._transport is not None:
            self._transport.close()

    def _drop_unsent(self) -> None:
        self._outgoing.clear()
        self._unsent_bytes = 0


def _set_options(sock: socket.socket) -> None:
    """Small messages at once, pings not behind bulk, and an end to connections whose other host is gone."""
    options = [
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", NOTSENT_LOWAT_BYTES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", USER_TIMEOUT_S * 1000),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", KEEPALIVE_PROBES),
    ]
    for level, name, value in options:
        with contextlib.suppress(OSError, AttributeError):  # some are Linux's own
            sock.setsockopt(level, getattr(socket, name), value)
