from __future__ import annotations

import itertools
import random

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_modules.errors import LocalProtocolError, RemoteProtocolError
from remote_modules.wire import messages
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import Message, TensorMeta
from remote_modules.wire.protocol import MessageReceived, Role, State, check_version
from remote_modules.wire.tensors import decode_tensors, encode_tensors

from .helpers import (
    CLIENT_HELLO,
    EXAMPLES,
    HIDDEN,
    MAX_BODY_BYTES,
    SERVER_HELLO,
    SLICERS,
    ConnectionPair,
    Slicer,
    frame_of,
    name_of,
    one_byte,
    random_slices,
    slicer_name,
)

# Which message takes a connection from one state to which; everything else is refused.
OPEN_CLIENT = (
    "StepRequest",
    "ForwardRequest",
    "BackwardRequest",
    "CopyRequest",
    "ReadRequest",
    "AdapterRequest",
    "Cancel",
    "CloseSession",
    "ReleaseGraph",
    "Push",
    "Ping",
    "Pong",
)
OPEN_SERVER = ("Output", "Refused", "Ping", "Pong", "Draining")
NEXT_STATE: dict[tuple[Role, State, str], State] = {
    (Role.CLIENT, State.START, "ClientHello"): State.GREETED,
    (Role.SERVER, State.GREETED, "ServerHello"): State.OPEN,
    (Role.SERVER, State.GREETED, "Reject"): State.CLOSED,
    **{(Role.CLIENT, State.OPEN, name): State.OPEN for name in OPEN_CLIENT},
    **{(Role.SERVER, State.OPEN, name): State.OPEN for name in OPEN_SERVER},
}
every_state = pytest.mark.parametrize("state", list(State), ids=name_of)
every_role = pytest.mark.parametrize("sender", list(Role), ids=name_of)
every_message = pytest.mark.parametrize("message", EXAMPLES, ids=name_of)
every_slicer = pytest.mark.parametrize("slicer", SLICERS, ids=slicer_name)
FORWARD = messages.ForwardRequest(2, 0, 4, HIDDEN, 1.5)
OUTPUT = messages.Output(1, HIDDEN, 0.25, 0.5, 2, 4096)


# -------------------------------------------------------------------------------- states


@every_state
@every_role
@every_message
def test_message_is_sent_only_where_the_table_allows(sender: Role, state: State, message: Message) -> None:
    pair = ConnectionPair.in_state(state)
    after = NEXT_STATE.get((sender, state, name_of(message)))
    if after is None:
        with pytest.raises(LocalProtocolError, match=f"may not be sent by the {sender.value} in state '{state.value}'"):
            pair.ends[sender].send(message)
        assert pair.state is state
        assert not pair.ends[sender].data_to_send()
    else:
        assert pair.pass_on(sender, message) == [MessageReceived(message, bytearray())]
        assert pair.state is after


@every_state
@every_role
@every_message
def test_message_is_received_only_where_the_table_allows(sender: Role, state: State, message: Message) -> None:
    pair = ConnectionPair.in_state(state)
    receiver = pair.ends[pair.other(sender)]
    after = NEXT_STATE.get((sender, state, name_of(message)))
    if after is None:
        with pytest.raises(RemoteProtocolError, match=f"may not be sent by the {sender.value} in state"):
            pair.inject(sender, frame_of(message))
        assert receiver.events_received() == []
        assert receiver.state is State.CLOSED
    else:
        pair.inject(sender, frame_of(message))
        assert receiver.events_received() == [MessageReceived(message, bytearray())]
        assert receiver.state is after


@every_slicer
def test_conversation_in_any_slices_is_read(slicer: Slicer) -> None:
    pair = ConnectionPair(slicer)
    body = bytes(range(64))
    assert pair.pass_on(Role.CLIENT, CLIENT_HELLO) == [MessageReceived(CLIENT_HELLO, bytearray())]
    assert pair.pass_on(Role.SERVER, SERVER_HELLO) == [MessageReceived(SERVER_HELLO, bytearray())]
    for sender, message in itertools.product(Role, EXAMPLES):
        if (sender, State.OPEN, name_of(message)) in NEXT_STATE:
            assert pair.pass_on(sender, message, [body[:10], body[10:]]) == [MessageReceived(message, bytearray(body))]
    pair.close()
    assert pair.state is State.CLOSED


def test_many_messages_in_one_chunk_are_read_in_order() -> None:
    pair = ConnectionPair.in_state(State.OPEN)
    sent = [messages.Ping(nonce) for nonce in range(5000)]
    for message in sent:
        pair.ends[Role.CLIENT].send(message)
    assert [event.message for event in pair.flush(Role.CLIENT)] == sent


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(Role), st.sampled_from(EXAMPLES), st.binary(max_size=99)), max_size=12),
    st.integers(0, 2**32),
)
def test_any_conversation_agrees_with_the_table(calls: list[tuple[Role, Message, bytes]], seed: int) -> None:
    pair = ConnectionPair.in_state(State.OPEN, random_slices(seed))
    for sender, message, body in calls:
        if (sender, State.OPEN, name_of(message)) in NEXT_STATE:
            assert pair.pass_on(sender, message, [body]) == [MessageReceived(message, bytearray(body))]
        else:
            with pytest.raises(LocalProtocolError):
                pair.ends[sender].send(message, [body])
        assert pair.state is State.OPEN


