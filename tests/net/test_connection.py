from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Callable
from typing import cast

import msgspec
import pytest
import torch

from remote_modules.errors import (
    LocalProtocolError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalReason,
    RemoteProtocolError,
)
from remote_modules.identity import Identity
from remote_modules.net.client_connection import ClientConnection, Reply
from remote_modules.net.connection import (
    IDLE_CHECK_S,
    IDLE_DEAD_S,
    IDLE_PING_S,
    KEEPALIVE_INTERVAL_S,
    KEEPALIVE_PROBES,
    KEEPALIVE_S,
    SLICE_BYTES,
    USER_TIMEOUT_S,
)
from remote_modules.peers import short_id
from remote_modules.testing.virtual_time import VirtualLoop, run_virtual
from remote_modules.wire import messages
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import Output, TensorMeta, encode_message
from remote_modules.wire.protocol import Role
from remote_modules.wire.tensors import encode_tensors

from .memory import (
    MAX_BODY_BYTES,
    SERVER,
    MemoryTransport,
    PlainEnd,
    RawEnd,
    client_connection,
    client_hello,
    join,
    turns,
    until,
)

STRANGER = Identity.from_seed(b"x" * 32)
SERVER_ID = short_id(SERVER.peer_id)


class Pair:
    """A client's connection to a plain server, hello done."""

    def __init__(self, *, silence_timeout_s: float = 60.0) -> None:
        self.client = client_connection(silence_timeout_s=silence_timeout_s)
        self.server = PlainEnd(Role.SERVER)
        self.ours, self.theirs = join(self.client, self.server)

    async def greeted(self) -> Pair:
        handshake = asyncio.create_task(self.client.handshake(2.0))
        self.server.greet(await self.server.message(messages.ClientHello))
        await handshake
        return self

    def request(self, *, timeout_s: float = 5.0) -> asyncio.Task[Reply]:
        return asyncio.create_task(request(self.client, timeout_s=timeout_s))


async def request(client: ClientConnection, *, timeout_s: float = 5.0, tensor: torch.Tensor | None = None) -> Reply:
    metas, body = encode_tensors({} if tensor is None else {"hidden_states": tensor})
    message = messages.ForwardRequest(client.new_request_id(), 0, 4, metas, timeout_s)
    return await client.request(message, body, timeout_s=timeout_s)


def output(request_id: int, *, load: int = 0) -> Output:
    return Output(request_id, (), 0.25, 0.5, load)


async def failure_of(task: asyncio.Task[Reply]) -> PeerError:
    with pytest.raises(PeerError) as caught:
        await task
    assert caught.value.peer_id == SERVER.peer_id
    return caught.value


# -------------------------------------------------------------------------------- hello


def test_hello_tells_each_side_of_the_other() -> None:
    async def main() -> None:
        pair = Pair()
        handshake = asyncio.create_task(pair.client.handshake(2.0))
        hello = await pair.server.message(messages.ClientHello)
        assert hello == client_hello()
        pair.server.greet(hello, max_body_bytes=1234)
        await handshake
        assert pair.client.is_open
        assert pair.client.max_peer_body_bytes == 1234
        assert pair.server.max_peer_body_bytes == MAX_BODY_BYTES
        assert pair.client.rtt_s is not None
        assert 0.0 <= pair.client.rtt_s < 1.0

    asyncio.run(main())


