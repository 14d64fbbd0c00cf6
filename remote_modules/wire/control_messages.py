"""Messages without an answer of their own, and what keeps a connection alive."""

from __future__ import annotations

from remote_modules.wire.parts import Base, Count, Id, SessionId

__all__ = ["Cancel", "CloseSession", "Draining", "Ping", "Pong", "ReleaseGraph"]


class Cancel(Base, frozen=True, tag="cancel"):
    """The client no longer wants the answer; work not yet begun is dropped."""

    request_id: Id


class CloseSession(Base, frozen=True, tag="close_session"):
    """Free a session's KV cache; unknown ids are ignored."""

    session_id: SessionId


class ReleaseGraph(Base, frozen=True, tag="release_graph"):
    """No backward will come for a forward on this connection: drop its graph. Unknown ids are ignored."""

    request_id: Id


class Ping(Base, frozen=True, tag="ping"):
    """Answer with `Pong` at once."""

    nonce: Id


class Pong(Base, frozen=True, tag="pong"):
    """Answer to `Ping`; ``load`` as in `Output`."""

    nonce: Id
    load: Count = 0


class Draining(Base, frozen=True, tag="draining"):
    """The peer leaves soon: running sessions may finish, new ones are refused."""
