"""Messages without an answer of their own, and what keeps a connection alive."""

from __future__ import annotations

from remote_modules.wire.parts import Base, Count, Grant, Id, Name, Seconds, SessionId, Tensors

__all__ = ["Cancel", "CloseSession", "Draining", "Ping", "Pong", "Push", "ReleaseGraph"]


class Cancel(Base, frozen=True, tag="cancel"):
    """The client no longer wants the answer; work not yet begun is dropped."""

    request_id: Id


class CloseSession(Base, frozen=True, tag="close_session"):
    """Free a session's KV cache; unknown ids are ignored."""

    session_id: SessionId


class ReleaseGraph(Base, frozen=True, tag="release_graph"):
    """No backward will come for a forward on this connection: drop its graph. Unknown ids are ignored."""

    request_id: Id


class Push(Base, frozen=True, tag="push"):
    """The input of a step that awaits it, from the peer that computed it or from the client; `Refused` if not taken.

    Attributes:
        request_id: chosen by the sender, unique on the connection.
        session_id, step_id: of the step, which may be on its way still; one that has its input takes no other.
        sender: id of the peer that sends it; "" for the client.
        grant: signature of the session's client over sender, receiver and session (`identity.verify_push`).
        tensors: ``hidden_states`` and ``state.<k>`` as the block before returned them.
        timeout_s: how long to keep them for a step that has not come.
    """

    request_id: Id
    session_id: SessionId
    step_id: Id
    sender: Name
    grant: Grant
    tensors: Tensors
    timeout_s: Seconds


class Ping(Base, frozen=True, tag="ping"):
    """Answer with `Pong` at once."""

    nonce: Id


class Pong(Base, frozen=True, tag="pong"):
    """Answer to `Ping`; ``load`` as in `Output`."""

    nonce: Id
    load: Count = 0


class Draining(Base, frozen=True, tag="draining"):
    """The peer leaves soon: running sessions may finish, new ones are refused."""
