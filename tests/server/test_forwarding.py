"""Where outputs of steps may go, and what becomes of connections between peers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from net.memory import SERVER, client_connection, join

from remote_modules.errors import PeerUnreachable
from remote_modules.identity import Identity
from remote_modules.model.kv import SpanCache
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.server import forwarding as module
from remote_modules.server.engine import Engine
from remote_modules.server.forwarding import Forwarding
from remote_modules.server.sessions import KVBudget, Session, SessionTable
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta, Destination, Output, RecordProof, StepRequest
from remote_modules.wire.tensors import encode_tensors

from .peer_support import Clock, Peer, running_peer

ME = Identity.from_seed(b"m" * 32)
CLIENT, STRANGER = Identity.from_seed(b"c" * 32), Identity.from_seed(b"x" * 32)
SESSION_ID, TARGET_ID = "session-0123456789", "target-0123456789"
LOCAL = "127.0.0.1"
CONNECTION = 7  # of the client


class Dialer:
    """Leads to one peer, or to nobody."""

    def __init__(self) -> None:
        self.target: Peer | None = None
        self.dialled: list[PeerRecord] = []
        self.opened: list[ClientConnection] = []

    async def dial(self, record: PeerRecord) -> ClientConnection:
        self.dialled.append(record)
        accepted = None if self.target is None else self.target.handler.accept()
        if accepted is None:
            raise PeerUnreachable("nobody listens", peer_id=record.peer_id)
        connection = client_connection()
        join(connection, accepted)
        await connection.handshake(2.0)
        self.opened.append(connection)
        return connection

    async def aclose(self) -> None:
        """Nothing is held."""


def record_of(identity: Identity = SERVER, **changes: Any) -> RecordProof:
    record = PeerRecord(
        peer_id=identity.peer_id,
        instance_id="first",
        sequence=1,
        model="m",
        model_key="k",
        num_blocks=4,
        start=0,
        end=4,
        addresses=("127.0.0.1:4000",),
        state=PeerState.ONLINE,
    )
    signed = identity.sign_record(msgspec.structs.replace(record, **changes))
    return RecordProof(signed.payload, signed.public_key, signed.signature)


def granted(receiver: Identity = SERVER, key: Identity = CLIENT, session_id: str = TARGET_ID) -> bytes:
    return key.sign_push(sender=ME.peer_id, receiver=receiver.peer_id, session_id=session_id)


def request(forward_to: Destination, **changes: Any) -> StepRequest:
    call = CallMeta(rows=1, num_tokens=2)
    fields: dict[str, Any] = {"call": call, "forward_to": forward_to, "client_key": CLIENT.public_key}
    return StepRequest(1, SESSION_ID, 0, 0, 2, 0, (), (), 2.0, **(fields | changes))


TOLD = Destination(TARGET_ID, 5, granted(), record_of())


class Setting:
    """A peer's forwarding without the peer, and another peer to dial."""

    def __init__(self, target: Peer, *, needs_certificate: bool = False) -> None:
        self.clock = Clock()
        self.dialer = Dialer()
        self.dialer.target = target
        self.target = target
        self.sessions = SessionTable(KVBudget(1, {}), max_sessions=99, idle_s=60.0, orphan_s=60.0)
        self.sessions.open(Session(SESSION_ID, Span(0, 2), SpanCache.__new__(SpanCache), 1, 0.0))
        self.forwarding = Forwarding(
            self.sessions,
            dialer=self.dialer,
            peer_id=ME.peer_id,
            needs_certificate=needs_certificate,
            names=("hidden_states",),
            clock=self.clock,
        )

    async def prepare(self, message: StepRequest, source: str = LOCAL) -> None:
        self.forwarding.prepare(message, source, CONNECTION)
        await asyncio.sleep(0.01)  # a dial in memory takes some turns of the loop

    def send(self, message: StepRequest, name: str = "hidden_states") -> bool:
        metas, body = encode_tensors({name: torch.ones(1, 2, 4)})
        return self.forwarding.send(message, Output(1, metas, 0.0, 0.0), body)

    def expire(self, after_s: float) -> None:
        self.clock.now_s += after_s
        self.forwarding.expire()


def run(engine: Engine, work: Callable[[Setting], Any], **settings: Any) -> None:
    async def whole() -> None:
        async with running_peer(engine) as target:
            setting = Setting(target, **settings)
            await work(setting)
            setting.forwarding.close()
            await asyncio.sleep(0.01)
            assert setting.forwarding.num_links == 0
            assert not any(connection.is_open for connection in setting.dialer.opened)

    asyncio.run(whole())


