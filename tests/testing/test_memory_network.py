"""Links in memory: bytes in order and after their delay, and what crashes, resets and stalls do to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, TypeVar

import pytest

from remote_modules.config import ClientConfig
from remote_modules.errors import PeerError, PeerTimeout, PeerUnreachable
from remote_modules.identity import Identity
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.connection import Connection
from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.testing.memory_network import MAX_SLICE_BYTES, MemoryDialer, MemoryHost, MemoryNetwork
from remote_modules.testing.virtual_time import run_virtual
from remote_modules.wire import messages
from remote_modules.wire.protocol import MessageReceived, Protocol, Role

T = TypeVar("T")

ADDRESS = "10.0.0.1:1"
SERVER = Identity.from_seed(b"s" * 32)
MAX_BODY_BYTES = 1 << 20


class RawEnd(Connection):
    """An end of a link that keeps the bytes that come, with their times."""

    def __init__(self, name: str = "") -> None:
        super().__init__(
            Protocol(Role.CLIENT, max_body_bytes=MAX_BODY_BYTES),
            on_message=lambda event: None,
            on_lost=self._note_loss,
        )
        self.name = name
        self.slices: list[bytes] = []
        self.times: list[float] = []
        self.losses: list[tuple[float, Exception | None]] = []
        self.room = MAX_BODY_BYTES
        self._buffer = bytearray()

    @property
    def received(self) -> bytes:
        return b"".join(self.slices)

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def get_buffer(self, sizehint: int) -> memoryview:
        self._buffer = bytearray(min(self.room, sizehint))
        return memoryview(self._buffer)

    def buffer_updated(self, nbytes: int) -> None:
        self.slices.append(bytes(self._buffer[:nbytes]))
        self.times.append(now_s())

    def _note_loss(self, reason: Exception | None) -> None:
        self.losses.append((now_s(), reason))


class Net:
    """One host, with plain ends at both sides."""

    def __init__(self, seed: int = 0, *, delay_s: float = 0.5) -> None:
        self.network = MemoryNetwork(Random(seed), delay_s=delay_s)
        self.host: MemoryHost = self.network.host(ADDRESS)
        self.accepted: list[RawEnd] = []
        self.host.accept = self._accept

    async def connect(self) -> tuple[RawEnd, RawEnd]:
        ours = RawEnd("ours")
        await self.network.connect(ADDRESS, ours)
        return ours, self.accepted[-1]

    def _accept(self) -> RawEnd:
        self.accepted.append(RawEnd("theirs"))
        return self.accepted[-1]


def now_s() -> float:
    return asyncio.get_running_loop().time()


def virtual(main: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test under virtual time."""

    def run() -> None:
        run_virtual(main())

    run.__name__ = main.__name__
    return run


# ------------------------------------------------------------------------------------- bytes


@virtual
async def test_bytes_arrive_after_the_delay_both_ways() -> None:
    net = Net()
    ours, theirs = await net.connect()
    assert now_s() == 1.0  # there and back
    ours.write(b"abc")
    await asyncio.sleep(0.25)
    theirs.write(b"xyz")
    await asyncio.sleep(10.0)
    assert (theirs.received, theirs.times[0]) == (b"abc", 1.5)
    assert (ours.received, ours.times[0]) == (b"xyz", 1.75)


@virtual
async def test_order_is_kept_when_the_delay_shrinks() -> None:
    net = Net(delay_s=1.0)
    ours, theirs = await net.connect()
    for number in range(50):
        net.host.delay_s = 1.0 - number / 50
        ours.write(bytes([number]) * 3)
        await asyncio.sleep(0.001)
    await asyncio.sleep(5.0)
    assert theirs.received == b"".join(bytes([number]) * 3 for number in range(50))
    assert theirs.times == sorted(theirs.times)


@virtual
async def test_bytes_come_in_slices_of_random_length() -> None:
    net = Net()
    ours, theirs = await net.connect()
    pattern = bytes(range(256)) * 256
    ours.write(pattern)
    await asyncio.sleep(1.0)
    assert theirs.received == pattern
    sizes = [len(data) for data in theirs.slices]
    assert len(sizes) > len(pattern) // MAX_SLICE_BYTES
    assert max(sizes) <= MAX_SLICE_BYTES
    assert len(set(sizes)) > 5


@virtual
async def test_slices_fit_the_room_that_the_receiver_gives() -> None:
    net = Net()
    ours, theirs = await net.connect()
    theirs.room = 7
    ours.write(bytes(1000))
    await asyncio.sleep(1.0)
    assert len(theirs.received) == 1000
    assert max(map(len, theirs.slices)) <= 7