# -------------------------------------------------------------------------------- bodies


def test_tensors_are_neither_copied_out_nor_copied_in() -> None:
    pair = ConnectionPair.in_state(State.OPEN)
    hidden = torch.randn(1, 500, 64, generator=torch.Generator().manual_seed(0))
    metas, body = encode_tensors({"hidden_states": hidden})
    client, server = pair.ends[Role.CLIENT], pair.ends[Role.SERVER]
    client.send(messages.ForwardRequest(2, 0, 4, metas, 1.5), body)
    start, data = client.data_to_send()
    assert torch.frombuffer(data, dtype=torch.float32).data_ptr() == hidden.data_ptr()

    server.receive_data(start)
    buffer = server.get_buffer()
    assert len(buffer) == hidden.nbytes
    buffer[:] = data
    server.buffer_updated(len(buffer))
    (event,) = server.events_received()
    decoded = decode_tensors(metas, event.body)["hidden_states"]
    assert event.body is buffer.obj
    assert decoded.data_ptr() == torch.frombuffer(event.body, dtype=torch.float32).data_ptr()
    assert torch.equal(decoded, hidden)


@pytest.mark.parametrize("state", [State.START, State.GREETED], ids=name_of)
@every_role
def test_body_before_the_hello_is_refused_at_its_prefix(sender: Role, state: State) -> None:
    pair = ConnectionPair.in_state(state)
    with pytest.raises(RemoteProtocolError, match="frame of 1 bytes exceeds limit of 0 bytes"):
        pair.inject(sender, frame_of(EXAMPLES[0], [b"x"])[:24])
    assert pair.ends[pair.other(sender)].state is State.CLOSED


@every_role
def test_body_with_the_hello_is_not_sent(sender: Role) -> None:
    pair = ConnectionPair.in_state(State.START if sender is Role.CLIENT else State.GREETED)
    hello: Message = CLIENT_HELLO if sender is Role.CLIENT else msgspec.structs.replace(SERVER_HELLO)
    limit = 0 if sender is Role.CLIENT else MAX_BODY_BYTES
    with pytest.raises(LocalProtocolError, match=f"exceeds the other side's limit of {limit} bytes"):
        pair.ends[sender].send(hello, [bytes(limit + 1)])


@pytest.mark.parametrize(("sender", "message"), [(Role.CLIENT, FORWARD), (Role.SERVER, OUTPUT)], ids=name_of)
def test_body_over_the_limit_in_the_hello_is_refused_on_both_sides(sender: Role, message: Message) -> None:
    pair = ConnectionPair.in_state(State.OPEN)
    assert pair.pass_on(sender, message, [bytes(MAX_BODY_BYTES)])[0].body == bytearray(MAX_BODY_BYTES)
    with pytest.raises(LocalProtocolError, match=f"message of {MAX_BODY_BYTES + 1} bytes exceeds the other side's"):
        pair.ends[sender].send(message, [bytes(MAX_BODY_BYTES), b"x"])
    assert pair.state is State.OPEN
    with pytest.raises(RemoteProtocolError, match=f"frame of {MAX_BODY_BYTES + 1} bytes exceeds limit"):
        pair.inject(sender, frame_of(message, [bytes(MAX_BODY_BYTES + 1)])[:24])
    assert pair.ends[pair.other(sender)].state is State.CLOSED


# -------------------------------------------------------------------------------- errors


def test_refused_call_changes_nothing() -> None:
    pair = ConnectionPair.in_state(State.OPEN)
    client = pair.ends[Role.CLIENT]
    for message in (messages.Ping(-1), SERVER_HELLO, messages.CloseSession("s" * 65)):
        with pytest.raises(LocalProtocolError):
            client.send(message)
    huge = messages.StepRequest(
        1, "s" * 16, 1, 0, 1, 0, (), (TensorMeta("n" * 128, "d" * 16, (2**39,) * 8),) * 256, 1.0
    )
    with pytest.raises(LocalProtocolError, match="header of"):
        client.send(msgspec.structs.replace(huge, ops=(messages.CacheOp("select", 0, "n" * 128),) * 1024))
    assert client.data_to_send() == []
    assert [event.message for event in pair.pass_on(Role.CLIENT, messages.Ping(1))] == [messages.Ping(1)]


def test_messages_before_an_error_are_kept_and_none_after_it() -> None:
    pair = ConnectionPair.in_state(State.OPEN)
    server = pair.ends[Role.SERVER]
    good = frame_of(messages.Ping(1))
    with pytest.raises(RemoteProtocolError):
        pair.inject(Role.CLIENT, good + frame_of(SERVER_HELLO) + good)
    assert [event.message for event in server.events_received()] == [messages.Ping(1)]
    with pytest.raises(RemoteProtocolError):
        pair.inject(Role.CLIENT, good)
    with pytest.raises(LocalProtocolError):
        server.send(messages.Ping(1))
    assert server.events_received() == []


