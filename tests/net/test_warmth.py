from __future__ import annotations

import asyncio

import pytest
import torch

from remote_modules.net.client_connection import WARM_NONCE, ClientConnection
from remote_modules.net.warmth import INITIAL_WINDOW_BYTES, MAX_SESSIONS, MIN_RTT_S, TICK_S, Warmth
from remote_modules.testing.virtual_time import run_virtual
from remote_modules.wire import messages
from remote_modules.wire.messages import Output
from remote_modules.wire.protocol import MessageReceived, Role
from remote_modules.wire.tensors import encode_tensors

from .memory import PlainEnd, client_connection, join, turns

LIMIT_S = 60.0
LARGE = INITIAL_WINDOW_BYTES + 1
FAR_S = 0.1
SESSION_ID = "s" * 32


def used(num_bytes: int = LARGE, now_s: float = 0.0) -> Warmth:
    warmth = Warmth(LIMIT_S)
    warmth.use(SESSION_ID, num_bytes, now_s)
    return warmth


def test_large_step_is_followed_by_warmth_until_the_limit() -> None:
    warmth = used()
    assert warmth.is_wanted(LIMIT_S - 1, FAR_S)
    assert warmth.is_wanted(LIMIT_S - 1, None)
    assert not warmth.is_wanted(LIMIT_S, FAR_S)
    warmth.use(SESSION_ID, 1, LIMIT_S)  # the same session may send a large one again
    assert warmth.is_wanted(LIMIT_S + 1, FAR_S)


def test_what_fits_the_first_window_and_what_is_near_needs_no_warmth() -> None:
    assert not used(INITIAL_WINDOW_BYTES).is_wanted(0.0, FAR_S)
    assert not used().is_wanted(0.0, MIN_RTT_S / 2)
    assert not Warmth(LIMIT_S).is_wanted(0.0, FAR_S)
    never = Warmth(0.0)
    never.use(SESSION_ID, LARGE, 0.0)
    assert not never.is_wanted(0.0, FAR_S)


def test_warmth_ends_with_the_last_session() -> None:
    warmth = used()
    warmth.use("t" * 32, 1, 0.0)
    assert warmth.has_others(SESSION_ID)
    warmth.forget("t" * 32)
    assert not warmth.has_others(SESSION_ID)
    assert warmth.has_others("t" * 32)
    assert warmth.is_wanted(0.0, FAR_S)
    warmth.forget(SESSION_ID)
    warmth.forget(SESSION_ID)
    assert not warmth.is_wanted(0.0, FAR_S)


def test_sessions_are_remembered_up_to_a_cap() -> None:
    warmth = Warmth(LIMIT_S)
    for number in range(MAX_SESSIONS + 1):
        warmth.use(f"{number:032}", LARGE, 0.0)
    for number in range(1, MAX_SESSIONS + 1):
        assert warmth.is_wanted(0.0, FAR_S)
        warmth.forget(f"{number:032}")
    assert not warmth.is_wanted(0.0, FAR_S)


def test_silence_of_either_direction_counts() -> None:
    warmth = Warmth(LIMIT_S)
    assert not warmth.is_silent(1, 1)
    assert warmth.is_silent(2, 1)
    assert warmth.is_silent(2, 2)
    assert not warmth.is_silent(3, 3)


class EchoEnd(PlainEnd):
    """A peer that answers each step with what it got, and pings while it hears.

    Attributes:
        pinged_s: when pings came.
    """

    def __init__(self) -> None:
        super().__init__(Role.SERVER)
        self.pinged_s: list[float] = []
        self._on_message = self._answer

    def _answer(self, event: MessageReceived) -> None:
        message = event.message
        if isinstance(message, messages.ClientHello):
            self.greet(message)
        elif isinstance(message, messages.StepRequest):
            self.send(Output(message.request_id, message.tensors, 0.0, 0.0), [event.body])
        elif isinstance(message, messages.Ping):
            self.pinged_s.append(asyncio.get_running_loop().time())
            self.send(messages.Pong(message.nonce, 7))


async def far_pair(keep_warm_s: float = LIMIT_S) -> tuple[ClientConnection, EchoEnd]:
    client, server = client_connection(keep_warm_s=keep_warm_s), EchoEnd()
    join(client, server)
    await client.handshake(2.0)
    client.rtt_s = FAR_S
    return client, server


async def step(client: ClientConnection, num_bytes: int = LARGE) -> None:
    metas, body = encode_tensors({"hidden_states": torch.zeros(num_bytes, dtype=torch.uint8)})
    request_id = client.new_request_id()
    message = messages.StepRequest(request_id, SESSION_ID, request_id, 0, 1, 0, (), metas, 5.0)
    await client.request(message, body, timeout_s=5.0)


def test_silences_of_an_open_session_are_filled() -> None:
    async def main() -> None:
        client, server = await far_pair()
        await step(client)
        began_s = asyncio.get_running_loop().time()
        await asyncio.sleep(10.0)
        moments = [began_s, *server.pinged_s, began_s + 10.0]
        gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
        assert max(gaps) <= 2 * TICK_S + 1e-9
        assert client.load == 7
        assert client.rtt_s == FAR_S, "no round trip is measured by what fills a silence"

    run_virtual(main())


@pytest.mark.parametrize("end", ["limit", "session closed", "connection lost"])
def test_silences_are_left_alone_afterwards(end: str) -> None:
    async def main() -> None:
        client, server = await far_pair()
        await step(client)
        await asyncio.sleep(5.0)
        assert server.pinged_s
        if end == "limit":
            await asyncio.sleep(LIMIT_S)
        elif end == "session closed":
            client.close_session(SESSION_ID)
        else:
            client.abort()
        await asyncio.sleep(2 * TICK_S)
        num_pings = len(server.pinged_s)
        await asyncio.sleep(5.0)
        assert len(server.pinged_s) == num_pings
        if end == "limit":  # the next step begins it anew
            await step(client)
            await asyncio.sleep(5.0)
            assert len(server.pinged_s) > num_pings

    run_virtual(main())


@pytest.mark.parametrize(("num_bytes", "keep_warm_s"), [(64, LIMIT_S), (LARGE, 0.0)])
def test_small_steps_and_those_told_not_to_fill_no_silence(num_bytes: int, keep_warm_s: float) -> None:
    async def main() -> None:
        client, server = await far_pair(keep_warm_s)
        await step(client, num_bytes)
        await asyncio.sleep(5.0)
        assert not server.pinged_s

    run_virtual(main())


def test_steps_that_follow_each_other_send_no_pings() -> None:
    async def main() -> None:
        client, server = await far_pair()
        for _ in range(100):
            await step(client)
            await asyncio.sleep(TICK_S / 2)
        assert not server.pinged_s

    run_virtual(main())


def test_answer_to_a_filled_silence_is_no_answer_to_a_ping() -> None:
    async def main() -> None:
        client, server = await far_pair()
        server._on_message = server._events.put_nowait
        asked = asyncio.create_task(client.ping())
        await turns()
        server.send(messages.Pong(WARM_NONCE))
        await turns()
        assert not asked.done()
        server.send(messages.Pong(0))
        await asked

    run_virtual(main())
