from __future__ import annotations

import asyncio
import datetime
import gc
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import aiohttp
import msgspec
import pytest
import torch

from remote_modules.config import ClientConfig
from remote_modules.errors import PeerError, PeerTimeout, PeerUnreachable, RemoteModulesError
from remote_modules.identity import Certificate, Identity, verify_record
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.connection import Connection
from remote_modules.net.http import HttpDialer, PeerSite
from remote_modules.peers import PeerRecord, PeerState, SignedRecord, short_id
from remote_modules.wire import messages
from remote_modules.wire.messages import ForwardRequest, Output
from remote_modules.wire.protocol import MessageReceived, Protocol, Role
from remote_modules.wire.tensors import encode_tensors

from .memory import MAX_BODY_BYTES, SERVER, until

Run: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
Runner: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
Answer: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

STRANGER = Identity.from_seed(b"x" * 32)
CERTIFICATE = SERVER.certificate(now=datetime.datetime.now(datetime.timezone.utc))
OTHER_CERTIFICATE = STRANGER.certificate(now=datetime.datetime.now(datetime.timezone.utc))
DEAD_ADDRESS = "127.0.0.1:1"


def runners() -> dict[str, Runner]:
    """The event loops that a peer may run on: uvloop where it is installed."""
    found: dict[str, Runner] = {"asyncio": asyncio.run}
    try:
        import uvloop
    except ImportError:
        return found
    return {**found, "uvloop": uvloop.run}


def num_sockets() -> int:
    """Sockets that this process has open."""
    return sum(map(is_socket, map(int, os.listdir("/dev/fd"))))


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # it was that of the listing itself
        return False


