"""Two protocol objects back to back, ways to cut the bytes between them, and one example of every message."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import msgspec

from remote_modules.errors import RefusalReason
from remote_modules.wire import messages
from remote_modules.wire.framing import Buffer, encode_frame
from remote_modules.wire.messages import CacheOp, CallMeta, Message, Option, TensorMeta, encode_message
from remote_modules.wire.protocol import MessageReceived, Protocol, Role, State

Slicer = Callable[[bytes], Iterable[bytes]]

MAX_BODY_BYTES = 1 << 20
MESSAGE_TYPES: tuple[type[Message], ...] = get_args(Message)
REQUESTS = get_args(messages.AnyRequest)

CLIENT_HELLO = messages.ClientHello(1, 1, b"n" * 32, MAX_BODY_BYTES, "client 1")
RECORD = messages.RecordProof(b"record", b"k" * 32, b"s" * 64)
SERVER_HELLO = messages.ServerHello(1, 1, b"k" * 32, b"s" * 64, "run-1", MAX_BODY_BYTES, "server 1", 8, RECORD)
HIDDEN = (TensorMeta("hidden_states", "float32", (1, 2, 4)),)
OPTIONS = (Option("is_causal", True), Option("window", 5), Option("scale", 0.5), Option("kind", "full"))
CALL = CallMeta(
    1,
    2,
    False,
    "bfloat16",
    OPTIONS,
    ("hidden_states", "router_logits"),
    "d" * 64,
    7,
    True,
    "int8",
    (b"p" * 16,),
    3,
    b"\0",
    2,
    64,
)
INDICES = (TensorMeta("rows", "int64", (2,)),)
SOURCE = messages.CopySource("p" * 52, ("127.0.0.1:31330",), "c" * 64)
TARGET = messages.Destination("t" * 16, 3, b"g" * 64, RECORD)
OPS = (CacheOp("crop", 3), CacheOp("select", 0, "rows"), CacheOp("reset"))

EXAMPLES: tuple[Message, ...] = (
    CLIENT_HELLO,
    SERVER_HELLO,
    messages.Reject("too many connections"),
    messages.StepRequest(1, "s" * 16, 2, 0, 4, 3, OPS, HIDDEN, 1.5, CALL, True, True, 1, 2, True, TARGET, b"c" * 32),
    messages.ForwardRequest(2, 0, 4, HIDDEN, 1.5, CALL, 60.0),
    messages.BackwardRequest(3, 0, 4, HIDDEN, 1.5, CALL, 2),
    messages.CopyRequest(4, "s" * 16, 0, 4, 1, OPS, INDICES, 1.5, "t" * 16, SOURCE, True, 9),
    messages.ReadRequest(5, "s" * 16, 0, 4, 3, 9, 1, 1.5),
    messages.AdapterRequest(6, (TensorMeta("adapter.0", "float32", (2, 4)),), 1.5, (b"p" * 16,)),
    messages.Output(1, HIDDEN, 0.25, 0.5, 2, 4096, messages.CacheMeta(9, 2, 1, 640), True, True),
    messages.Refused(1, RefusalReason.BUSY, "queue is full", 0.5),
    messages.Cancel(1),
    messages.CloseSession("s" * 16),
    messages.ReleaseGraph(2),
    messages.Push(8, "t" * 16, 3, "p" * 52, b"g" * 64, HIDDEN, 1.5),
    messages.Ping(7),
    messages.Pong(7, 2),
    messages.Draining(),
)


def name_of(value: object) -> str:
    """Test id of a message, a message type or an enum member."""
    if isinstance(value, Role | State):
        return str(value.value)
    return value.__name__ if isinstance(value, type) else type(value).__name__


def items_of(message: Message) -> list[Any]:
    """The message as the msgpack array that travels: its tag, then its fields."""
    items = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    assert isinstance(items, list)
    return items


def frame_of(message: Message, body: Sequence[Buffer] = ()) -> bytes:
    """The bytes of a message, whether or not it may be sent now."""
    return b"".join(encode_frame(encode_message(message), body))


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def one_byte(data: bytes) -> Iterator[bytes]:
    for index in range(len(data)):
        yield data[index : index + 1]


def random_slices(seed: int) -> Slicer:
    def slicer(data: bytes) -> Iterator[bytes]:
        rng = random.Random(seed)
        while data:
            num_bytes = rng.choice((1, 2, 23, 24, 25, 1000, 70_000))
            yield data[:num_bytes]
            data = data[num_bytes:]

    slicer.__name__ = f"seed{seed}"
    return slicer


def slicer_name(slicer: Slicer) -> str:
    return getattr(slicer, "__name__", "slicer")


SLICERS: tuple[Slicer, ...] = (whole, one_byte, *map(random_slices, range(4)))


class ConnectionPair:
    """A client and a server; what one sends reaches the other in the pieces that ``slicer`` makes of it."""

    def __init__(self, slicer: Slicer = whole, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.slicer = slicer
        self.ends = {role: Protocol(role, max_body_bytes=max_body_bytes) for role in Role}

    @classmethod
    def in_state(cls, state: State, slicer: Slicer = whole) -> ConnectionPair:
        pair = cls(slicer)
        if state is State.CLOSED:
            pair.close()
        if state in (State.GREETED, State.OPEN):
            pair.pass_on(Role.CLIENT, CLIENT_HELLO)
        if state is State.OPEN:
            pair.pass_on(Role.SERVER, SERVER_HELLO)
        assert pair.state is state
        return pair

    @property
    def state(self) -> State:
        """The state of both ends, which always agree between two messages."""
        assert self.ends[Role.CLIENT].state is self.ends[Role.SERVER].state
        return self.ends[Role.CLIENT].state

    def pass_on(self, sender: Role, message: Message, body: Sequence[Buffer] = ()) -> list[MessageReceived]:
        """Send a message from one end; the events that it makes at the other."""
        self.ends[sender].send(message, body)
        return self.flush(sender)

    def flush(self, sender: Role) -> list[MessageReceived]:
        """Deliver all that one end has queued."""
        self.inject(sender, b"".join(self.ends[sender].data_to_send()))
        assert not self.ends[sender].data_to_send()
        return self.ends[self.other(sender)].events_received()

    def inject(self, sender: Role, data: bytes) -> None:
        """Deliver ``data`` as if ``sender`` had sent it."""
        for piece in self.slicer(data):
            self.ends[self.other(sender)].receive_data(piece)

    def close(self) -> None:
        for end in self.ends.values():
            end.receive_eof()

    @staticmethod
    def other(role: Role) -> Role:
        return Role.SERVER if role is Role.CLIENT else Role.CLIENT