def test_slices_are_decided_by_the_seed() -> None:
    async def sizes(seed: int) -> list[int]:
        net = Net(seed)
        ours, theirs = await net.connect()
        ours.write(bytes(100_000))
        await asyncio.sleep(1.0)
        return list(map(len, theirs.slices))

    assert run_virtual(sizes(1)) == run_virtual(sizes(1))
    assert run_virtual(sizes(1)) != run_virtual(sizes(2))


@virtual
async def test_written_bytes_are_the_networks_own() -> None:
    net = Net()
    ours, theirs = await net.connect()
    data = bytearray(b"abc")
    ours.transport.write(data)
    data[:] = b"xyz"
    await asyncio.sleep(1.0)
    assert theirs.received == b"abc"


@virtual
async def test_links_of_one_host_are_independent() -> None:
    net = Net()
    first, first_server = await net.connect()
    second, second_server = await net.connect()
    first.write(b"1")
    second.write(b"2")
    first.transport.close()
    await asyncio.sleep(1.0)
    second.write(b"3")
    await asyncio.sleep(1.0)
    assert (first_server.received, second_server.received) == (b"1", b"23")
    assert first_server.losses
    assert not second_server.losses


# ------------------------------------------------------------------------------------- ends


@virtual
async def test_close_arrives_after_what_was_written() -> None:
    net = Net()
    ours, theirs = await net.connect()
    ours.write(b"last words")
    ours.transport.close()
    ours.transport.close()
    assert ours.transport.is_closing()
    ours.write(b"too late")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ours.losses == [(1.0, None)]
    await asyncio.sleep(5.0)
    assert theirs.received == b"last words"
    assert theirs.losses == [(1.5, None)]


@virtual
async def test_abort_resets_the_other_end() -> None:
    net = Net()
    ours, theirs = await net.connect()
    theirs.write(b"on its way")
    ours.transport.abort()
    await asyncio.sleep(5.0)
    assert ours.received == b""
    assert [when for when, _ in ours.losses] == [1.0]
    ((when, reason),) = theirs.losses
    assert when == 1.5
    assert isinstance(reason, ConnectionResetError)


@virtual
async def test_nobody_listening_refuses_after_a_round_trip() -> None:
    net = Net()
    net.host.accept = None
    with pytest.raises(ConnectionRefusedError, match=ADDRESS):
        await net.connect()
    assert now_s() == 1.0
    with pytest.raises(ConnectionRefusedError, match="unheard-of"):
        await net.network.connect("unheard-of:1", RawEnd())
    net.host.accept = lambda: None  # too many connections
    with pytest.raises(ConnectionRefusedError):
        await net.connect()


# ------------------------------------------------------------------------------------- faults


@virtual
async def test_crash_resets_all_links_and_stops_listening() -> None:
    net = Net()
    links = [await net.connect() for _ in range(3)]
    net.host.crash()
    await asyncio.sleep(5.0)
    for ours, theirs in links:
        assert len(ours.losses) == len(theirs.losses) == 1
        assert not ours.is_open
    with pytest.raises(ConnectionRefusedError):
        await net.connect()


@virtual
async def test_crash_of_a_stalled_host_loses_what_was_held() -> None:
    net = Net()
    ours, theirs = await net.connect()
    net.host.stall()
    ours.write(b"abc")
    await asyncio.sleep(5.0)
    net.host.crash()
    net.host.heal()
    await asyncio.sleep(5.0)
    assert theirs.received == b""
    assert ours.losses
    net.host.accept = net._accept
    again, server = await net.connect()
    again.write(b"new")
    await asyncio.sleep(5.0)
    assert server.received == b"new"


@virtual
async def test_reset_breaks_links_and_goes_on_listening() -> None:
    net = Net()
    ours, theirs = await net.connect()
    net.host.reset()
    await asyncio.sleep(5.0)
    assert ours.losses
    assert theirs.losses
    again, server = await net.connect()
    again.write(b"abc")
    await asyncio.sleep(5.0)
    assert server.received == b"abc"


@virtual
async def test_stalled_host_passes_nothing_and_tells_nobody() -> None:
    net = Net()
    ours, theirs = await net.connect()
    net.host.stall()
    ours.write(b"abc")
    theirs.write(b"xyz")
    await asyncio.sleep(1000.0)
    assert (ours.received, theirs.received) == (b"", b"")
    assert not ours.losses + theirs.losses
    assert ours.is_open
    net.host.heal()
    ours.write(b"def")
    await asyncio.sleep(5.0)
    assert theirs.received == b"abcdef"
    assert ours.received == b"xyz"


@virtual
async def test_close_waits_while_the_host_is_stalled() -> None:
    net = Net()
    ours, theirs = await net.connect()
    net.host.stall()
    ours.write(b"abc")
    ours.transport.close()
    await asyncio.sleep(100.0)
    assert not theirs.losses
    net.host.heal()
    await asyncio.sleep(5.0)
    assert theirs.received == b"abc"
    assert len(theirs.losses) == 1


