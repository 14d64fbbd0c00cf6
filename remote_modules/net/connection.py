"""One connection, either side: the sans-I/O protocol driven over an asyncio transport.

Frames are never interleaved: they leave in the order of `send`, bulk in slices, so that at most one slice is copied by
the transport.
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
from remote_modules.wire.messages import Message
from remote_modules.wire.protocol import MessageReceived, Protocol

__all__ = ["Connection"]

logger = logging.getLogger(__name__)

SLICE_BYTES = 256 * 1024
JOIN_BYTES = 64 * 1024  # below this one joined write is cheaper than several
NOTSENT_LOWAT_BYTES = 128 * 1024  # bounds what lies in the kernel, so that a ping behind bulk data gets out soon
# A host that is gone without a word (power, cable, NAT) is noticed by the kernel in 30 s: a server sends no pings, and
# its connection would hold a slot for hours. Names of Linux; elsewhere some are missing, and the system's own hold.
KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000))


class Connection(asyncio.BufferedProtocol):
    """Frames in and out of one transport.

    Args:
        protocol: the state of the connection.
        on_message: called on the loop for each message, in order.
        on_lost: called once, when the connection is gone, with the reason or None.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        on_message: Callable[[MessageReceived], None],
        on_lost: Callable[[Exception | None], None],
    ) -> None:
        self._protocol = protocol
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._outgoing: deque[memoryview] = deque()
        self._can_write = True
        self._is_closing = False
        self._error: Exception | None = None
        self._close_callbacks: list[Callable[[Exception | None], object]] = []
        self.closed = asyncio.Event()
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def is_open(self) -> bool:
        return not self._is_closing and self._has_transport()

    @property
    def max_peer_body_bytes(self) -> int:
        """Largest message body that the other side takes."""
        return self._protocol.their_max_body_bytes

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
            self._queue(self._protocol.data_to_send())

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
        self._outgoing.clear()
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=SLICE_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError, AttributeError):  # a Linux option; elsewhere pings may wait behind bulk
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._protocol.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_received += nbytes
        self._progress()
        try:
            self._protocol.buffer_updated(nbytes)
            for event in self._protocol.events_received():
                self._on_message(event)
        except ProtocolError as exc:
            logger.debug("! protocol error=%s", exc)
            self._queue(self._protocol.data_to_send())
            self.abort(exc)

    def eof_received(self) -> bool:
        try:
            self._protocol.receive_eof()
        except RemoteProtocolError as exc:
            self._error = self._error or exc
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._outgoing.clear()
            self._on_lost(self._error or exc)
            callbacks, self._close_callbacks = self._close_callbacks, []
            for callback in callbacks:
                callback(exc)

    def pause_writing(self) -> None:
        self._can_write = False

    def resume_writing(self) -> None:
        self._can_write = True
        self._progress()
        self._pump()

    def _progress(self) -> None:
        """Bytes moved, either way."""

    def _has_transport(self) -> bool:
        return self._transport is not None and not self.closed.is_set() and not self._transport.is_closing()

    def _queue(self, buffers: list[Buffer]) -> None:
        if not self.is_open:
            return
        total = sum(map(len, buffers))
        self.bytes_sent += total
        if total <= JOIN_BYTES and not self._outgoing and self._can_write:
            assert self._transport is not None
            self._transport.write(b"".join(buffers))
            return
        self._outgoing.extend(memoryview(buffer).cast("B") for buffer in buffers)
        self._pump()

    def _pump(self) -> None:
        while self._outgoing and self._can_write and self._has_transport():
            view = self._outgoing.popleft()
            if len(view) > SLICE_BYTES:
                self._outgoing.appendleft(view[SLICE_BYTES:])
                view = view[:SLICE_BYTES]
            assert self._transport is not None
            self._transport.write(view)
        if self._is_closing and not self._outgoing and self._transport is not None:
            self._transport.close()


def _keep_alive(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
