"""The state of one connection: which message may come when.

::

    CLIENT                              SERVER
    start   -- ClientHello -->          greeted
    greeted <-- ServerHello --          open        (or Reject, then closed)
    open    -- Step, Forward, Backward, Copy, Read, Adapter, Cancel, CloseSession, ReleaseGraph, Push, Ping, Pong -->
    open    <-- Output, Refused, Ping, Pong, Draining --
    any     -- end of stream -->        closed

Sans-I/O: bytes go in by `get_buffer`/`buffer_updated` or `receive_data`, messages come out of `events_received`;
messages go in by `send`, bytes come out of `data_to_send`. Whoever calls the first must then take the second.
`RemoteProtocolError` (they broke the rules) closes the connection for good; `LocalProtocolError` (we did) leaves
everything as it was.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

from remote_modules.errors import LocalProtocolError, RemoteProtocolError
from remote_modules.wire import messages
from remote_modules.wire.framing import Body, Buffer, FrameReader, encode_frame, feed
from remote_modules.wire.messages import Message, decode_message, encode_message

__all__ = ["MessageReceived", "Protocol", "Role", "State"]

HELLO_BODY_BYTES = 0  # until the hello is done nobody may make us allocate


class Role(enum.Enum):
    CLIENT = "client"
    SERVER = "server"

    __hash__ = object.__hash__  # that of enums is Python code, and would run several times for each message


class State(enum.Enum):
    START = "start"
    GREETED = "greeted"
    OPEN = "open"
    CLOSED = "closed"

    __hash__ = object.__hash__


class MessageReceived(NamedTuple):
    """A message and the raw bytes of its tensors (`wire.tensors.decode_tensors` reads them)."""

    message: Message
    body: Body


_CLIENT_SENDS = (
    messages.StepRequest,
    messages.ForwardRequest,
    messages.BackwardRequest,
    messages.CopyRequest,
    messages.ReadRequest,
    messages.AdapterRequest,
    messages.Cancel,
    messages.CloseSession,
    messages.ReleaseGraph,
    messages.Push,
    messages.Ping,
    messages.Pong,
)
_SERVER_SENDS = (messages.Output, messages.Refused, messages.Ping, messages.Pong, messages.Draining)
_ALLOWED: dict[Role, dict[State, frozenset[type]]] = {
    Role.CLIENT: {State.START: frozenset({messages.ClientHello}), State.OPEN: frozenset(_CLIENT_SENDS)},
    Role.SERVER: {
        State.GREETED: frozenset({messages.ServerHello, messages.Reject}),
        State.OPEN: frozenset(_SERVER_SENDS),
    },
}


class Protocol:
    """One side of one connection.

    Args:
        role: which side this is.
        max_body_bytes: largest body to accept, as said in our hello.
        new_body: gives the memory of a body that comes.
    """

    def __init__(self, role: Role, *, max_body_bytes: int, new_body: Callable[[int], Body] = bytearray) -> None:
        self.role = role
        self.their_role = Role.SERVER if role is Role.CLIENT else Role.CLIENT
        self.state = State.START
        self.max_body_bytes = max_body_bytes
        self.their_max_body_bytes = 0
        self.their_minor = 0
        self._reader = FrameReader(max_body_bytes=HELLO_BODY_BYTES, new_body=new_body)
        self._events: list[MessageReceived] = []
        self._outgoing: list[Buffer] = []

    def get_buffer(self) -> memoryview:
        """Memory for the bytes that come next; then call `buffer_updated`."""
        return self._reader.get_buffer()

    def buffer_updated(self, num_bytes: int) -> None:
        """Take ``num_bytes`` that were put into the last `get_buffer`; then look at `events_received`.

        Raises:
            RemoteProtocolError: the bytes break the protocol; the connection is closed.
        """
        try:
            self._reader.buffer_updated(num_bytes)
            self._take_frames()
        except RemoteProtocolError:
            self.state = State.CLOSED
            raise

    def receive_data(self, data: Buffer) -> None:
        """Take bytes that lie elsewhere. Raises as `buffer_updated`."""
        feed(self, data)

    def receive_eof(self) -> None:
        """Take the end of the stream.

        Raises:
            RemoteProtocolError: it came in the middle of a frame.
        """
        was_open, self.state = self.state is not State.CLOSED, State.CLOSED
        if was_open and self._reader.is_mid_frame:
            raise RemoteProtocolError("stream ended in the middle of a frame")

    def events_received(self) -> list[MessageReceived]:
        """Messages that came since the last call."""
        events, self._events = self._events, []
        return events

    def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        """Queue a message; then send what `data_to_send` returns.

        Raises:
            LocalProtocolError: not allowed now, a field out of its bounds, or larger than the other side takes.
        """
        self._check_allowed(self.role, message, LocalProtocolError)
        body_bytes = sum(map(len, body))
        if body_bytes > self.their_max_body_bytes:
            limit = self.their_max_body_bytes
            raise LocalProtocolError(f"message of {body_bytes} bytes exceeds the other side's limit of {limit} bytes")
        self._outgoing += encode_frame(encode_message(message), body)
        if self.state is not State.OPEN:
            self._advance(message)

    def data_to_send(self) -> list[Buffer]:
        """Buffers to put on the wire now, in order; each is returned once."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def _take_frames(self) -> None:
        while (frame := self._reader.next_frame()) is not None:
            message = decode_message(frame.header)
            self._check_allowed(self.their_role, message, RemoteProtocolError)
            if self.state is not State.OPEN:
                self._greet(message)
                self._advance(message)
            self._events.append(MessageReceived(message, frame.body))

    def _greet(self, message: Message) -> None:
        if isinstance(message, messages.ServerHello):
            self._check_version(message.major, message.minor)
        if isinstance(message, messages.ClientHello | messages.ServerHello):
            self.their_max_body_bytes = message.max_body_bytes
            self.their_minor = message.minor

    def _advance(self, message: Message) -> None:
        if isinstance(message, messages.ClientHello):
            self.state = State.GREETED
        elif isinstance(message, messages.ServerHello):
            self.state = State.OPEN
            self._reader.max_body_bytes = self.max_body_bytes
        else:
            assert isinstance(message, messages.Reject)
            self.state = State.CLOSED

    def _check_allowed(self, sender: Role, message: Message, error: type[Exception]) -> None:
        if type(message) not in _ALLOWED[sender].get(self.state, ()):
            name = type(message).__name__
            raise error(f"{name} may not be sent by the {sender.value} in state '{self.state.value}'")

    def _check_version(self, major: int, minor: int) -> None:
        text = check_version(major, minor)
        if text is not None:
            raise RemoteProtocolError(text)


def check_version(major: int, minor: int) -> str | None:
    """Why a peer of that version cannot be spoken to, naming both versions; None if it can."""
    ours = f"{messages.VERSION_MAJOR}.{messages.VERSION_MINOR}"
    if major == messages.VERSION_MAJOR:
        return None
    return f"peer speaks protocol {major}.{minor}, we speak {ours}; update the older side"