def wrong_identity(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.greet(hello, STRANGER)


def forged_signature(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.greet(hello, public_key=SERVER.public_key, signature=bytes(64))


def borrowed_signature(server: PlainEnd, hello: messages.ClientHello) -> None:
    """What a machine in the middle has: the true peer's signature for the certificate of another channel."""
    server.greet(hello, signature=SERVER.sign_hello(nonce=hello.nonce, certificate_sha256="0" * 64))


def old_signature(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.greet(hello, signature=SERVER.sign_hello(nonce=b"o" * 32, certificate_sha256=""))


def other_version(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.greet(hello, major=2)


def rejection(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.send(messages.Reject("too old"))


def hang_up(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.close()


def reset(server: PlainEnd, hello: messages.ClientHello) -> None:
    server.abort()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (wrong_identity, f": expected peer '{SERVER_ID}', found '{short_id(STRANGER.peer_id)}'"),
        (forged_signature, ": signature of the hello does not fit its key"),
        (borrowed_signature, ": signature of the hello does not fit its key"),
        (old_signature, ": signature of the hello does not fit its key"),
        (other_version, ": peer speaks protocol 2.0, we speak 1.5; update the older side"),
        (rejection, ": connection rejected: too old"),
        (hang_up, ""),
        (reset, ": connection reset by peer"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_hello_goes_wrong_peer_is_unreachable(
    answer: Callable[[PlainEnd, messages.ClientHello], None], text: str
) -> None:
    async def main() -> None:
        pair = Pair()
        handshake = asyncio.create_task(pair.client.handshake(2.0))
        answer(pair.server, await pair.server.message(messages.ClientHello))
        with pytest.raises(PeerUnreachable) as caught:
            await handshake
        assert str(caught.value) == f"connection to peer '{SERVER_ID}' is lost{text}"
        await turns()
        assert pair.client.closed.is_set()
        assert pair.server.closed.is_set()

    asyncio.run(main())


def test_silent_stranger_is_given_up_after_the_timeout() -> None:
    async def main() -> None:
        client, stranger = client_connection(), RawEnd()
        join(client, stranger)
        with pytest.raises(PeerTimeout, match=rf"^peer '{SERVER_ID}' did not say hello within 0.0 s$"):
            await client.handshake(0.02)
        await turns()
        assert client.closed.is_set()
        assert stranger.closed.is_set()

    asyncio.run(main())


def test_abandoned_handshake_closes_the_connection() -> None:
    async def main() -> None:
        client, stranger = client_connection(), RawEnd()
        join(client, stranger)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.handshake(5.0), 0.02)
        await turns()
        assert client.closed.is_set()
        assert stranger.closed.is_set()

    asyncio.run(main())


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100), b"RM\x02" + bytes(30)], ids=str)
def test_stranger_that_speaks_something_else_is_unreachable(data: bytes) -> None:
    async def main() -> None:
        client, stranger = client_connection(), RawEnd()
        join(client, stranger)
        handshake = asyncio.create_task(client.handshake(2.0))
        stranger.send(data)
        with pytest.raises(PeerUnreachable, match="expected a frame, got bytes that start with"):
            await handshake

    asyncio.run(main())


# -------------------------------------------------------------------------------- requests


def test_answers_in_any_order_reach_their_requests() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        tasks = [pair.request() for _ in range(3)]
        ids = [(await pair.server.message(messages.ForwardRequest)).request_id for _ in tasks]
        assert ids == [1, 2, 3]
        for request_id in (2, 3, 1):
            metas, body = encode_tensors({"hidden_states": torch.full((1, 2), float(request_id))})
            answer = msgspec.structs.replace(output(request_id, load=request_id), tensors=metas)
            pair.server.send(answer, body)
        for request_id, task in zip(ids, tasks, strict=True):
            answer, tensors = await task
            assert (answer.request_id, answer.queue_s, answer.compute_s) == (request_id, 0.25, 0.5)
            assert torch.equal(tensors["hidden_states"], torch.full((1, 2), float(request_id)))
        assert pair.client.load in (1, 2, 3)

    asyncio.run(main())


@pytest.mark.parametrize("reason", list(RefusalReason))
@pytest.mark.parametrize(("hint_s", "expected_s"), [(0.0, None), (1.5, 1.5)])
def test_refusal_becomes_an_error_with_its_reason(
    reason: RefusalReason, hint_s: float, expected_s: float | None
) -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        task = pair.request()
        pair.server.send(
            messages.Refused((await pair.server.message(messages.ForwardRequest)).request_id, reason, "no room", hint_s)
        )
        error = await failure_of(task)
        assert isinstance(error, PeerRefused)
        assert (error.reason, error.retry_after_s) == (reason, expected_s)
        assert str(error) == f"peer '{SERVER_ID}' refused: no room"
        assert pair.client.is_open

    asyncio.run(main())


def test_request_that_times_out_is_cancelled_and_its_late_answer_ignored() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        error = await failure_of(pair.request(timeout_s=0.02))
        assert isinstance(error, PeerTimeout)
        assert str(error) == f"peer '{SERVER_ID}' did not answer a forward of blocks 0:4 within 0.0 s"
        late = (await pair.server.message(messages.ForwardRequest)).request_id
        assert await pair.server.message(messages.Cancel) == messages.Cancel(late)
        task = pair.request()
        on_time = (await pair.server.message(messages.ForwardRequest)).request_id
        pair.server.send(output(late))
        pair.server.send(messages.Refused(late, RefusalReason.BUSY, "late too"))
        pair.server.send(output(12345))
        pair.server.send(output(on_time))
        assert (await task)[0].request_id == on_time
        await turns()
        assert pair.server.messages_so_far() == []

    asyncio.run(main())


def test_abandoned_request_is_cancelled() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        task = pair.request()
        request_id = (await pair.server.message(messages.ForwardRequest)).request_id
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pair.server.message(messages.Cancel) == messages.Cancel(request_id)

    asyncio.run(main())


def test_answered_request_is_not_cancelled() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        task = pair.request()
        pair.server.send(output((await pair.server.message(messages.ForwardRequest)).request_id))
        await task
        await turns()
        assert pair.server.messages_so_far() == []

    asyncio.run(main())


def test_answer_whose_tensors_do_not_decode_ends_the_connection() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        task = pair.request()
        request_id = (await pair.server.message(messages.ForwardRequest)).request_id
        metas = (TensorMeta("hidden_states", "float32", (2**20, 2**20)),)
        pair.server.send(Output(request_id, metas, 0.0, 0.0), [bytes(64)])
        error = await failure_of(task)
        assert isinstance(error, PeerUnreachable)
        assert str(error).endswith("is lost: tensors claim 4398046511104 bytes, the body has 64 bytes")
        await turns()
        assert pair.server.closed.is_set()

    asyncio.run(main())


def test_request_larger_than_the_peer_takes_is_our_own_error() -> None:
    async def main() -> None:
        pair = Pair()
        handshake = asyncio.create_task(pair.client.handshake(2.0))
        pair.server.greet(await pair.server.message(messages.ClientHello), max_body_bytes=64)
        await handshake
        with pytest.raises(LocalProtocolError, match="exceeds the other side's limit of 64 bytes"):
            await request(pair.client, tensor=torch.zeros(1, 17))
        task = asyncio.create_task(request(pair.client, tensor=torch.zeros(1, 16)))
        pair.server.send(output((await pair.server.message(messages.ForwardRequest)).request_id))
        await task

    asyncio.run(main())


# -------------------------------------------------------------------------------- the end


def end_of_stream(pair: Pair) -> None:
    pair.theirs.close()


def reset_by_peer(pair: Pair) -> None:
    pair.theirs.abort()


def end_within_a_frame(pair: Pair) -> None:
    pair.theirs.write(b"RM\x01")
    pair.theirs.close()


def garbage(pair: Pair) -> None:
    pair.theirs.write(bytes(24))


def own_abort(pair: Pair) -> None:
    pair.client.abort()


def own_close(pair: Pair) -> None:
    pair.client.close()


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (end_of_stream, ""),
        (reset_by_peer, ": connection reset by peer"),
        (end_within_a_frame, ": stream ended in the middle of a frame"),
        (garbage, r": expected a frame, got bytes that start with b'\x00\x00\x00'"),
        (own_abort, ""),
        (own_close, ""),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_lost_connection_fails_all_pending_requests(end: Callable[[Pair], None], text: str) -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        tasks = [pair.request() for _ in range(3)]
        await pair.server.message(messages.ForwardRequest)
        end(pair)
        for task in tasks:
            error = await failure_of(task)
            assert isinstance(error, PeerUnreachable)
            assert str(error) == f"connection to peer '{SERVER_ID}' is lost{text}"
        assert not pair.client.is_open
        error = await failure_of(pair.request())
        assert str(error) == f"connection to peer '{SERVER_ID}' is lost"

    asyncio.run(main())


def test_message_sent_when_the_stream_has_just_ended_is_lost_silently() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        for protocol in (pair.client, pair.server):
            protocol.eof_received()
        pair.ours.close()
        pair.theirs.close()
        pair.client.send(messages.Ping(1))
        pair.server.send(messages.Draining())
        await turns()
        pair.client.send(messages.Ping(1))
        pair.server.send(messages.Draining())

    asyncio.run(main())


def test_reason_of_an_abort_is_told_once() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        first, second = RemoteProtocolError("first"), RemoteProtocolError("second")
        told: list[Exception | None] = []
        pair.server.on_close(told.append)
        pair.server.abort(first)
        pair.server.abort(second)
        await turns()
        pair.server.connection_lost(second)
        assert pair.server.lost_reasons == [first]
        assert told == [None]  # whoever had the transport before knows that it is gone

    asyncio.run(main())


def test_connection_never_made_can_be_closed_and_aborted() -> None:
    async def main() -> None:
        end = PlainEnd(Role.CLIENT)
        end.send(messages.Ping(1))
        end.close()
        end.abort()
        assert not end.is_open

    asyncio.run(main())


# -------------------------------------------------------------------------------- liveness


def test_silent_peer_is_declared_dead_after_the_silence_timeout() -> None:
    async def main() -> None:
        pair = await Pair(silence_timeout_s=0.1).greeted()
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        tasks = [pair.request() for _ in range(2)]
        for task in tasks:
            error = await failure_of(task)
            assert isinstance(error, PeerTimeout)
            assert str(error) == f"peer '{SERVER_ID}' gives no sign of life"
        assert 0.1 <= loop.time() - started_s < 1.0
        await turns()
        assert pair.server.closed.is_set()
        kinds = [type(message) for message in pair.server.messages_so_far()]
        assert kinds[:2] == [messages.ForwardRequest] * 2
        assert set(kinds[2:]) == {messages.Ping}

    asyncio.run(main())


def has_rtt(client: ClientConnection) -> bool:
    return client.rtt_s is not None


def test_peer_that_answers_pings_is_alive_however_long_it_computes() -> None:
    async def main() -> None:
        pair = await Pair(silence_timeout_s=0.4).greeted()
        pair.client.rtt_s = None
        task = pair.request(timeout_s=5.0)
        request_id = (await pair.server.message(messages.ForwardRequest)).request_id
        for _ in range(5):  # 0.5 s in all
            ping = await pair.server.message(messages.Ping)
            assert not task.done()
            pair.server.send(messages.Pong(ping.nonce, load=7))
        await turns()
        assert pair.client.load == 7
        assert has_rtt(pair.client)  # measured anew, by a ping
        pair.server.send(output(request_id))
        await task

    asyncio.run(main())


def test_bytes_that_trickle_in_are_a_sign_of_life() -> None:
    async def main() -> None:
        pair = await Pair(silence_timeout_s=0.4).greeted()
        task = pair.request()
        request_id = (await pair.server.message(messages.ForwardRequest)).request_id
        metas, body = encode_tensors({"hidden_states": torch.zeros(100)})
        frame = b"".join(encode_frame(encode_message(Output(request_id, metas, 0.0, 0.0)), body))
        for start in range(0, len(frame), len(frame) // 4):  # 0.5 s in all
            await pair.server.message(messages.Ping)
            pair.theirs.write(frame[start : start + len(frame) // 4])
        assert (await task)[1]["hidden_states"].shape == (100,)

    asyncio.run(main())


def test_nothing_awaited_nobody_pings_and_nobody_dies() -> None:
    async def main() -> None:
        pair = await Pair(silence_timeout_s=0.2).greeted()
        task = pair.request()
        pair.server.send(output((await pair.server.message(messages.ForwardRequest)).request_id))
        await task
        with pytest.raises(asyncio.TimeoutError):
            await pair.server.event(within_s=0.25)
        assert pair.client.is_open
        task = pair.request()  # the silence so far does not count
        pair.server.send(output((await pair.server.message(messages.ForwardRequest)).request_id))
        await task

    asyncio.run(main())


def test_peer_that_is_asked_for_a_sign_of_life_gives_it() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        pair.client.rtt_s = None
        pings = [asyncio.create_task(pair.client.ping()) for _ in range(2)]
        for _ in pings:
            await pair.server.message(messages.Ping)
        pair.server.send(messages.Pong(0, load=3))
        await asyncio.gather(*pings)
        assert pair.client.load == 3
        assert has_rtt(pair.client)

    asyncio.run(main())


def test_peer_that_gives_no_sign_of_life_when_asked_is_given_up() -> None:
    async def main() -> None:
        pair = await Pair(silence_timeout_s=0.1).greeted()
        with pytest.raises(PeerTimeout, match="gives no sign of life"):
            await pair.client.ping()
        assert not pair.client.is_open
        with pytest.raises(PeerUnreachable):
            await pair.client.ping()

    asyncio.run(main())


def test_sign_of_life_that_nobody_waits_for_any_more_ends_the_pings() -> None:
    async def main() -> None:
        pair = await Pair(silence_timeout_s=0.2).greeted()
        asked = asyncio.create_task(pair.client.ping())
        await pair.server.message(messages.Ping)
        asked.cancel()
        with pytest.raises(asyncio.TimeoutError):
            await pair.server.event(within_s=0.25)
        assert pair.client.is_open

    asyncio.run(main())


def test_connection_is_lost_while_a_sign_of_life_is_awaited() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        asked = asyncio.create_task(pair.client.ping())
        await pair.server.message(messages.Ping)
        pair.server.abort()
        with pytest.raises(PeerUnreachable):
            await asked

    asyncio.run(main())


def test_ping_is_answered_at_once() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        pair.server.send(messages.Ping(77))
        assert await pair.server.message(messages.Pong) == messages.Pong(77)

    asyncio.run(main())


def test_leaving_peer_says_so() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        assert not pair.client.is_draining
        pair.server.send(messages.Draining())
        await until(lambda: pair.client.is_draining)
        assert pair.client.is_open

    asyncio.run(main())


# -------------------------------------------------------------------------------- bulk


def random_tensor(num_bytes: int, *, seed: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(num_bytes)), dtype=torch.uint8)


def largest_write(transport: MemoryTransport) -> int:
    return max(transport.writes)


@pytest.mark.parametrize("num_bytes", [1, SLICE_BYTES - 1, SLICE_BYTES, SLICE_BYTES + 1, 3_000_000])
def test_bulk_is_sliced_and_arrives_intact(num_bytes: int) -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        tensor = random_tensor(num_bytes)
        task = asyncio.create_task(request(pair.client, tensor=tensor))
        event = await pair.server.event()
        assert bytes(event.body[:num_bytes]) == tensor.numpy().tobytes()
        assert largest_write(pair.ours) <= SLICE_BYTES
        assert isinstance(event.message, messages.ForwardRequest)
        metas, body = encode_tensors({"hidden_states": tensor})
        pair.server.send(Output(event.message.request_id, metas, 0.0, 0.0), body)
        assert torch.equal((await task)[1]["hidden_states"], tensor)
        assert largest_write(pair.theirs) <= SLICE_BYTES
        await turns()
        assert pair.client.bytes_sent == sum(pair.ours.writes) == pair.server.bytes_received
        assert pair.client.bytes_received == sum(pair.theirs.writes) == pair.server.bytes_sent

    asyncio.run(main())


def test_stuck_network_takes_no_more_than_a_slice_beyond_its_limit() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        pair.ours.is_stalled = True
        tensors = [random_tensor(1_000_000, seed=seed) for seed in range(3)]
        tasks = [asyncio.create_task(request(pair.client, tensor=tensor)) for tensor in tensors]
        await turns()
        assert pair.ours.num_queued <= 2 * SLICE_BYTES
        pair.ours.resume()
        for tensor in tensors:
            event = await pair.server.event()
            assert bytes(event.body) == tensor.numpy().tobytes()
            assert isinstance(event.message, messages.ForwardRequest)
            pair.server.send(output(event.message.request_id))
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_messages_leave_in_the_order_of_sending() -> None:
    async def main() -> None:
        metas, body = encode_tensors({"hidden_states": random_tensor(1_000_000)})
        sent: list[messages.Message] = [
            messages.Output(1, (), 0.0, 0.0),
            messages.Output(2, metas, 0.0, 0.0),
            messages.Ping(3),
            messages.Output(4, metas, 0.0, 0.0),
            messages.Draining(),
        ]
        receiver, sender = PlainEnd(Role.CLIENT), PlainEnd(Role.SERVER)
        join(receiver, sender)
        receiver.send(client_hello())
        sender.greet(await sender.message(messages.ClientHello))
        await receiver.message(messages.ServerHello)
        for message in sent:
            sender.send(message, body if message in (sent[1], sent[3]) else None)
        assert [(await receiver.event()).message for _ in sent] == sent

    asyncio.run(main())


@pytest.mark.parametrize("num_bytes", [10, 2_000_000])
def test_close_lets_out_what_was_sent_before(num_bytes: int) -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        tensor = random_tensor(num_bytes)
        task = asyncio.create_task(request(pair.client, tensor=tensor))
        await asyncio.sleep(0)
        pair.client.close()
        assert not pair.client.is_open
        pair.client.send(messages.Ping(1))
        event = await pair.server.event()
        assert bytes(event.body[:num_bytes]) == tensor.numpy().tobytes()
        assert isinstance(await failure_of(task), PeerUnreachable)
        await turns()
        assert pair.server.lost_reasons == [None]
        assert pair.server.messages_so_far() == []

    asyncio.run(main())


def test_abort_drops_what_has_not_left() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        task = asyncio.create_task(request(pair.client, tensor=random_tensor(2_000_000)))
        await asyncio.sleep(0)
        pair.client.abort()
        assert isinstance(await failure_of(task), PeerUnreachable)
        assert pair.server.messages_so_far() == []
        await turns()
        assert pair.server.closed.is_set()

    asyncio.run(main())


# -------------------------------------------------------------------------------- a side that is gone or does not read


def test_silent_side_is_pinged_and_then_cut_off_by_both() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        began_s = asyncio.get_running_loop().time()
        await asyncio.sleep(IDLE_PING_S + IDLE_CHECK_S)
        assert messages.Ping(0) in pair.server.messages_so_far()
        assert pair.client.is_open
        pair.ours.is_stalled = pair.theirs.is_stalled = True
        await asyncio.wait_for(pair.server.closed.wait(), 60.0)
        await asyncio.wait_for(pair.client.closed.wait(), 60.0)
        assert asyncio.get_running_loop().time() - began_s <= IDLE_PING_S + IDLE_DEAD_S + 2 * IDLE_CHECK_S
        with pytest.raises(PeerUnreachable, match="is lost"):
            await request(pair.client)

    run_virtual(main())


def test_idle_sides_that_answer_stay_connected() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        for _ in range(200):  # the server of this test answers no ping by itself
            await asyncio.sleep(IDLE_PING_S)
            pair.server.send(messages.Pong(0))
        assert pair.client.is_open
        assert not pair.server.closed.is_set()

    run_virtual(main())


def test_loop_that_stood_still_blames_nobody() -> None:
    async def main() -> None:
        pair = await Pair().greeted()
        loop = cast("VirtualLoop", asyncio.get_running_loop())
        loop._virtual.now_s += 100.0  # as if something had blocked it
        await asyncio.sleep(0)
        await asyncio.sleep(IDLE_CHECK_S)
        assert pair.client.is_open

    run_virtual(main())


def test_connection_whose_other_side_does_not_read_is_cut_off() -> None:
    async def main() -> None:
        reader, sender = PlainEnd(Role.CLIENT), PlainEnd(Role.SERVER, max_unsent_bytes=4_000_000)
        _, theirs = join(reader, sender)
        reader.send(client_hello())
        sender.greet(await sender.message(messages.ClientHello))
        await reader.message(messages.ServerHello)
        theirs.is_stalled = True
        metas, body = encode_tensors({"hidden_states": random_tensor(1_000_000)})
        for number in range(4):
            sender.send(Output(number, metas, 0.0, 0.0), body)
        await turns()
        assert not sender.lost_reasons
        sender.send(Output(4, metas, 0.0, 0.0), body)
        await turns()
        (reason,) = sender.lost_reasons
        assert isinstance(reason, RemoteProtocolError)
        assert re.fullmatch(r"\d+ bytes wait to be read by the other side, limit 4000000", str(reason))

    asyncio.run(main())


async def _over_sockets() -> list[int]:
    """Options of the socket of a connection."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: PlainEnd(Role.SERVER), "127.0.0.1", 0)
    transport, _ = await loop.create_connection(lambda: PlainEnd(Role.CLIENT), *server.sockets[0].getsockname())
    sock = transport.get_extra_info("socket")
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    options = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
    options += [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    transport.abort()
    server.close()
    await server.wait_closed()
    return options


def test_kernel_notices_a_host_that_is_gone_without_a_word() -> None:
    expected = [1, KEEPALIVE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES, USER_TIMEOUT_S * 1000]
    assert asyncio.run(_over_sockets()) == expected
    assert KEEPALIVE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_PROBES <= 30
