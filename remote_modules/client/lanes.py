"""Which of its connections to a peer a client sends the steps of a session on.

Messages of one connection leave, and arrive, one after the other: behind a prefill of megabytes the tokens of other
sessions would wait for all of it. So large steps have a connection of their own, "prefill", as soon as there are other
sessions on the usual one, "step". A session alone has just that one.
"""

from __future__ import annotations

from remote_modules.client.swarm import Swarm
from remote_modules.net.client_connection import LARGE_BYTES
from remote_modules.peers import PeerId

__all__ = ["close_session", "step_lane"]


def step_lane(swarm: Swarm, peer_id: PeerId, session_id: str, num_bytes: int) -> str:
    """The lane for a step: "prefill" if on "step" it would wait for a large one, or let others' steps wait."""
    connection = swarm.open_connection(peer_id, "step")
    if connection is None:
        return "step"
    is_large = num_bytes > LARGE_BYTES
    is_apart = connection.has_other_sessions(session_id) if is_large else connection.has_large_under_way
    return "prefill" if is_apart else "step"


def close_session(swarm: Swarm, peer_id: PeerId, session_id: str) -> None:
    """Tell the peer, if it can be told, that the session is of no more use; behind its last step, whatever the lane."""
    for lane in ("step", "prefill"):
        if (connection := swarm.open_connection(peer_id, lane)) is not None:
            connection.close_session(session_id)
