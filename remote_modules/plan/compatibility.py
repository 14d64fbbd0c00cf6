"""Which peers may share a route: equal weights, and equal dtype unless mixing is allowed.

Every peer announces a digest for each of its blocks. A client that has the checkpoint knows the right ones; without
it, peers that announce different digests for one block cannot be told right from wrong, and the client must be told
which model it means.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerRecord

__all__ = ["group_of", "is_allowed", "matching"]


def matching(records: Sequence[PeerRecord], known_digests: Mapping[int, str]) -> list[PeerRecord]:
    """The records whose blocks are those of our model.

    Args:
        known_digests: block to digest, for the blocks whose weights we have; may be empty.

    Raises:
        NoRouteError: we know no digest of a block for which peers announce different ones.
    """
    seen: dict[int, str] = {}
    matched = []
    for record in sorted(records, key=lambda record: record.peer_id):
        digests = dict(zip(record.span, record.block_digests, strict=False))
        if any(known_digests.get(block, digest) != digest for block, digest in digests.items()):
            continue
        for block, digest in digests.items():
            if seen.setdefault(block, digest) != digest:
                raise NoRouteError(
                    f"peers hold different weights for block {block} of '{record.model}'; "
                    "name the model by its checkpoint folder so that the right ones can be told apart"
                )
        matched.append(record)
    return matched


def group_of(record: PeerRecord, *, allow_mixed_dtypes: bool) -> str:
    """Peers of one route share this."""
    return "" if allow_mixed_dtypes else f"{record.dtype}/{record.quantization}"


def is_allowed(peer_id: str, *, allowed: Collection[str], blocked: Collection[str]) -> bool:
    """Whether the user lets us use a peer.

    Args:
        allowed: ids, or beginnings of ids, of the only peers to use; empty for all.
        blocked: the same of peers never to use; stronger than ``allowed``.
    """
    if peer_id.startswith(tuple(blocked)):
        return False
    return not allowed or peer_id.startswith(tuple(allowed))
