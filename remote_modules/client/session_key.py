"""The client's key for one session: it says who may bring inputs of the session to its peers."""

from __future__ import annotations

from remote_modules.identity import Identity

__all__ = ["SessionKey"]

MAX_GRANTS = 256


class SessionKey:
    """Made for one session, and gone with it; clients have no other identity."""

    def __init__(self) -> None:
        self._identity = Identity.generate()
        self._grants: dict[tuple[str, str, str], bytes] = {}

    @property
    def public_key(self) -> bytes:
        return self._identity.public_key

    def grant(self, sender: str, receiver: str, session_id: str) -> bytes:
        """Lets the peer ``sender`` ("": us) bring inputs of ``session_id``, which is this session at ``receiver``."""
        names = (sender, receiver, session_id)
        if names not in self._grants:
            if len(self._grants) >= MAX_GRANTS:  # of hops that were replaced
                self._grants.clear()
            self._grants[names] = self._identity.sign_push(sender=sender, receiver=receiver, session_id=session_id)
        return self._grants[names]
