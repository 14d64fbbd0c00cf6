"""What each peer has of our adapters: a part travels to a peer once, whichever request, lane or span needs it first.

A part counts as being on its way from the moment that a request with it is sent. Requests that follow on the same
connection leave it out, as the peer handles them in order; those on another connection wait for its arrival. When that
request fails, or the peer says that it lacks an adapter, the part is sent again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import msgspec
import torch

from remote_modules.client.adapters import HopAdapter
from remote_modules.client.stats import StatsRecorder
from remote_modules.errors import LocalProtocolError, PeerRefused, RefusalReason
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId
from remote_modules.wire.messages import CallMeta

__all__ = ["AdapterUploads"]

MAX_ADAPTERS = 64  # of one peer; of those used before, nothing is known
MAX_PEERS = 256
MAX_TRIES = 4
MAX_OLD_TENSORS = 960  # of the 1,024 that a message had before 1.3; the others are the request's own
MAX_PARTS_AT_ONCE = 512  # of one message: about 26 KiB of its header
MAX_BYTES_AT_ONCE = 64 << 20
MAX_PIECES_WAIT_S = 60.0  # for an adapter that takes several messages

Named = dict[str, torch.Tensor]


class Bring(Protocol):
    """Sends parts of an adapter, by their digests, ahead of the request that names them."""

    async def __call__(self, parts: dict[bytes, torch.Tensor]) -> None: ...


class Send(Protocol):
    """Sends a request with this call and these tensors of the adapter beside its own."""

    async def __call__(self, call: CallMeta, brought: Named, *, is_first: bool) -> Named: ...


@dataclass(eq=False)
class _Upload:
    """One request that brings something; over several messages, without a ``connection`` that keeps their order."""

    connection: ClientConnection | None
    parts: tuple[bytes, ...]
    ended: asyncio.Future[None]


@dataclass
class _Peer:
    """What one peer has: the parts of the adapters that it was sent last, and those on their way.

    Attributes:
        num_losses: times that it turned out to lack what we thought it had.
    """

    num_losses: int = 0
    _held: OrderedDict[tuple[bytes, ...], None] = field(default_factory=OrderedDict)
    _users: Counter[bytes] = field(default_factory=Counter)
    _coming: dict[bytes, _Upload] = field(default_factory=dict)

    def lacks(self, parts: Sequence[bytes]) -> list[bytes]:
        """Those that it neither has nor is being sent."""
        return [part for part in dict.fromkeys(parts) if part not in self._coming and not self._users[part]]

    async def arrival(self, parts: Sequence[bytes], connection: ClientConnection, max_wait_s: float) -> None:
        """Wait for what is on its way over other connections; for so long, and then it is sent again."""
        found = (self._coming.get(part) for part in parts)
        others = {upload for upload in found if upload is not None and upload.connection is not connection}
        if not others:
            return
        if any(upload.connection is None for upload in others):
            max_wait_s = max(max_wait_s, MAX_PIECES_WAIT_S)
        await asyncio.wait([upload.ended for upload in others], timeout=max_wait_s)
        for part in parts:
            if self._coming.get(part) in others:
                del self._coming[part]

    def begin(self, connection: ClientConnection | None, parts: Sequence[bytes]) -> _Upload:
        upload = _Upload(connection, tuple(parts), asyncio.get_running_loop().create_future())
        self._coming.update(dict.fromkeys(parts, upload))
        return upload

    def end(self, upload: _Upload) -> None:
        """It was answered or failed."""
        for part in upload.parts:
            if self._coming.get(part) is upload:
                del self._coming[part]
        upload.ended.set_result(None)

    def confirm(self, parts: tuple[bytes, ...]) -> None:
        """It has an adapter of these parts."""
        if parts not in self._held:
            self._users.update(parts)
        self._held[parts] = None
        self._held.move_to_end(parts)
        while len(self._held) > MAX_ADAPTERS:
            self._users -= Counter(self._held.popitem(last=False)[0])

    def forget(self) -> None:
        self.num_losses += 1
        self._held.clear()
        self._users.clear()
        self._coming.clear()


class AdapterUploads:
    """Of one client, for all peers.

    Args:
        stats: counts what is sent.
        max_wait_s: for a part that is on its way over another connection.
        offers: whether a peer offers adapters: it may have one of ours already, and is asked first.
    """

    def __init__(
        self, stats: StatsRecorder, *, max_wait_s: float, offers: Callable[[PeerId], bool] = lambda _: False
    ) -> None:
        self._stats = stats
        self._max_wait_s = max_wait_s
        self._offers = offers
        self._peers: OrderedDict[PeerId, _Peer] = OrderedDict()
        self._old_peers: WeakKeyDictionary[ClientConnection, _Peer] = WeakKeyDictionary()

    async def send(
        self, connection: ClientConnection, adapter: HopAdapter, call: CallMeta, send: Send, bring: Bring
    ) -> Named:
        """Send a request with what the peer lacks of ``adapter``; what is too much for one message is brought before.

        Raises:
            PeerError: what ``send`` or ``bring`` raised; ``adapter_missing`` only after some tries.
            LocalProtocolError: the peer speaks less than 1.3, and the adapter has more tensors than it takes.
        """
        peer = self._peer(connection)
        parts = self._parts(connection, adapter)
        for number in range(1, MAX_TRIES + 1):
            await peer.arrival(parts, connection, self._max_wait_s)
            lacks = peer.lacks(parts)
            asks = number == 1 and len(lacks) == len(set(parts)) and self._may_have(connection, call)
            changed, brought = self._changes(connection, adapter, call, set(lacks), only_asks=asks)
            lacks = [] if asks else lacks
            pieces = _pieces(changed.adapter_parts, brought)
            num_losses, upload = peer.num_losses, peer.begin(None if pieces else connection, lacks)
            try:
                for piece in pieces:
                    await bring(piece)
                    brought = {}
                replies = await send(changed, brought, is_first=number == 1)
            except PeerRefused as exc:
                is_missing = exc.reason is RefusalReason.ADAPTER_MISSING and adapter.content is not None
                if not is_missing or number == MAX_TRIES:
                    raise
                if peer.num_losses == num_losses:
                    peer.forget()
            else:
                if peer.num_losses == num_losses:
                    peer.confirm(parts)
                return replies
            finally:
                peer.end(upload)
        raise AssertionError("the last try returns or raises")

    def _may_have(self, connection: ClientConnection, call: CallMeta) -> bool:
        """Whether an adapter of which we sent nothing may be there: those that peers offer are without dropout."""
        return connection.knows_adapter_parts and call.seed is None and self._offers(connection.peer_id)

    def _peer(self, connection: ClientConnection) -> _Peer:
        if not connection.knows_adapter_parts:
            return self._old_peers.setdefault(connection, _Peer())
        peer = self._peers.setdefault(connection.peer_id, _Peer())
        self._peers.move_to_end(connection.peer_id)
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return peer

    def _parts(self, connection: ClientConnection, adapter: HopAdapter) -> tuple[bytes, ...]:
        """What must be there: the parts, and which ones the adapter's name stands for."""
        name = adapter.name.encode()
        if adapter.content is None or not connection.knows_adapter_parts:
            return (name,)
        return (name, *adapter.content.parts)

    def _changes(
        self, connection: ClientConnection, adapter: HopAdapter, call: CallMeta, lacks: set[bytes], *, only_asks: bool
    ) -> tuple[CallMeta, Named]:
        """The call that names the adapter, and the tensors that go along."""
        changes: dict[str, Any] = {"adapter": adapter.name}
        brought: Named = {}
        if lacks and adapter.content is not None:
            if connection.knows_adapter_parts:
                changes["adapter_parts"] = adapter.content.parts
                numbered = enumerate(zip(adapter.content.parts, adapter.content.tensors, strict=True))
                for number, (part, tensor) in numbered:
                    if part in lacks and not only_asks:
                        lacks.discard(part)
                        brought[f"adapter.{number}"] = tensor
            else:
                brought = adapter.whole()
                if len(brought) > MAX_OLD_TENSORS:
                    text = f"the adapter has {len(brought)} tensors for one peer, which speaks a protocol before 1.3"
                    raise LocalProtocolError(f"{text} and takes {MAX_OLD_TENSORS}; update the peer")
        if brought:
            self._stats.adapters_sent += 1
            self._stats.adapter_bytes += sum(tensor.nbytes for tensor in brought.values())
        return msgspec.structs.replace(call, **changes), brought


def _pieces(parts: Sequence[bytes], brought: Named) -> list[dict[bytes, torch.Tensor]]:
    """What comes in messages of its own, each within its bounds; none where the request itself can bring it."""
    num_bytes = sum(tensor.nbytes for tensor in brought.values())
    if not parts or (len(brought) <= MAX_PARTS_AT_ONCE and num_bytes <= MAX_BYTES_AT_ONCE):
        return []
    pieces: list[dict[bytes, torch.Tensor]] = []
    num_bytes = 0
    for name, tensor in brought.items():
        if not pieces or len(pieces[-1]) == MAX_PARTS_AT_ONCE or num_bytes + tensor.nbytes > MAX_BYTES_AT_ONCE:
            pieces.append({})
            num_bytes = 0
        pieces[-1][parts[int(name.removeprefix("adapter."))]] = tensor
        num_bytes += tensor.nbytes
    return pieces
