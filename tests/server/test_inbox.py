"""Inputs that come apart from their steps: in any order, from anybody, and never more than there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.identity import Identity
from remote_modules.model.kv import SpanCache
from remote_modules.peers import PeerId
from remote_modules.server import inbox as module
from remote_modules.server.inbox import Inbox
from remote_modules.server.sessions import KVBudget, Session, SessionTable
from remote_modules.spans import Span
from remote_modules.wire.messages import Push, StepRequest
from remote_modules.wire.tensors import encode_tensors

from .peer_support import Clock

ME = PeerId("m" * 52)
SENDER = "s" * 52
CLIENT, OTHER = Identity.from_seed(b"c" * 32), Identity.from_seed(b"o" * 32)
SESSION_ID = "session-0123456789"
INPUT = {"hidden_states": torch.arange(8.0).reshape(1, 2, 4)}
NUM_BYTES = 64  # of it on the wire


class Setting:
    """An inbox, and the sessions of its peer."""

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.clock = Clock()
        self.sessions = SessionTable(KVBudget(1, {}), max_sessions=9, idle_s=60.0, orphan_s=60.0)
        names = ("hidden_states", "state.1")
        self.inbox = Inbox(self.sessions, peer_id=ME, names=names, max_bytes=max_bytes, clock=self.clock)

    def open(self, client_key: bytes = CLIENT.public_key) -> Session:
        session = Session(SESSION_ID, Span(0, 1), SpanCache.__new__(SpanCache), 1, 0.0, client_key=client_key)
        self.sessions.open(session)
        return session

    def put(self, *, step_id: int = 0, key: Identity = CLIENT, tensors: Any = None, **changes: Any) -> None:
        sender, session_id = changes.get("sender", SENDER), changes.get("session_id", SESSION_ID)
        metas, buffers = encode_tensors(INPUT if tensors is None else tensors)
        grant = key.sign_push(sender=sender, receiver=ME, session_id=session_id)
        push = Push(1, session_id, step_id, sender, grant, metas, 5.0)
        self.inbox.put(msgspec.structs.replace(push, **changes), bytearray(b"".join(buffers)))

    async def take(self, *, step_id: int = 0, client_key: bytes = CLIENT.public_key, timeout_s: float = 2.0) -> Any:
        return await self.inbox.take(request(step_id, client_key, timeout_s))


def request(step_id: int = 0, client_key: bytes = b"", timeout_s: float = 2.0) -> StepRequest:
    return StepRequest(
        1, SESSION_ID, step_id, 0, 1, 0, (), (), timeout_s, create=True, awaits_input=True, client_key=client_key
    )


def run(work: Callable[[Setting], Any], **settings: Any) -> None:
    async def whole() -> None:
        await work(Setting(**settings))

    asyncio.run(whole())


async def refused(work: Any, match: str, reason: RefusalReason = RefusalReason.BAD_REQUEST) -> None:
    with pytest.raises(PeerRefused, match=match) as caught:
        await work
    assert caught.value.reason is reason


@pytest.mark.parametrize("has_session", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_input_and_step_meet_in_any_order(has_session: bool, is_first: bool) -> None:
    async def work(setting: Setting) -> None:
        if has_session:
            setting.open()
        if is_first:
            setting.put()
        taking = asyncio.ensure_future(setting.take(client_key=b"" if has_session else CLIENT.public_key))
        await asyncio.sleep(0)
        if not is_first:
            assert not taking.done()
            setting.put()
        assert torch.equal((await taking)["hidden_states"], INPUT["hidden_states"])
        again = await setting.take()  # the step was refused for something else, and sent anew
        assert torch.equal(again["hidden_states"], INPUT["hidden_states"])
        setting.inbox.drop(request())
        assert setting.inbox.num_bytes == 0

    run(work)


def test_two_steps_that_wait_for_one_input_both_get_it() -> None:
    async def work(setting: Setting) -> None:
        taking = [asyncio.ensure_future(setting.take()) for _ in range(2)]
        await asyncio.sleep(0)
        setting.put()
        assert len(await asyncio.gather(*taking)) == 2

    run(work)


def test_second_input_is_ignored() -> None:
    async def work(setting: Setting) -> None:
        session = setting.open()
        setting.put()
        setting.put(tensors={"hidden_states": torch.zeros(1, 2, 4)})
        assert torch.equal((await setting.take())["hidden_states"], INPUT["hidden_states"])
        setting.inbox.drop(request())
        session.last_step_id = 0
        setting.put()  # for a step that is done
        assert setting.inbox.num_bytes == 0

    run(work)


GRANT = CLIENT.sign_push(sender=SENDER, receiver=ME, session_id=SESSION_ID)


@pytest.mark.parametrize(
    "changes",
    [{"key": OTHER}, {"grant": b""}, {"sender": "t" * 52, "grant": GRANT}],
    ids=["another-client", "no-grant", "another-sender"],
)
@pytest.mark.parametrize("is_waiting", [False, True])
def test_input_without_the_clients_grant_is_refused(changes: dict[str, Any], is_waiting: bool) -> None:
    async def work(setting: Setting) -> None:
        setting.open()
        taking = asyncio.ensure_future(setting.take()) if is_waiting else None
        await asyncio.sleep(0)
        with pytest.raises(PeerRefused, match="the client of this session did not grant that"):
            setting.put(**changes)
        assert setting.inbox.num_bytes == 0
        setting.put()  # the right one still counts
        assert await (taking or setting.take())

    run(work)


def test_input_that_came_before_its_session_is_checked_when_the_step_comes() -> None:
    async def work(setting: Setting) -> None:
        setting.put(key=OTHER)  # nobody knows yet whose session that is
        taking = asyncio.ensure_future(setting.take())
        await asyncio.sleep(0)
        assert not taking.done()
        assert setting.inbox.num_bytes == 0
        setting.put(sender="")  # the client itself
        assert torch.equal((await taking)["hidden_states"], INPUT["hidden_states"])

    run(work)


def test_step_needs_one_key_of_its_client() -> None:
    async def work(setting: Setting) -> None:
        await refused(setting.take(client_key=b""), "must bring the client_key")
        setting.open()
        await refused(setting.take(client_key=OTHER.public_key), "another client_key")

    run(work)


def test_step_whose_input_does_not_come_is_refused() -> None:
    async def work(setting: Setting) -> None:
        await refused(setting.take(timeout_s=0.01), r"did not come within 0\.0 s", RefusalReason.BUSY)
        assert setting.inbox._waiting == {}

    run(work)


def test_step_that_nobody_awaits_any_more_leaves_nothing() -> None:
    async def work(setting: Setting) -> None:
        taking = asyncio.ensure_future(setting.take())
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([taking])
        assert setting.inbox._waiting == {}

    run(work)


def test_tensors_of_other_names_are_refused() -> None:
    async def work(setting: Setting) -> None:
        with pytest.raises(PeerRefused, match="'attention_mask' does not go from block to block"):
            setting.put(tensors={**INPUT, "attention_mask": torch.ones(1, 2)})

    run(work)


def test_inputs_are_kept_for_a_while_only() -> None:
    async def work(setting: Setting) -> None:
        setting.put()
        setting.open()
        setting.put(step_id=1)
        setting.put(step_id=2, timeout_s=1e4)
        setting.inbox.expire()
        assert setting.inbox.num_bytes == 3 * NUM_BYTES
        setting.clock.now_s += 5.0
        setting.inbox.expire()
        assert setting.inbox.num_bytes == NUM_BYTES
        setting.clock.now_s += module.MAX_KEPT_S
        setting.inbox.expire()
        assert setting.inbox.num_bytes == 0

    run(work)


def test_inputs_of_strangers_give_way_to_each_other_alone() -> None:
    async def work(setting: Setting) -> None:
        setting.open()
        setting.put(step_id=7)
        for number in range(module.MAX_UNCHECKED + 3):
            setting.put(session_id=f"a-strangers-session-{number}", key=OTHER)
        assert len(setting.inbox._unchecked) == module.MAX_UNCHECKED
        assert ("a-strangers-session-0", 0) not in setting.inbox._unchecked
        assert await setting.take(step_id=7)
        with pytest.raises(PeerRefused, match="may not come before its session"):
            setting.put(session_id="a-strangers-session", tensors={"hidden_states": torch.zeros(1 << 17)})

    run(work)


def test_inputs_beyond_the_limit_are_refused_unless_their_step_waits() -> None:
    async def work(setting: Setting) -> None:
        setting.open()
        setting.put(step_id=1)
        setting.put(step_id=2)
        with pytest.raises(PeerRefused, match="2 inputs wait for their steps") as caught:
            setting.put(step_id=3)
        assert caught.value.reason is RefusalReason.BUSY
        taking = asyncio.ensure_future(setting.take(step_id=3))
        await asyncio.sleep(0)
        setting.put(step_id=3)
        assert await taking
        assert setting.inbox.num_bytes == 2 * NUM_BYTES

    run(work, max_bytes=2 * NUM_BYTES)


def test_one_session_leaves_room_for_the_inputs_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSION_INPUTS", 2)

    async def work(setting: Setting) -> None:
        setting.open()
        for step_id in (1, 2):
            setting.put(step_id=step_id)
        with pytest.raises(PeerRefused, match="2 inputs wait for their steps"):
            setting.put(step_id=3)

    run(work)


@pytest.mark.parametrize("has_session", [False, True])
def test_inputs_count_as_what_they_decode_to(has_session: bool) -> None:
    async def work(setting: Setting) -> None:
        if has_session:
            setting.open()
        tensors, codecs = {"hidden_states": torch.ones(1, 2, 4096)}, {"hidden_states": "int4o"}
        metas, buffers = encode_tensors(tensors, codecs)
        body = bytearray(b"".join(buffers))
        grant = CLIENT.sign_push(sender=SENDER, receiver=ME, session_id=SESSION_ID)
        assert len(body) < (1 << 14) < tensors["hidden_states"].nbytes
        with pytest.raises(PeerRefused, match="an input of 32768 bytes exceeds the limit of 16384 bytes"):
            setting.inbox.put(Push(1, SESSION_ID, 0, SENDER, grant, metas, 5.0), body)

    run(work, max_bytes=1 << 14)


def test_input_that_does_not_decode_is_the_fault_of_who_brought_it() -> None:
    async def work(setting: Setting) -> None:
        metas, buffers = encode_tensors(INPUT)
        grant = CLIENT.sign_push(sender=SENDER, receiver=ME, session_id=SESSION_ID)
        body = bytearray(b"".join(buffers)[:-40])
        setting.inbox.put(Push(1, SESSION_ID, 0, SENDER, grant, metas, 5.0), body)
        await refused(setting.take(), "the step's input does not decode: ")

    run(work)


def test_steps_of_a_session_follow_each_other_as_they_were_asked_for() -> None:
    async def work(setting: Setting) -> None:
        done: list[int] = []

        async def step(number: int) -> None:
            with setting.inbox.turn(request(step_id=number)) as before:
                await setting.inbox.take(request(step_id=number))
                if before is not None:
                    await asyncio.wait([before])
                done.append(number)

        setting.open()
        steps = [asyncio.ensure_future(step(number)) for number in (0, 1, 2)]
        await asyncio.sleep(0)
        for number in (2, 0, 1):
            setting.put(step_id=number)
            await asyncio.sleep(0.001)
        await asyncio.gather(*steps)
        assert done == [0, 1, 2]
        steps = [asyncio.ensure_future(step(number)) for number in (3, 4)]
        await asyncio.sleep(0)
        setting.put(step_id=4)
        steps[0].cancel()  # one that ends otherwise holds up nobody
        await steps[1]
        assert done[3:] == [4]
        assert setting.inbox._turns == {}
        with setting.inbox.turn(request(step_id=5)), setting.inbox.turn(request(step_id=6)):
            pass
        assert setting.inbox._turns == {}
        first, last = setting.inbox.turn(request(step_id=7)), setting.inbox.turn(request(step_id=8))
        first.__enter__()
        last.__enter__()
        last.__exit__(None, None, None)  # refused, while the first computes
        first.__exit__(None, None, None)
        assert setting.inbox._turns == {}

    run(work)
