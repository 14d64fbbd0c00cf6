"""A TCP link on loopback that breaks on command.

Put it in front of a peer (or a tracker) and let clients dial the link's address: bytes pass unchanged until a fault
is armed. Each fault counts when it happens, so that a test can assert that it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
from dataclasses import dataclass

from remote_modules.net.loop import LoopThread
from remote_modules.peers import check_address

__all__ = ["Fault", "FaultyLink"]

CHUNK_BYTES = 16 * 1024
UPGRADE_HEADER = b"\r\nUpgrade: "


class Fault(enum.Enum):
    """What can happen to a link."""

    REFUSE_DIAL = "refuse_dial"  # new connections are reset at once
    DROP = "drop"  # connections are reset after some more bytes
    STALL = "stall"  # nothing passes any more, either way; connections stay open
    CORRUPT = "corrupt"  # one bit of what comes back flips
    TRUNCATE = "truncate"  # the stream ends in the middle of a frame, without a reset
    SLOW = "slow"  # each chunk is delayed
    SLICE = "slice"  # bytes come one at a time


@dataclass(slots=True)
class _Armed:
    fault: Fault
    after_bytes: int
    delay_s: float
    times: int | None
    streams: frozenset[_Connection] | None  # which connections it strikes; None for all, and those to come


@dataclass(slots=True, eq=False)
class _Connection:
    is_stream: bool = False  # upgraded from HTTP to frames


class FaultyLink:
    """A proxy ``127.0.0.1:port`` in front of ``target``; use as a context manager.

    Args:
        target: ``host:port`` to pass to; may be set later.
    """

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.fired = 0
        self._armed: _Armed | None = None
        self._passed = 0
        self._connections: set[_Connection] = set()
        self._io = LoopThread("remote-modules-faulty-link")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._io.run(self._start())

    @property
    def address(self) -> str:
        """``host:port`` to dial."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def inject(
        self,
        fault: Fault,
        *,
        after_bytes: int = 0,
        delay_s: float = 0.1,
        times: int | None = 1,
        only_open_streams: bool = False,
    ) -> None:
        """Arm a fault, and count anew.

        Args:
            after_bytes: bytes from the target that still pass before it happens.
            delay_s: for `Fault.SLOW`.
            times: how often it may happen; None for every time. `Fault.STALL`, `Fault.SLOW` and `Fault.SLICE` last
                until `clear`.
            only_open_streams: strike (and count) only connections that carry frames now; what trackers and peers ask of
                the target by HTTP passes.
        """
        self._passed = self.fired = 0
        streams = frozenset(connection for connection in self._connections.copy() if connection.is_stream)
        self._armed = _Armed(fault, after_bytes, delay_s, times, streams if only_open_streams else None)

    def clear(self) -> None:
        """Pass everything again; what was stalled stays lost."""
        self._armed = None

    def close(self) -> None:
        """Stop; idempotent."""
        if not self._io.loop.is_closed():
            self._io.run(self._stop())
            self._io.stop()

    def __enter__(self) -> FaultyLink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in list(self._writers):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._join(reader, writer)
        except OSError:
            _reset(writer)
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.target or self._fires(Fault.REFUSE_DIAL):
            _reset(writer)
            return
        host, port = check_address(self.target)
        far_reader, far_writer = await asyncio.open_connection(host, port)
        self._writers.add(far_writer)
        connection = _Connection()
        self._connections.add(connection)
        try:
            there = asyncio.ensure_future(self._pass(reader, far_writer, connection, comes_back=False))
            back = asyncio.ensure_future(self._pass(far_reader, writer, connection, comes_back=True))
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
            for half in (there, back):
                half.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
        finally:
            self._connections.discard(connection)
            self._writers.discard(far_writer)
            far_writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection, *, comes_back: bool
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if not comes_back and UPGRADE_HEADER in data:
                connection.is_stream = True
            armed = self._armed
            if armed is None or (armed.streams is not None and connection not in armed.streams):
                await _send(writer, data)
            elif not await self._disturb(armed, data, writer, comes_back=comes_back):
                return

    async def _disturb(self, armed: _Armed, data: bytes, writer: asyncio.StreamWriter, *, comes_back: bool) -> bool:
        """Pass ``data`` on, or what the armed fault makes of it; False to end the connection."""
        is_due = comes_back and self._passed + len(data) > armed.after_bytes
        if comes_back:
            self._passed += len(data)
        if not (is_due or (armed.fault is Fault.STALL and self.fired)):
            return await _send(writer, data)
        room = max(0, armed.after_bytes - (self._passed - len(data)))
        if armed.fault is Fault.STALL:
            self.fired += 1
            await _send(writer, data[:room])
            while self._armed is armed:  # noqa: ASYNC110 - cleared from another thread
                await asyncio.sleep(0.02)
            return True
        if armed.fault is Fault.SLOW:
            self.fired += 1
            await asyncio.sleep(armed.delay_s)
            return await _send(writer, data)
        if armed.fault is Fault.SLICE:
            self.fired += 1
            for position in range(len(data)):
                await _send(writer, data[position : position + 1])
            return True
        return await self._break(armed, data, room, writer)

    async def _break(self, armed: _Armed, data: bytes, room: int, writer: asyncio.StreamWriter) -> bool:
        if not self._fires(armed.fault):
            return await _send(writer, data)
        if armed.fault is Fault.CORRUPT:
            flipped = bytearray(data)
            flipped[min(room, len(flipped) - 1)] ^= 0x10
            return await _send(writer, bytes(flipped))
        await _send(writer, data[:room])
        if armed.fault is Fault.DROP:
            _reset(writer)
        return False

    def _fires(self, fault: Fault) -> bool:
        armed = self._armed
        if armed is None or armed.fault is not fault:
            return False
        self.fired += 1
        if armed.times is not None:
            armed.times -= 1
            if armed.times <= 0:
                self._armed = None
        return True


async def _send(writer: asyncio.StreamWriter, data: bytes) -> bool:
    if data:
        writer.write(data)
        await writer.drain()
    return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as the kernel of a dead process does."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()
