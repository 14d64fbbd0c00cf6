"""Connections inside WebSockets, behind a proxy that refuses our upgrade."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest
import torch

from remote_modules.errors import PeerUnreachable
from remote_modules.net import http
from remote_modules.net.websocket import MAX_MESSAGE_BYTES

from .memory import until
from .test_http import CERTIFICATE, EchoPeer, Run, dial_error, dialer, echo, get, listening, record_of, run, stranger

__all__ = ["run"]  # the fixture

REFUSALS = (400, 426, 501, 502)


class Proxy:
    """Refuses upgrades to our protocol as it is told to; passes all else on to ``port``."""

    def __init__(self, port: int, refusal: int | None) -> None:
        self.address = ""
        self.num_refused = 0
        self.num_passed = 0
        self.passes_websockets = True
        self._port = port
        self._refusal = refusal
        self._passing: set[asyncio.StreamWriter] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        is_websocket = b"upgrade: websocket" in head.lower()
        if not is_websocket or not self.passes_websockets:
            self.num_refused += not is_websocket
            if self._refusal is not None:
                writer.write(b"HTTP/1.1 %d no\r\nContent-Length: 0\r\n\r\n" % self._refusal)
                await writer.drain()
            return
        self.num_passed += 1
        peer_reader, peer_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._passing = {writer, peer_writer}
        peer_writer.write(head)
        await asyncio.gather(pump(reader, peer_writer), pump(peer_reader, writer))

    def cut(self) -> None:
        """Break what is being passed."""
        assert self._passing
        for writer in self._passing:
            writer.transport.abort()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxied(peer: EchoPeer, refusal: int | None) -> AsyncIterator[Proxy]:
    proxy = Proxy(peer.port, refusal)
    async with stranger(proxy.answer) as proxy.address:
        yield proxy


@pytest.mark.parametrize("refusal", [*REFUSALS, None])
def test_peer_behind_a_proxy_is_reached_through_a_websocket_which_is_remembered(run: Run, refusal: int | None) -> None:
    async def main() -> None:
        tensor = torch.arange(3 * MAX_MESSAGE_BYTES + 5, dtype=torch.int64).to(torch.uint8)
        async with listening(EchoPeer()) as peer, proxied(peer, refusal) as proxy, dialer() as made:
            num_refused = 2 if refusal is None else 1  # aiohttp asks again where somebody hangs up
            for number in (1, 2):
                connection = await made.dial(record_of(proxy.address))
                assert (proxy.num_refused, proxy.num_passed) == (num_refused, number)
                for _ in range(2):
                    assert torch.equal(await echo(connection, tensor), tensor)
                assert torch.equal(await echo(connection, tensor[:3]), tensor[:3])
                connection.close()
                await asyncio.wait_for(connection.closed.wait(), 1.0)
            await until(lambda: peer.num_open == 0)

    run(main)


def test_websocket_is_bound_to_the_peers_certificate(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer(certificate=CERTIFICATE)) as peer, dialer() as made:
            record = record_of(peer.address, pin=CERTIFICATE.sha256)
            made._proxied[peer.address] = None
            connection = await made.dial(record)
            assert torch.equal(await echo(connection, torch.ones(3)), torch.ones(3))
            connection.abort()
            await until(lambda: peer.num_open == 0)

    run(main)


def test_many_requests_at_once_share_a_websocket(run: Run) -> None:
    async def main() -> None:
        tensors = [torch.full((MAX_MESSAGE_BYTES // 4 + number,), float(number)) for number in range(8)]
        async with listening(EchoPeer()) as peer, proxied(peer, 502) as proxy, dialer() as made:
            connection = await made.dial(record_of(proxy.address))
            answers = await asyncio.gather(*(echo(connection, tensor) for tensor in tensors))
            assert proxy.num_passed == 1
            assert all(map(torch.equal, answers, tensors))
            assert not connection.has_unsent
            connection.abort()
            await until(lambda: peer.num_open == 0)

    run(main)


def test_websocket_that_breaks_is_a_lost_connection_and_the_next_dial_reaches_the_peer(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer, proxied(peer, 426) as proxy, dialer() as made:
            connection = await made.dial(record_of(proxy.address))
            proxy.cut()
            await asyncio.wait_for(connection.closed.wait(), 2.0)
            assert not connection.is_open
            await until(lambda: peer.num_open == 0)
            again = await made.dial(record_of(proxy.address))
            assert torch.equal(await echo(again, torch.ones(3)), torch.ones(3))
            assert (proxy.num_refused, proxy.num_passed) == (1, 2)
            again.abort()
            await until(lambda: peer.num_open == 0)

    run(main)


def test_address_that_fails_is_tried_anew_with_an_upgrade(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer, dialer() as made:
            async with proxied(peer, 400) as proxy:
                (await made.dial(record_of(proxy.address))).abort()
                proxy.passes_websockets = False
                for num_refused, text in ((1, "answered 400"), (2, "answered 400 instead of an upgrade, and to a Web")):
                    with pytest.raises(PeerUnreachable, match=text):
                        await made.dial(record_of(proxy.address))
                    assert proxy.num_refused == num_refused
            await until(lambda: peer.num_open == 0)

    run(main)


def test_other_answers_are_no_reason_for_a_websocket(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer, proxied(peer, 403) as proxy:
            error = await dial_error(record_of(proxy.address))
            assert str(error).endswith("answered 403 instead of an upgrade")
            assert (proxy.num_refused, proxy.num_passed) == (1, 0)

    run(main)


def test_remembered_addresses_are_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_PROXIED", 2)

    async def main() -> None:
        async with listening(EchoPeer()) as peer, proxied(peer, 400) as proxy, dialer() as made:
            made._proxied.update({"a:1": None, "b:1": None})
            (await made.dial(record_of(proxy.address))).abort()
            assert list(made._proxied) == ["b:1", proxy.address]
            await until(lambda: peer.num_open == 0)

    run(main)


def test_route_refuses_what_is_no_websocket_and_more_than_it_has_room_for(run: Run) -> None:
    async def main() -> None:
        async with listening(EchoPeer(max_connections=0)) as peer:
            status, _, text = await get(peer.address, http.WEBSOCKET_PATH)
            assert (status, text) == (426, "upgrade to websocket expected\n")
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    await session.ws_connect(f"http://{peer.address}{http.WEBSOCKET_PATH}")
            assert caught.value.status == 503
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    await session.ws_connect(
                        f"http://{peer.address}{http.WEBSOCKET_PATH}", origin="http://evil.example"
                    )
            assert caught.value.status == 403

    run(main)


@pytest.mark.parametrize("data", ["text", b"x" * (MAX_MESSAGE_BYTES + 1), b"no frame" * 10])
def test_peer_hangs_up_on_what_is_no_frame_in_a_binary_message(run: Run, data: str | bytes) -> None:
    async def main() -> None:
        async with listening(EchoPeer()) as peer, aiohttp.ClientSession() as session:
            async with session.ws_connect(f"http://{peer.address}{http.WEBSOCKET_PATH}") as websocket:
                assert peer.num_open == 1
                await (websocket.send_str(data) if isinstance(data, str) else websocket.send_bytes(data))
                await until(lambda: peer.num_open == 0)
                message = await websocket.receive(timeout=2.0)
                assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.BINARY)

    run(main)
