"""Identities and records that tests make up."""

from __future__ import annotations

from typing import Any

from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, PeerState

__all__ = ["make_identity", "make_record"]


def make_identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "big"))


def make_record(identity: Identity, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "instance_id": "first",
        "sequence": 1,
        "model": "tiny",
        "model_key": "tiny-key",
        "num_blocks": 8,
        "start": 0,
        "end": 4,
        "addresses": ("127.0.0.1:4000",),
        "state": PeerState.ONLINE,
    }
    return PeerRecord(**(fields | changes))
