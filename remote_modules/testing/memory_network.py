"""Links in memory, with faults: what TCP connections are to a real swarm.

A link delivers bytes in order, after a delay, in slices of random length. A host can crash (its connections are
reset), vanish (nobody is told), freeze (nothing goes in or out until it thaws), or be cut off from some others (bytes
wait, nobody is told: as TCP does until it gives up); see `memory_links` for what happens on the way. Works on any
event loop; meant for `virtual_time`. What a host does runs in a context of its own, so that it can be suspended.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextvars import Context, copy_context
from random import Random
from typing import Any

from remote_modules.config import ClientConfig
from remote_modules.errors import PeerTimeout, PeerUnreachable
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.connection import Connection
from remote_modules.peers import PeerId, PeerRecord, short_id
from remote_modules.testing.fault_points import FaultPoints
from remote_modules.testing.memory_links import MAX_SLICE_BYTES, Path, flipped
from remote_modules.testing.virtual_time import HOST

__all__ = ["CLIENT", "KEEPALIVE_S", "MAX_SLICE_BYTES", "MemoryDialer", "MemoryHost", "MemoryNetwork"]

CLIENT = "client"  # the host of a client that is not told apart from others
KEEPALIVE_S = 30.0  # after this the kernel gives up a connection whose other host is gone
_NORMAL = Path()


class MemoryHost:
    """One host of the network.

    Attributes:
        accept: makes the server's side of a connection; None while nobody listens.
        delay_s: one-way delay to and from it.
        context: where what it does begins.
    """

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self.accept: Callable[[], Connection | None] | None = None
        self.delay_s = network.delay_s
        self.address = address
        self.is_stalled = False
        self.context: Context = copy_context()
        self.context.run(HOST.set, address)
        self._network = network
        self._ends: list[_End] = []

    def crash(self) -> None:
        """Stop listening and reset all connections; whatever was held is lost."""
        self.accept = None
        self.is_stalled = False
        self.reset()

    def vanish(self) -> None:
        """As a crash, but nobody is told: power is lost, or the cable. The other ends find out by themselves."""
        self.accept = None
        self.is_stalled = False
        for end in list(self._ends):
            end.vanish()

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
        self._network.release()

    @property
    def num_connections(self) -> int:
        """Ends of connections that are still here."""
        return len(self._ends)


class MemoryNetwork:
    """Hosts by address, and the links between them.

    Args:
        rng: decides how bytes are sliced, and what faults do.
        delay_s: default one-way delay of a host that is dialled; that of those who only dial is 0.

    Attributes:
        fired: how often each fault happened.
        points: asked at each dial, send and receive, if there are any.
    """

    def __init__(self, rng: Random, *, delay_s: float = 0.01) -> None:
        self.rng = rng
        self.delay_s = delay_s
        self.fired: Counter[str] = Counter()
        self.points: FaultPoints | None = None
        self._hosts: dict[str, MemoryHost] = {}
        self._paths: dict[tuple[str, str], Path] = {}
        self._holding: dict[_End, None] = {}

    def host(self, address: str) -> MemoryHost:
        """The host at an address; made on first use."""
        if address not in self._hosts:
            self._hosts[address] = MemoryHost(self, address)
        return self._hosts[address]

    def dialler(self, address: str) -> MemoryHost:
        """The host of a client: one that adds no delay."""
        if address not in self._hosts:
            self.host(address).delay_s = 0.0
        return self._hosts[address]

    def path(self, source: str, target: str) -> Path:
        """One direction between two hosts, to be changed; as good as any until then."""
        return self._paths.setdefault((source, target), Path())

    def path_now(self, source: str, target: str) -> Path:
        """The same, to be read."""
        return self._paths.get((source, target), _NORMAL)

    def partition(self, sources: Iterable[str], targets: Iterable[str], *, is_one_way: bool = False) -> None:
        """Cut every path from ``sources`` to ``targets``, and those back unless ``is_one_way``."""
        for source in sources:
            for target in targets:
                self.path(source, target).is_cut = True
                if not is_one_way:
                    self.path(target, source).is_cut = True

    def mend(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Every path between the two sides is as good as new; what was held goes on its way."""
        for source in sources:
            for target in targets:
                self._paths.pop((source, target), None)
                self._paths.pop((target, source), None)
        self.release()

    def is_open(self, source: str, target: str) -> bool:
        """Whether bytes arrive now."""
        if self.path_now(source, target).is_cut:
            return False
        return not any(host in self._hosts and self._hosts[host].is_stalled for host in (source, target))

    async def connect(self, address: str, connection: Connection, source: str = CLIENT) -> None:
        """Join ``connection`` to what listens at ``address``.

        Raises:
            ConnectionRefusedError: nobody does. A host that cannot be reached lets the caller wait for ever.
        """
        way = self.points.reach("dial") if self.points is not None else None
        ours_at, host = self.dialler(source), self.host(address)
        there, back = self.path_now(source, address), self.path_now(address, source)
        await asyncio.sleep(2 * (ours_at.delay_s + host.delay_s) + there.delay_s + back.delay_s)
        # A dial that hangs; virtual time makes polling free.
        while way == "silent" or not (self.is_open(source, address) and self.is_open(address, source)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        accepted = host.context.run(host.accept) if host.accept is not None and way is None else None
        if accepted is None:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        ours, theirs = _End(self, ours_at), _End(self, host)
        ours.other, theirs.other = theirs, ours
        ours.attach(connection)
        theirs.attach(accepted)

    def hold(self, end: _End) -> None:
        self._holding[end] = None

    def release(self) -> None:
        """Let go what is held and can arrive now, soon."""
        holding, self._holding = list(self._holding), {}
        for end in holding:
            asyncio.get_running_loop().call_soon(end.release, context=end.other.host.context)


class MemoryDialer:
    """The `Dialer` of a simulated client.

    Args:
        source: address of the client's host.
    """

    connection_class: type[ClientConnection] = ClientConnection

    def __init__(self, network: MemoryNetwork, config: ClientConfig, source: str = CLIENT) -> None:
        self._network = network
        self._config = config
        self._source = source

    async def dial(self, record: PeerRecord) -> ClientConnection:
        name = short_id(record.peer_id)
        connection = self.new_connection(record)
        try:
            dialled = self._network.connect(record.addresses[0], connection, self._source)
            await asyncio.wait_for(dialled, self._config.connect_timeout_s)
        except asyncio.TimeoutError as exc:
            raise PeerTimeout(f"peer '{name}' does not answer the dial", peer_id=record.peer_id) from exc
        except ConnectionRefusedError as exc:
            raise PeerUnreachable(f"cannot reach peer '{name}': {exc}", peer_id=record.peer_id) from exc
        await connection.handshake(self._config.connect_timeout_s)
        return connection

    def new_connection(self, record: PeerRecord) -> ClientConnection:
        """The client's side of a connection to the peer of ``record``."""
        return self.connection_class(
            PeerId(record.peer_id),
            nonce=bytes(32),
            certificate_sha256="",
            silence_timeout_s=self._config.silence_timeout_s,
            max_body_bytes=self._config.max_request_bytes,
            software="simulation",
        )

    async def aclose(self) -> None:
        """Nothing is held."""


class _End(asyncio.Transport):
    """One end of a link."""

    def __init__(self, network: MemoryNetwork, host: MemoryHost) -> None:
        super().__init__()
        self.other: _End
        self.host = host
        self._network = network
        self._connection: Connection
        self._arrives_s = 0.0
        self._on_the_way: deque[Callable[[], None]] = deque()
        self._held: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self._is_lost = False
        self._is_swallowed = False  # what is written vanishes
        host._ends.append(self)

    def attach(self, connection: Connection) -> None:
        self._connection = connection
        connection.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._is_closing or not data or not self._may_send():
            return
        network = self._network
        chunk, is_broken = self._path.damage(bytes(data), network.rng, network.fired)
        self._later(lambda: self.other._arrive(chunk), len(chunk))
        if is_broken:
            self.abort()

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if self._is_swallowed:
            self.abort()
        elif not self._is_closing:
            self._is_closing = True
            self._later(lambda: self.other._lose(None))
            self._soon(None)

    def abort(self) -> None:
        if not self._is_lost:
            self._is_closing = True
            self._later(lambda: self.other._lose(ConnectionResetError("connection reset")))
            self._soon(None)
            if self._is_swallowed:  # the other host asks for a while whether anybody is here
                loop, other, error = asyncio.get_running_loop(), self.other, TimeoutError("nobody is there any more")
                loop.call_later(KEEPALIVE_S, other._lose, error, context=other.host.context)

    def vanish(self) -> None:
        """The host is gone: nothing leaves any more, and the other end is on its own."""
        self._is_swallowed = True
        self._on_the_way.clear()
        self.abort()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Memory has no limits."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 0) if name == "peername" else default  # all hosts are this machine

    @property
    def _path(self) -> Path:
        return self._network.path_now(self.host.address, self.other.host.address)

    def _may_send(self) -> bool:
        way = self._network.points.reach("send") if self._network.points is not None else None
        if way == "reset":
            self.abort()
        self._is_swallowed = self._is_swallowed or way == "swallowed"
        return way is None and not self._is_swallowed

    def _soon(self, exc: Exception | None) -> None:
        asyncio.get_running_loop().call_soon(self._lose, exc, context=self.host.context)

    def _later(self, deliver: Callable[[], None], num_bytes: int = 0) -> None:
        """Deliver after the delay, after what was sent before, and not while the path is cut or a host stalled."""
        if self._is_swallowed:
            return
        loop, network, target = asyncio.get_running_loop(), self._network, self.other.host
        hosts_s = self.host.delay_s + target.delay_s
        way_s = self._path.seconds(num_bytes, loop.time(), hosts_s, network.rng, network.fired)
        self._arrives_s = max(self._arrives_s, loop.time() + way_s)
        self._on_the_way.append(deliver)
        loop.call_at(self._arrives_s, self._deliver_next, context=target.context)  # equal times fire in any order

    def _deliver_next(self) -> None:
        if not self._on_the_way:  # the host vanished with what it had sent
            return
        deliver = self._on_the_way.popleft()
        if self._held or not self._network.is_open(self.host.address, self.other.host.address):
            self._held.append(deliver)
            self._network.hold(self)
        else:
            deliver()

    def release(self) -> None:
        while self._held and self._network.is_open(self.host.address, self.other.host.address):
            self._held.popleft()()
        if self._held:
            self._network.hold(self)

    def _arrive(self, data: bytes) -> None:
        if self._is_lost or self._is_closing:
            if self._is_swallowed and self.host.accept is not None:  # the host is back and knows nothing of this
                self.other._lose(ConnectionResetError("connection reset"))
            return
        data = self._disturbed(data)
        rng, largest, connection = self._network.rng, self._path_in.max_slice_bytes, self._connection
        if largest < MAX_SLICE_BYTES:
            self._network.fired["slices"] += 1
        view = memoryview(data)
        while view and not self._is_lost and not self._is_closing:
            buffer = connection.get_buffer(len(view))
            num_bytes = min(len(buffer), len(view), rng.randint(1, largest))
            buffer[:num_bytes] = view[:num_bytes]
            view = view[num_bytes:]
            connection.buffer_updated(num_bytes)

    @property
    def _path_in(self) -> Path:
        return self._network.path_now(self.other.host.address, self.host.address)

    def _disturbed(self, data: bytes) -> bytes:
        """What a fault point makes of bytes that arrive."""
        way = self._network.points.reach("receive") if self._network.points is not None else None
        if way == "flipped":
            return flipped(data, self._network.rng)
        if way is not None:
            self.abort()
        return data

    def _lose(self, exc: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            if self in self.host._ends:
                self.host._ends.remove(self)
            self._connection.connection_lost(exc)