@pytest.mark.parametrize("heals_before", [True, False])
def test_order_is_kept_when_a_host_heals_at_the_moment_of_an_arrival(heals_before: bool) -> None:
    """Both happen in one turn of the loop, in either order."""

    async def main() -> bytes:
        net = Net(delay_s=1.0)
        ours, theirs = await net.connect()
        loop = asyncio.get_running_loop()
        net.host.stall()
        ours.write(b"first ")
        await asyncio.sleep(5.0)
        if heals_before:
            loop.call_later(1.0, net.host.heal)
        ours.write(b"second ")
        if not heals_before:
            loop.call_later(1.0, net.host.heal)
        await asyncio.sleep(1.0)
        ours.write(b"third")
        await asyncio.sleep(5.0)
        return theirs.received

    assert run_virtual(main()) == b"first second third"


@virtual
async def test_host_that_stalls_again_while_healing_holds_the_rest() -> None:
    net = Net()
    ours, theirs = await net.connect()
    net.host.stall()
    ours.write(b"abc")
    await asyncio.sleep(5.0)
    net.host.heal()
    net.host.stall()
    await asyncio.sleep(5.0)
    assert theirs.received == b""
    net.host.heal()
    await asyncio.sleep(5.0)
    assert theirs.received == b"abc"


@virtual
async def test_dial_of_a_stalled_host_waits_until_it_heals() -> None:
    net = Net()
    net.host.stall()
    dial = asyncio.ensure_future(net.connect())
    await asyncio.sleep(60.0)
    assert not dial.done()
    net.host.heal()
    ours, theirs = await dial
    ours.write(b"abc")
    await asyncio.sleep(5.0)
    assert theirs.received == b"abc"


# ------------------------------------------------------------------------------------- dialling


class Greeter(Connection):
    """A server that says hello and nothing else."""

    def __init__(self, identity: Identity = SERVER) -> None:
        super().__init__(
            Protocol(Role.SERVER, max_body_bytes=MAX_BODY_BYTES), on_message=self._greet, on_lost=lambda reason: None
        )
        self._identity = identity

    def _greet(self, event: MessageReceived) -> None:
        match event.message:
            case messages.ClientHello(nonce=nonce):
                signature = self._identity.sign_hello(nonce=nonce, certificate_sha256="")
                self.send(
                    messages.ServerHello(
                        messages.VERSION_MAJOR,
                        messages.VERSION_MINOR,
                        self._identity.public_key,
                        signature,
                        "instance",
                        MAX_BODY_BYTES,
                    )
                )


def record_of(peer_id: PeerId = SERVER.peer_id) -> PeerRecord:
    return PeerRecord(
        peer_id=peer_id,
        instance_id="instance",
        sequence=1,
        model="model",
        model_key="key",
        num_blocks=4,
        start=0,
        end=4,
        addresses=(ADDRESS,),
        state=PeerState.ONLINE,
    )


async def dial(net: Net, **config: float) -> ClientConnection:
    return await MemoryDialer(net.network, ClientConfig(**config)).dial(record_of())  # type: ignore[arg-type]


@virtual
async def test_dialled_peer_proves_itself_and_its_round_trip_is_measured() -> None:
    net = Net(delay_s=0.25)
    net.host.accept = Greeter
    connection = await dial(net)
    assert connection.is_open
    assert connection.peer_id == SERVER.peer_id
    assert connection.rtt_s == pytest.approx(0.5)


@virtual
async def test_dial_of_nobody_is_unreachable() -> None:
    net = Net()
    net.host.accept = None
    with pytest.raises(PeerUnreachable, match="cannot reach peer") as caught:
        await dial(net)
    assert caught.value.peer_id == SERVER.peer_id


@virtual
async def test_dial_of_a_stalled_host_times_out() -> None:
    net = Net()
    net.host.accept = Greeter
    net.host.stall()
    with pytest.raises(PeerTimeout, match="does not answer the dial"):
        await dial(net, connect_timeout_s=3.0)
    assert now_s() == pytest.approx(3.0)


@virtual
async def test_dial_of_a_host_that_says_no_hello_times_out() -> None:
    net = Net()
    with pytest.raises(PeerTimeout, match="did not say hello"):
        await dial(net, connect_timeout_s=3.0)


@virtual
async def test_dial_that_finds_a_stranger_is_refused() -> None:
    net = Net()
    stranger = Identity.from_seed(b"x" * 32)
    net.host.accept = lambda: Greeter(stranger)
    with pytest.raises(PeerError, match="expected peer .* found"):
        await dial(net)
