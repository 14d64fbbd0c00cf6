"""What keeps a peer that is well from a request: it takes fewer tokens, or speaks a protocol that lacks the method."""

from __future__ import annotations

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import short_id
from remote_modules.plan.routing import Demand

__all__ = ["obstacle", "refusal"]


def obstacle(connection: ClientConnection, demand: Demand, num_tokens: int) -> str:
    """What the peer would refuse in a request of so many tokens, all rows; "" for nothing that is known."""
    name, most = short_id(connection.peer_id), connection.max_batch_tokens
    if connection.their_minor < demand.minor:
        spoken = f"protocol 1.{connection.their_minor}"
        return f"peer '{name}' speaks {spoken}, this adapter needs 1.{demand.minor}: update the peer"
    if 0 < most < num_tokens:
        return (
            f"peer '{name}' takes {most} tokens in a request, got {num_tokens}: send shorter rows, or raise its limit"
        )
    return ""


def refusal(connection: ClientConnection, demand: Demand, text: str, *, has_others: bool) -> PeerRefused:
    """What `obstacle` said, as the peer would have answered: go elsewhere, send fewer rows, or give up."""
    reason = RefusalReason.BAD_REQUEST
    if has_others:
        reason = RefusalReason.BUSY
    elif connection.their_minor >= demand.minor and demand.rows > 1:
        reason = RefusalReason.OUT_OF_MEMORY
    return PeerRefused(text, peer_id=connection.peer_id, reason=reason)
