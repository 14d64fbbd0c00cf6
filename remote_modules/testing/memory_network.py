"""Links in memory, with faults: what TCP connections are to a real swarm.

A link delivers bytes in order, after a delay, in slices of random length. A host can crash (its connections are
reset), freeze (nothing goes in or out until it thaws), or be cut off (bytes wait, nobody is told: as TCP does until
it gives up). Works on any event loop; meant for `virtual_time`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from remote_modules.config import ClientConfig
from remote_modules.errors import PeerTimeout, PeerUnreachable
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.connection import Connection
from remote_modules.peers import PeerId, PeerRecord, short_id

__all__ = ["MemoryDialer", "MemoryHost", "MemoryNetwork"]

MAX_SLICE_BYTES = 4096


class MemoryHost:
    """One host of the network.

    Attributes:
        accept: makes the server's side of a connection; None while nobody listens.
        delay_s: one-way delay to and from it.
    """

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self.accept: Callable[[], Connection | None] | None = None
        self.delay_s = network.delay_s
        self.address = address
        self.is_stalled = False
        self._network = network
        self._held: deque[Callable[[], None]] = deque()
        self._ends: list[_End] = []

    def crash(self) -> None:
        """Stop listening and reset all connections; whatever was held is lost."""
        self.accept = None
        self._held.clear()
        self.is_stalled = False
        self.reset()

    def reset(self) -> None:
        """Break all connections; whoever listens goes on listening."""
        for end in list(self._ends):
            end.abort()

    def stall(self) -> None:
        """Nothing goes in or out: a frozen process, or a cut cable."""
        self.is_stalled = True

    def heal(self) -> None:
        """Undo `stall`; what was held goes on its way, before anything that arrives later."""
        self.is_stalled = False
        asyncio.get_running_loop().call_soon(self._release)

    def deliver(self, deliver: Callable[[], None]) -> None:
        """Deliver now, or hold."""
        if self.is_stalled or self._held:
            self._held.append(deliver)
        else:
            deliver()

    def _release(self) -> None:
        while self._held and not self.is_stalled:
            self._held.popleft()()


class MemoryNetwork:
    """Hosts by address, and the links between clients and them.

    Args:
        rng: decides how bytes are sliced.
        delay_s: default one-way delay.
    """

    def __init__(self, rng: Random, *, delay_s: float = 0.01) -> None:
        self.rng = rng
        self.delay_s = delay_s
        self._hosts: dict[str, MemoryHost] = {}

    def host(self, address: str) -> MemoryHost:
        """The host at an address; made on first use."""
        if address not in self._hosts:
            self._hosts[address] = MemoryHost(self, address)
        return self._hosts[address]

    async def connect(self, address: str, connection: Connection) -> None:
        """Join ``connection`` to what listens at ``address``.

        Raises:
            ConnectionRefusedError: nobody does. A stalled host lets the caller wait for ever.
        """
        host = self.host(address)
        await asyncio.sleep(2 * host.delay_s)
        while host.is_stalled:  # noqa: ASYNC110 - a dial that hangs; virtual time makes polling free
            await asyncio.sleep(0.05)
        accepted = host.accept() if host.accept is not None else None
        if accepted is None:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        ours, theirs = _End(self, host), _End(self, host)
        ours.other, theirs.other = theirs, ours
        ours.attach(connection)
        theirs.attach(accepted)
        host._ends += [ours, theirs]


class MemoryDialer:
    """The `Dialer` of a simulated client."""

    def __init__(self, network: MemoryNetwork, config: ClientConfig) -> None:
        self._network = network
        self._config = config

    async def dial(self, record: PeerRecord) -> ClientConnection:
        name = short_id(record.peer_id)
        connection = ClientConnection(
            PeerId(record.peer_id),
            nonce=bytes(32),
            certificate_sha256="",
            silence_timeout_s=self._config.silence_timeout_s,
            max_body_bytes=self._config.max_request_bytes,
            software="simulation",
        )
        try:
            dialled = self._network.connect(record.addresses[0], connection)
            await asyncio.wait_for(dialled, self._config.connect_timeout_s)
        except asyncio.TimeoutError as exc:
            raise PeerTimeout(f"peer '{name}' does not answer the dial", peer_id=record.peer_id) from exc
        except ConnectionRefusedError as exc:
            raise PeerUnreachable(f"cannot reach peer '{name}': {exc}", peer_id=record.peer_id) from exc
        await connection.handshake(self._config.connect_timeout_s)
        return connection

    async def aclose(self) -> None:
        """Nothing is held."""


class _End(asyncio.Transport):
    """One end of a link."""

    def __init__(self, network: MemoryNetwork, host: MemoryHost) -> None:
        super().__init__()
        self.other: _End
        self._network = network
        self._host = host
        self._connection: Connection
        self._arrives_s = 0.0
        self._on_the_way: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self._is_lost = False

    def attach(self, connection: Connection) -> None:
        self._connection = connection
        connection.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not self._is_closing:
            chunk = bytes(data)
            self._later(lambda: self.other._arrive(chunk))

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._later(lambda: self.other._lose(None))
            asyncio.get_running_loop().call_soon(self._lose, None)

    def abort(self) -> None:
        if not self._is_lost:
            self._is_closing = True
            self._later(lambda: self.other._lose(ConnectionResetError("connection reset")))
            asyncio.get_running_loop().call_soon(self._lose, None)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Memory has no limits."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def _later(self, deliver: Callable[[], None]) -> None:
        """Deliver after the delay, after what was sent before, and not while the host is stalled."""
        loop = asyncio.get_running_loop()
        self._arrives_s = max(self._arrives_s, loop.time() + self._host.delay_s)
        self._on_the_way.append(deliver)
        loop.call_at(self._arrives_s, self._deliver_next)  # timers of equal time fire in any order

    def _deliver_next(self) -> None:
        self._host.deliver(self._on_the_way.popleft())

    def _arrive(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._is_lost and not self._is_closing:
            buffer = self._connection.get_buffer(len(view))
            num_bytes = min(len(buffer), len(view), self._network.rng.randint(1, MAX_SLICE_BYTES))
            buffer[:num_bytes] = view[:num_bytes]
            view = view[num_bytes:]
            self._connection.buffer_updated(num_bytes)

    def _lose(self, exc: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            if self in self._host._ends:
                self._host._ends.remove(self)
            self._connection.connection_lost(exc)