def test_outputs_go_on_once_there_is_a_connection(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        message = request(TOLD)
        setting.forwarding.prepare(message, LOCAL, CONNECTION)
        assert not setting.send(message)  # it is being dialled
        await asyncio.sleep(0.01)
        assert setting.send(message)
        await setting.prepare(later := request(Destination(TARGET_ID, 6), client_key=b""))
        assert setting.send(later)  # it is known where to
        await asyncio.sleep(0.01)
        assert list(setting.target.handler.inbox._unchecked) == [(TARGET_ID, 5), (TARGET_ID, 6)]
        assert len(setting.dialer.dialled) == 1

    run(engine, work)


FORGED = msgspec.structs.replace(record_of(), signature=b"s" * 64)
NOWHERE = {
    "forged-record": (msgspec.structs.replace(TOLD, record=FORGED), LOCAL),
    "no-record": (Destination(TARGET_ID, 5, granted()), LOCAL),
    "grant-of-another-client": (msgspec.structs.replace(TOLD, grant=granted(key=STRANGER)), LOCAL),
    "grant-for-another-peer": (msgspec.structs.replace(TOLD, grant=granted(STRANGER)), LOCAL),
    "grant-for-another-session": (msgspec.structs.replace(TOLD, grant=granted(session_id=SESSION_ID)), LOCAL),
    "own-record": (Destination(TARGET_ID, 5, granted(ME), record_of(ME)), LOCAL),
    "loopback-from-outside": (TOLD, "8.8.8.8"),
    "private-from-outside": (Destination(TARGET_ID, 5, granted(), record_of(addresses=("10.0.0.1:4000",))), "8.8.8.8"),
    "metadata": (Destination(TARGET_ID, 5, granted(), record_of(addresses=("metadata:4000",))), LOCAL),
    "ssh": (Destination(TARGET_ID, 5, granted(), record_of(addresses=("10.0.0.1:22",))), "10.0.0.9"),
    "unknown-client": (TOLD, ""),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_nothing_is_dialled_for_a_destination_without_proof(engine: Engine, case: str) -> None:
    told, source = NOWHERE[case]

    async def work(setting: Setting) -> None:
        message = request(told)
        await setting.prepare(message, source)
        assert setting.dialer.dialled == []
        assert not setting.send(message)

    run(engine, work)


def test_key_of_a_session_is_told_once_and_cannot_be_changed(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        session = setting.sessions.get(SESSION_ID)
        assert session is not None
        session.client_key = CLIENT.public_key
        forged = Destination(TARGET_ID, 5, granted(key=STRANGER), record_of())
        await setting.prepare(request(forged, client_key=STRANGER.public_key))
        assert setting.dialer.dialled == []
        await setting.prepare(message := request(TOLD, client_key=b""))
        assert setting.send(message)

    run(engine, work)


def test_only_addresses_that_the_client_may_name_are_dialled(engine: Engine) -> None:
    addresses = ("127.0.0.1:4000", "10.0.0.1:4000", "10.0.0.1:25", "8.8.4.4:443")
    told = Destination(TARGET_ID, 5, granted(), record_of(addresses=addresses))

    async def work(setting: Setting) -> None:
        await setting.prepare(request(told), "10.0.0.9")
        assert [record.addresses for record in setting.dialer.dialled] == [("10.0.0.1:4000", "8.8.4.4:443")]

    run(engine, work)


def test_outside_loopback_a_certificate_is_needed(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        await setting.prepare(request(TOLD))
        assert setting.dialer.dialled == []
        told = Destination(TARGET_ID, 5, granted(), record_of(certificate_sha256="c" * 64))
        await setting.prepare(request(told))
        assert [record.certificate_sha256 for record in setting.dialer.dialled] == ["c" * 64]

    run(engine, work, needs_certificate=True)


def test_one_clients_targets_do_not_push_out_those_of_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTION_TARGETS", 2)

    async def work(setting: Setting) -> None:
        for number in range(4):
            name = f"target-{number:010d}"
            told = Destination(name, 5, granted(session_id=name), record_of())
            setting.forwarding.prepare(request(told), LOCAL, CONNECTION + (number == 0))
        kept = [target_id for _, target_id in setting.forwarding._targets]
        assert kept == [f"target-{number:010d}" for number in (0, 2, 3)]

    run(engine, work)


def test_peers_that_cannot_be_reached_do_not_keep_their_places(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINKS", 1)

    async def work(setting: Setting) -> None:
        setting.dialer.target = None
        dead = request(Destination(TARGET_ID, 5, granted(STRANGER), record_of(STRANGER)))
        await setting.prepare(dead)
        setting.clock.now_s += module.UNUSED_S
        await setting.prepare(dead)  # is dialled again, which is no use of it
        setting.dialer.target = setting.target
        setting.clock.now_s += 0.1
        await setting.prepare(request(TOLD))
        assert setting.send(request(TOLD))

    run(engine, work)


def test_only_whole_outputs_that_go_from_block_to_block_go_on(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        message = request(TOLD)
        await setting.prepare(message)
        assert not setting.send(message, "record.hidden_states.0")
        assert not setting.send(msgspec.structs.replace(message, num_outputs=1))
        assert setting.send(msgspec.structs.replace(message, num_outputs=2))
        metas, body = encode_tensors({"hidden_states": torch.ones(1, 2, 1 << 22)})
        assert not setting.forwarding.send(message, Output(1, metas, 0.0, 0.0), body)  # the other takes less

    run(engine, work)


def test_peer_that_refuses_what_comes_gets_no_more(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        message = request(TOLD)
        await setting.prepare(message)
        session = Session(TARGET_ID, Span(0, 2), SpanCache.__new__(SpanCache), 1, 0.0, client_key=STRANGER.public_key)
        setting.target.handler.sessions.open(session)
        assert setting.send(message)
        await asyncio.sleep(0.01)  # its client did not grant that
        short = request(Destination(TARGET_ID, 6), client_key=b"")
        await setting.prepare(short)
        assert not setting.send(short)
        assert [link.pushes for link in setting.forwarding._links.values()] == [{}]

    run(engine, work)


def test_dial_that_failed_is_not_repeated_at_once(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        setting.dialer.target = None
        message = request(TOLD)
        for _ in range(3):
            await setting.prepare(message)
            assert not setting.send(message)
        assert len(setting.dialer.dialled) == 1
        setting.clock.now_s += module.RETRY_S
        await setting.prepare(message)
        assert len(setting.dialer.dialled) == 2
        setting.dialer.target = setting.target
        setting.clock.now_s += module.RETRY_S
        await setting.prepare(message)
        assert not setting.send(message)
        setting.clock.now_s += module.RETRY_S  # each time twice as long
        await setting.prepare(message)
        assert setting.send(message)

    run(engine, work)


def test_connection_that_is_lost_is_dialled_anew(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        message = request(TOLD)
        await setting.prepare(message)
        setting.dialer.opened[0].abort()
        await asyncio.sleep(0.01)
        assert not setting.send(message)
        await setting.prepare(message)
        assert setting.send(message)

    run(engine, work)


def test_peer_of_an_older_protocol_gets_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientConnection, "knows_direct", property(lambda link: False))

    async def work(setting: Setting) -> None:
        message = request(TOLD)
        await setting.prepare(message)
        assert not setting.send(message)

    run(engine, work)


def test_connections_end_with_their_sessions_or_when_nothing_goes_over_them(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        forwarding, message = setting.forwarding, request(TOLD)
        await setting.prepare(message)
        setting.expire(module.UNUSED_S)
        assert forwarding.num_links == 1
        setting.expire(module.IDLE_S - module.UNUSED_S)
        assert forwarding.num_links == 0
        await setting.prepare(message)
        setting.sessions.close(SESSION_ID)
        setting.expire(module.UNUSED_S - 1.0)
        assert forwarding.num_links == 1
        setting.expire(1.0)
        assert forwarding.num_links == 0
        assert not setting.send(message)

    run(engine, work)


def others(count: int, address: str = "127.0.0.1:4000") -> list[StepRequest]:
    """Steps of sessions that each go on to another peer."""
    found = []
    for number in range(count):
        peer, session_id = Identity.from_seed(number.to_bytes(32, "big")), f"target-number-{number:04}"
        told = Destination(session_id, 0, granted(peer, session_id=session_id), record_of(peer, addresses=(address,)))
        found.append(request(told))
    return found


def test_stranger_can_have_few_peers_dialled(engine: Engine) -> None:
    async def work(setting: Setting) -> None:
        messages = others(int(module.DIAL_BURST) + 4, "8.8.4.4:4000")
        for message in messages:
            await setting.prepare(message, "8.8.8.8")
        assert len(setting.dialer.dialled) == module.DIAL_BURST
        setting.clock.now_s += 1.0 / module.DIALS_PER_S
        for message in messages:
            await setting.prepare(message, "8.8.8.8")
        assert len(setting.dialer.dialled) == module.DIAL_BURST + 1
        await setting.prepare(messages[-1], "8.8.9.9")
        assert len(setting.dialer.dialled) == module.DIAL_BURST + 2

    run(engine, work)


def test_connections_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINKS", 3)
    monkeypatch.setattr(module, "MAX_TARGETS", 4)

    async def work(setting: Setting) -> None:
        messages = others(6)
        for message in messages[:4]:
            await setting.prepare(message)
        assert setting.forwarding.num_links == 3  # the others are in use
        setting.clock.now_s += module.UNUSED_S
        await setting.prepare(messages[1])
        await setting.prepare(messages[4])  # in the place of the one that was used least recently
        assert setting.forwarding.num_links == 3
        assert len(setting.dialer.dialled) == 3 + 1
        await setting.prepare(messages[5])
        assert len(setting.forwarding._targets) == 4

    run(engine, work)
