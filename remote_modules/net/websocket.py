"""The same frames inside WebSocket messages: the way to a peer behind a proxy that passes no other upgrade.

To `net.connection` it is a transport as TCP is. The bytes of a connection are cut into binary messages, whose
boundaries mean nothing. They are not compressed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, TypeAlias

import aiohttp
from aiohttp import WSMsgType, web

from remote_modules.net.connection import SLICE_BYTES, Connection

__all__ = ["MAX_MESSAGE_BYTES", "MESSAGE_LIMIT", "WebSocketTransport"]

MAX_MESSAGE_BYTES = SLICE_BYTES
CLOSE_TIMEOUT_S = 1.0  # for the other side to say goodbye
MESSAGE_LIMIT = MAX_MESSAGE_BYTES + 1  # as aiohttp counts: the first size that is refused

WebSocket: TypeAlias = "aiohttp.ClientWebSocketResponse[Any] | web.WebSocketResponse[Any]"


class WebSocketTransport(asyncio.Transport):
    """Carries the bytes of ``connection`` for as long as `run` runs."""

    def __init__(self, socket: WebSocket, connection: Connection) -> None:
        super().__init__()
        self._socket = socket
        self._connection = connection
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._max_unsent_bytes = SLICE_BYTES
        self._is_paused = False
        self._is_closing = False
        self._wake = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.connection_made(self)

    async def run(self) -> None:
        """Until either side ends; then the connection is lost, with the reason if there is one."""
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write()), self._ended]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.abort()
            for task in tasks:
                task.cancel()
            self._connection.connection_lost(_reason(tasks))
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._hang_up()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """How much may wait until the connection is told to pause; it goes on when nothing waits."""
        self._max_unsent_bytes = SLICE_BYTES if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def is_closing(self) -> bool:
        return self._is_closing

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._is_closing:
            return
        view = memoryview(data).cast("B")
        for start in range(0, len(view), MAX_MESSAGE_BYTES):
            self._unsent.append(view[start : start + MAX_MESSAGE_BYTES])
        self._unsent_bytes += len(view)
        self._wake.set()
        if self._unsent_bytes > self._max_unsent_bytes and not self._is_paused:
            self._is_paused = True
            self._connection.pause_writing()

    def close(self) -> None:
        """After what was written has left."""
        self._is_closing = True
        self._wake.set()

    def abort(self) -> None:
        self._is_closing = True
        self._unsent.clear()
        self._unsent_bytes = 0
        if not self._ended.done():
            self._ended.set_result(None)

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is not WSMsgType.BINARY:
                text = f"expected binary WebSocket messages, got {message.type.name}"
                raise ConnectionError(f"{text}: {message.data}" if message.type is WSMsgType.ERROR else text)
            self._feed(memoryview(message.data))
        if not self._is_closing:
            self._connection.eof_received()

    def _feed(self, data: memoryview) -> None:
        while data and not self._is_closing:
            buffer = self._connection.get_buffer(len(data))
            num_bytes = min(len(buffer), len(data))
            buffer[:num_bytes] = data[:num_bytes]
            self._connection.buffer_updated(num_bytes)
            data = data[num_bytes:]

    async def _write(self) -> None:
        while self._unsent or not self._is_closing:
            while self._unsent:
                data = self._unsent.popleft()
                await self._socket.send_bytes(bytes(data))
                self._unsent_bytes -= len(data)
            if self._is_paused:
                self._is_paused = False
                self._connection.resume_writing()
            if not self._unsent and not self._is_closing:
                self._wake.clear()
                await self._wake.wait()

    async def _hang_up(self) -> None:
        try:
            await asyncio.wait_for(self._socket.close(), CLOSE_TIMEOUT_S)
        except (asyncio.TimeoutError, ConnectionError):
            return  # it is cut off instead


def _reason(tasks: list[asyncio.Future[None]]) -> Exception | None:
    """Why the first of them failed, if any did."""
    for task in tasks:
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, Exception):
            return error
    return None