def test_any_bit_of_a_message_flipped_is_never_read_as_a_message() -> None:
    good = frame_of(messages.Ping(123456))
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        pair = ConnectionPair.in_state(State.OPEN)
        with pytest.raises(RemoteProtocolError):  # a length that grew shows at the end of the stream
            deliver_and_close(pair, bytes(flipped))
        assert pair.ends[Role.SERVER].events_received() == []
        assert pair.ends[Role.SERVER].state is State.CLOSED


def deliver_and_close(pair: ConnectionPair, data: bytes) -> None:
    pair.inject(Role.CLIENT, data)
    pair.ends[Role.SERVER].receive_eof()


@pytest.mark.parametrize("seed", range(10))
def test_garbage_closes_the_connection(seed: int) -> None:
    pair = ConnectionPair(one_byte)
    with pytest.raises(RemoteProtocolError, match="expected a frame"):
        pair.inject(Role.CLIENT, random.Random(seed).randbytes(100))
    assert pair.ends[Role.SERVER].state is State.CLOSED


def test_header_that_is_no_message_closes_the_connection() -> None:
    pair = ConnectionPair.in_state(State.OPEN)
    with pytest.raises(RemoteProtocolError, match="is no message"):
        pair.inject(Role.CLIENT, b"".join(encode_frame(msgspec.msgpack.encode(["new_message", 1]))))
    assert pair.ends[Role.SERVER].state is State.CLOSED


@every_state
def test_stream_that_ends_between_frames_closes(state: State) -> None:
    pair = ConnectionPair.in_state(state)
    pair.close()
    assert pair.state is State.CLOSED


def test_stream_that_ends_inside_a_frame_is_an_error_once() -> None:
    data = frame_of(FORWARD, [bytes(64)])
    for num_bytes in range(1, len(data)):
        pair = ConnectionPair.in_state(State.OPEN)
        with pytest.raises(RemoteProtocolError, match="stream ended in the middle of a frame"):
            deliver_and_close(pair, data[:num_bytes])
        pair.close()
        assert pair.state is State.CLOSED


# -------------------------------------------------------------------------------- versions


def test_other_major_version_of_the_server_is_refused_naming_both() -> None:
    pair = ConnectionPair.in_state(State.GREETED)
    with pytest.raises(RemoteProtocolError, match=r"peer speaks protocol 2\.7, we speak 1\.5; update the older side"):
        pair.inject(Role.SERVER, frame_of(msgspec.structs.replace(SERVER_HELLO, major=2, minor=7)))
    client = pair.ends[Role.CLIENT]
    assert client.state is State.CLOSED
    assert client.events_received() == []


def test_other_major_version_of_the_client_can_be_rejected_naming_both() -> None:
    pair = ConnectionPair()
    (event,) = pair.pass_on(Role.CLIENT, msgspec.structs.replace(CLIENT_HELLO, major=0, minor=9))
    assert isinstance(event.message, messages.ClientHello)
    text = check_version(event.message.major, event.message.minor)
    assert text == "peer speaks protocol 0.9, we speak 1.5; update the older side"
    assert pair.pass_on(Role.SERVER, messages.Reject(text))[0].message == messages.Reject(text)
    assert pair.state is State.CLOSED


def test_later_minor_version_is_accepted() -> None:
    pair = ConnectionPair.in_state(State.GREETED)
    pair.pass_on(Role.SERVER, msgspec.structs.replace(SERVER_HELLO, minor=6))
    assert [pair.ends[role].their_minor for role in Role] == [6, 1]
    assert pair.state is State.OPEN
    assert check_version(1, 5) is None


def test_hello_with_extra_fields_is_accepted() -> None:
    pair = ConnectionPair()
    items = msgspec.msgpack.decode(msgspec.msgpack.encode(CLIENT_HELLO))
    pair.inject(Role.CLIENT, b"".join(encode_frame(msgspec.msgpack.encode([*items, "later"]))))
    assert pair.ends[Role.SERVER].events_received() == [MessageReceived(CLIENT_HELLO, bytearray())]


@pytest.mark.parametrize("minor", [0, messages.VERSION_MINOR, 99])
def test_other_minor_version_is_known_from_the_hello(minor: int) -> None:
    pair = ConnectionPair()
    client, server = pair.ends[Role.CLIENT], pair.ends[Role.SERVER]
    assert client.their_minor == server.their_minor == 0
    pair.pass_on(Role.CLIENT, msgspec.structs.replace(CLIENT_HELLO, minor=minor))
    pair.pass_on(Role.SERVER, msgspec.structs.replace(SERVER_HELLO, minor=minor))
    assert client.their_minor == server.their_minor == minor