@pytest.fixture(params=list(runners().values()), ids=list(runners()))
def run(request: pytest.FixtureRequest) -> Run:
    """Run a test on one kind of loop; afterwards no task and no socket may be left."""
    runner: Runner = request.param

    def run_main(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            before = num_sockets()
            await main()
            await until(lambda: len(asyncio.all_tasks()) == 1)
            await until(lambda: num_sockets() == before)

        gc.freeze()  # all that is older need not be looked at
        runner(whole())
        gc.collect()  # what was not closed would warn now
        gc.unfreeze()

    return run_main


class EchoEnd(Connection):
    """A peer's side that answers every forward with its own tensors."""

    def __init__(self, identity: Identity, certificate_sha256: str) -> None:
        self._identity = identity
        self._certificate_sha256 = certificate_sha256
        protocol = Protocol(Role.SERVER, max_body_bytes=MAX_BODY_BYTES)
        super().__init__(protocol, on_message=self._answer, on_lost=lambda reason: None)

    def _answer(self, event: MessageReceived) -> None:
        match event.message:
            case messages.ClientHello(nonce=nonce):
                signature = self._identity.sign_hello(nonce=nonce, certificate_sha256=self._certificate_sha256)
                self.send(messages.ServerHello(1, 0, self._identity.public_key, signature, "1", MAX_BODY_BYTES))
            case ForwardRequest() as request:
                self.send(Output(request.request_id, request.tensors, 0.0, 0.0), [event.body])


class EchoPeer:
    """A listening peer."""

    def __init__(
        self, *, identity: Identity = SERVER, certificate: Certificate | None = None, max_connections: int = 10
    ) -> None:
        self.accepted: list[EchoEnd] = []
        self.signed: SignedRecord | None = None
        self.port = 0
        self._identity = identity
        self._certificate_sha256 = "" if certificate is None else certificate.sha256
        self._max_connections = max_connections
        self.site = PeerSite(
            host="127.0.0.1",
            port=0,
            certificate=certificate,
            record=lambda: self.signed,
            metrics=lambda: b"load 0\n",
            accept=self._accept,
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def num_open(self) -> int:
        return sum(not end.closed.is_set() for end in self.accepted)

    def _accept(self) -> Connection | None:
        if self.num_open >= self._max_connections:
            return None
        self.accepted.append(EchoEnd(self._identity, self._certificate_sha256))
        return self.accepted[-1]


@asynccontextmanager
async def listening(peer: EchoPeer) -> AsyncIterator[EchoPeer]:
    peer.port = await peer.site.start()
    try:
        yield peer
    finally:
        for end in peer.accepted:
            end.abort()
        await peer.site.aclose()


@asynccontextmanager
async def stranger(answer: Answer) -> AsyncIterator[str]:
    """Some other software on a port; its address."""

    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(answer_and_close, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def record_of(*addresses: str, pin: str | None = None, identity: Identity = SERVER) -> PeerRecord:
    return PeerRecord(
        peer_id=identity.peer_id,
        instance_id="1",
        sequence=1,
        model="tiny",
        model_key="tiny-key",
        num_blocks=4,
        start=0,
        end=4,
        addresses=addresses,
        state=PeerState.ONLINE,
        certificate_sha256=pin,
    )


@asynccontextmanager
async def dialer(*, connect_timeout_s: float = 2.0) -> AsyncIterator[HttpDialer]:
    made = HttpDialer(ClientConfig(connect_timeout_s=connect_timeout_s), software="test client")
    try:
        yield made
    finally:
        await made.aclose()


@asynccontextmanager
async def dialled(record: PeerRecord) -> AsyncIterator[ClientConnection]:
    async with dialer() as made:
        connection = await made.dial(record)
        try:
            yield connection
        finally:
            connection.close()
            await asyncio.wait_for(connection.closed.wait(), 1.0)


async def dial_error(record: PeerRecord, *, connect_timeout_s: float = 2.0) -> PeerError:
    """The error of a dial, which names the peer in one line."""
    async with dialer(connect_timeout_s=connect_timeout_s) as made:
        with pytest.raises(PeerError) as caught:
            await made.dial(record)
    assert caught.value.peer_id == record.peer_id
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"cannot reach peer '{short_id(record.peer_id)}' at {record.addresses[0]}: ")
    return caught.value


async def echo(connection: ClientConnection, tensor: torch.Tensor) -> torch.Tensor:
    metas, body = encode_tensors({"hidden_states": tensor})
    message = ForwardRequest(connection.new_request_id(), 0, 4, metas, 5.0)
    return (await connection.request(message, body, timeout_s=5.0))[1]["hidden_states"]


async def get(address: str, path: str, *, headers: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Status, content type and body."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}{path}", headers=headers) as answer,
    ):
        return answer.status, answer.content_type, await answer.text()


# -------------------------------------------------------------------------------- dialling a peer


@pytest.mark.parametrize("certificate", [None, CERTIFICATE], ids=["plain", "tls"])
@pytest.mark.parametrize("num_bytes", [1, 3_000_000])
def test_dialled_peer_answers_requests(run: Run, certificate: Certificate | None, num_bytes: int) -> None:
    async def main() -> None:
        tensor = torch.arange(num_bytes, dtype=torch.int64).to(torch.uint8)
        async with listening(EchoPeer(certificate=certificate)) as peer:
            pin = None if certificate is None else certificate.sha256
            async with dialled(record_of(peer.address, pin=pin)) as connection:
                for _ in range(2):
                    assert torch.equal(await echo(connection, tensor), tensor)
                gc.collect()  # the connection must not hang on an object that nobody holds
                assert torch.equal(await echo(connection, tensor), tensor)
                assert connection.bytes_sent >= 3 * num_bytes
            await until(lambda: peer.num_open == 0)

    run(main)


def test_one_dialer_holds_many_connections(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer, dialer() as made:
            connections = [await made.dial(record_of(peer.address)) for _ in range(5)]
            tensors = [torch.full((3,), float(number)) for number in range(5)]
            answers = await asyncio.gather(*map(echo, connections, tensors))
            assert all(map(torch.equal, answers, tensors))
            connections[0].abort()
            await until(lambda: peer.num_open == 4)
            assert torch.equal(await echo(connections[1], tensors[1]), tensors[1])
            await made.aclose()
            await until(lambda: peer.num_open == 0)

    run(main)


def test_second_address_is_dialled_when_the_first_is_dead(run: Run) -> None:
    async def main() -> None:
        async with (
            listening(EchoPeer()) as peer,
            dialled(record_of(DEAD_ADDRESS, peer.address)) as connection,
        ):
            assert torch.equal(await echo(connection, torch.zeros(3)), torch.zeros(3))

    run(main)


def test_all_addresses_dead_error_names_each(run: Run) -> None:
    async def main() -> None:
        error = await dial_error(record_of(DEAD_ADDRESS, "127.0.0.1:2"))
        assert isinstance(error, PeerUnreachable)
        assert "; 127.0.0.1:2: " in str(error)

    run(main)


def test_connection_lost_with_the_peer_fails_requests(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer, dialer() as made:
            connection = await made.dial(record_of(peer.address))
            peer.accepted[0].abort()
            with pytest.raises(PeerUnreachable, match="is lost"):
                await echo(connection, torch.zeros(3))
            await asyncio.wait_for(connection.closed.wait(), 1.0)

    run(main)


# -------------------------------------------------------------------------------- the wrong peer


def test_another_peer_at_the_address_is_refused_naming_both(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer(identity=STRANGER)) as peer:
            error = await dial_error(record_of(peer.address))
            expected, found = short_id(SERVER.peer_id), short_id(STRANGER.peer_id)
            assert str(error).endswith(f"is lost: expected peer '{expected}', found '{found}'")
            await until(lambda: peer.num_open == 0)

    run(main)


NOT_THE_ONE = "its TLS certificate is not the one that its record names"
NO_PIN = "its record names no SHA-256 of a certificate"
PINS: dict[str, tuple[Certificate | None, str | None, str]] = {
    "other-certificate": (CERTIFICATE, OTHER_CERTIFICATE.sha256, NOT_THE_ONE),
    "tls-peer-dialled-without-pin": (
        CERTIFICATE,
        None,
        "hung up instead of an upgrade, and to a WebSocket: Server disconnected",
    ),
    "plain-peer-dialled-with-pin": (None, CERTIFICATE.sha256, "[SSL"),
    "pin-that-is-no-hex": (CERTIFICATE, "z" * 64, NO_PIN),
    "pin-of-the-wrong-length": (CERTIFICATE, "00", NO_PIN),
    "pin-of-a-broken-hash": (CERTIFICATE, "0" * 40, NO_PIN),
    "empty-pin": (CERTIFICATE, "", NO_PIN),
}


@pytest.mark.parametrize(("certificate", "pin", "text"), PINS.values(), ids=PINS.keys())
def test_certificate_that_is_not_the_pinned_one_is_unreachable(
    run: Run, certificate: Certificate | None, pin: str | None, text: str
) -> None:
    async def main() -> None:
        async with listening(EchoPeer(certificate=certificate)) as peer:
            error = await dial_error(record_of(peer.address, pin=pin))
            assert isinstance(error, PeerUnreachable)
            assert f" at {peer.address}: {text}" in str(error)
            assert peer.accepted == []  # no request was made

    run(main)


def test_machine_in_the_middle_with_the_pinned_certificate_of_another_channel_is_refused(run: Run) -> None:
    async def main() -> None:
        peer = EchoPeer(certificate=CERTIFICATE)
        peer._certificate_sha256 = OTHER_CERTIFICATE.sha256  # it passes on a hello that the true peer signed elsewhere
        async with listening(peer):
            error = await dial_error(record_of(peer.address, pin=CERTIFICATE.sha256))
            assert str(error).endswith("signature of the hello does not fit its key")

    run(main)


def says(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)

    return answer


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def stays_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def upgrades_and_stays_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(SWITCHING)
    await reader.read()


SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: remote-modules/1\r\n\r\n"
STRANGERS: dict[str, tuple[Answer, str]] = {
    "web-server": (says(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "answered 404 instead of an upgrade"),
    "page": (says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), "answered 200 instead of an upgrade"),
    "endless-page": (says(b"HTTP/1.1 200 OK\r\n\r\nhello"), "answered 200 instead of an upgrade"),
    "redirect": (
        says(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
        "answered 302 instead of an upgrade",
    ),
    "ssh": (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "b'SSH-2.0-OpenSSH_9.6'"),
    "hangs-up": (hangs_up, ""),
    "upgrades-and-hangs-up": (says(SWITCHING), "is lost"),
    "upgrades-to-something-else": (says(SWITCHING + b"hello, what can I do for you?\r\n"), ""),
}


@pytest.mark.parametrize(("answer", "text"), STRANGERS.values(), ids=STRANGERS.keys())
def test_stranger_on_the_port_is_unreachable_in_one_line(run: Run, answer: Answer, text: str) -> None:
    async def main() -> None:
        async with stranger(answer) as address:
            error = await dial_error(record_of(address), connect_timeout_s=1.0)
            assert text in str(error)
            assert isinstance(error, PeerUnreachable)

    run(main)


@pytest.mark.parametrize("answer", [stays_silent, upgrades_and_stays_silent], ids=lambda answer: answer.__name__)
def test_silent_stranger_is_a_timeout_and_its_socket_is_closed(run: Run, answer: Answer) -> None:
    async def main() -> None:
        async with stranger(answer) as address:
            error = await dial_error(record_of(address), connect_timeout_s=0.1)
            assert isinstance(error, PeerTimeout)
            assert str(error).endswith(f"at {address}: no answer within 0.1 s")

    run(main)


# -------------------------------------------------------------------------------- the other pages of the port


@pytest.mark.parametrize("headers", [{}, {"Upgrade": "websocket", "Connection": "Upgrade"}], ids=["none", "websocket"])
def test_connect_without_our_upgrade_is_told_what_is_expected(run: Run, headers: dict[str, str]) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer:
            status, _, text = await get(peer.address, "/api/v1/connect", headers=headers)
            assert (status, text) == (426, "upgrade to remote-modules/1 expected\n")
            assert peer.accepted == []

    run(main)


def test_record_is_shown_once_there_is_one(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer:
            assert (await get(peer.address, "/api/v1/record"))[:2] == (503, "application/json")
            peer.signed = SERVER.sign_record(record_of(peer.address))
            status, kind, text = await get(peer.address, "/api/v1/record")
            assert (status, kind) == (200, "application/json")
            assert verify_record(msgspec.json.decode(text, type=SignedRecord)) == record_of(peer.address)

    run(main)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/health", (200, "text/plain", "ok\n")),
        ("/metrics", (200, "text/plain", "load 0\n")),
        ("/", (404, "text/plain", "404: Not Found")),
    ],
)
def test_page_is_shown(run: Run, path: str, expected: tuple[int, str, str]) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer:
            assert await get(peer.address, path) == expected

    run(main)


# -------------------------------------------------------------------------------- limits and ends


def test_too_many_connections_are_refused_until_one_ends(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer(max_connections=1)) as peer:
            async with dialled(record_of(peer.address)):
                error = await dial_error(record_of(peer.address))
                assert str(error).endswith("answered 503 instead of an upgrade")
            await until(lambda: peer.num_open == 0)
            async with dialled(record_of(peer.address)):
                pass

    run(main)


def test_client_that_resets_at_once_holds_no_connection(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listening(EchoPeer(max_connections=1000)) as peer:
            for _ in range(20):
                client = socket.create_connection(("127.0.0.1", peer.port))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(
                    b"GET /api/v1/connect HTTP/1.1\r\nHost: peer\r\n"
                    b"Connection: Upgrade\r\nUpgrade: remote-modules/1\r\n\r\n"
                )
                client.close()
            async with dialled(record_of(peer.address)):
                await until(lambda: peer.num_open == 1)

    run(main)
    assert caplog.records == []  # it happens all the time: nothing for a person to look at


def test_closed_site_drops_its_connections_and_listens_no_more(run: Run) -> None:
    async def main() -> None:
        peer = EchoPeer()
        async with listening(peer), dialer() as made:
            connection = await made.dial(record_of(peer.address))
            for end in peer.accepted:
                end.abort()
            await peer.site.aclose()
            await peer.site.aclose()
            await asyncio.wait_for(connection.closed.wait(), 1.0)
            await dial_error(record_of(peer.address))

    run(main)


def test_port_in_use_is_an_error_that_says_what_to_do(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer:
            site = PeerSite(
                host="127.0.0.1",
                port=peer.port,
                certificate=None,
                record=lambda: None,
                metrics=lambda: b"",
                accept=lambda: None,
            )
            with pytest.raises(RemoteModulesError) as caught:
                await site.start()
            text = str(caught.value)
            assert text.startswith(f"cannot listen on 127.0.0.1:{peer.port}: ")
            assert text.endswith("address already in use; choose another --port (0: any free one)")
            assert "\n" not in text
            async with dialled(record_of(peer.address)):
                pass

    run(main)


def test_host_that_is_not_ours_is_an_error(run: Run) -> None:
    async def main() -> None:
        site = PeerSite(
            host="192.0.2.1",
            port=0,
            certificate=None,
            record=lambda: None,
            metrics=lambda: b"",
            accept=lambda: None,
        )
        with pytest.raises(RemoteModulesError, match=r"^cannot listen on 192\.0\.2\.1:0: "):
            await site.start()

    run(main)


def test_site_and_dialer_never_used_can_be_closed(run: Run) -> None:
    async def main() -> None:
        await EchoPeer().site.aclose()
        async with dialer():
            pass

    run(main)
