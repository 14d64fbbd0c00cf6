"""What a session has at its peers, and what the client keeps so that it can be built again."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from remote_modules.client.call import Named
from remote_modules.client.history import History
from remote_modules.client.lanes import close_session
from remote_modules.client.session_key import SessionKey
from remote_modules.client.swarm import Swarm
from remote_modules.model.past import length_of
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp, StepRequest

__all__ = ["HopCaches", "PeerCache"]


@dataclass(slots=True)
class PeerCache:
    """The session on one hop's peer, as we know it.

    Attributes:
        position: tokens that the peer holds, before ``pending`` is done.
        step_id: of the next step; 0 while the peer knows nothing of the session.
        version: cache operations that the peer has done.
        pending: selections, and lengths to crop to, that the peer has not been told.
        is_copy: whether it was copied, and did no step since: the peer has no attention mask of it.
        replaces: a session there that is of no more use.
        knows_key: whether the peer has the session's `key`.
        forwards_to: session of the next hop to which the peer sent outputs directly.
    """

    session_id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    position: int = 0
    step_id: int = 0
    version: int = 0
    pending: list[torch.Tensor | int] = field(default_factory=list)
    is_copy: bool = False
    replaces: str = ""
    knows_key: bool = False
    forwards_to: str = ""

    @property
    def next_position(self) -> int:
        """Tokens that the peer will hold once ``pending`` is done."""
        if not self.pending:
            return self.position
        return min([self.position, *(op for op in self.pending if isinstance(op, int))])

    def ops(self) -> tuple[tuple[CacheOp, ...], dict[str, torch.Tensor]]:
        """``pending`` as messages, and their index tensors."""
        ops = []
        tensors = {}
        position = self.position
        for number, op in enumerate(self.pending):
            if isinstance(op, int):
                position = min(position, op)
                ops.append(CacheOp("crop", length=position))
            else:
                name = f"indices.{number}"
                tensors[name] = op
                ops.append(CacheOp("select", tensor=name))
        return tuple(ops), tensors

    def after(self, request: StepRequest) -> PeerCache:
        """As it will be once the peer has done ``request``, which need not have reached it."""
        return PeerCache(
            self.session_id,
            position=request.position + request.call.num_tokens,
            step_id=self.step_id + 1,
        )

    def twin(self) -> PeerCache:
        """A cache that is to become equal to this one, by a copy."""
        return PeerCache(version=self.version, pending=list(self.pending))


@dataclass(slots=True)
class Copy:
    """A KV cache that is, or becomes, a copy of a hop's.

    Attributes:
        hop: the same blocks as the original's, or some of them, at another peer.
        source_id: session of the original.
        num_failures: of copying, in a row.
        task: brings it up to date now.
    """

    hop: Hop
    cache: PeerCache
    source_id: str
    num_failures: int = 0
    task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """What it has is all that it will have."""
        if self.task is not None:
            self.task.cancel()


class HopCaches:
    """Hops of one session, the KV cache of each, and the history of each boundary.

    Cache operations apply to the histories at once; for the peers they are queued, and cost no message of their own.

    Attributes:
        hops: the route; empty before the first step, and after the peers were dropped.
        caches: by span of the hop.
        histories: by first block of the hop. That of the first hop is always there; others may lack theirs.
        past: keys and values that the session began with (`model.past`).
        buddies: copies that take over when a hop fails, by the hop's span.
        targets: copies on their way to a new route.
        coding: of its tensors, chosen with the first route.
        mutex: cache operations come from the caller's thread, copies end on the loop.
    """

    def __init__(self, swarm: Swarm, blocks: Span) -> None:
        self.swarm = swarm
        self.blocks = blocks
        self.hops: list[Hop] = []
        self.caches: dict[Span, PeerCache] = {}
        self.past: Named = {}
        self.buddies: dict[Span, Copy] = {}
        self.targets: list[Copy] = []
        self.mutex = threading.Lock()
        self.coding = swarm.coding
        self._key: SessionKey | None = None
        self.histories: dict[int, History] = {blocks.start: self.new_history()}

    @property
    def position(self) -> int:
        """Tokens in the session; derived from the history."""
        return len(self.first_history)

    @property
    def key(self) -> SessionKey:
        """Says who may bring inputs to the session's peers."""
        if self._key is None:
            self._key = SessionKey()
        return self._key

    @property
    def first_history(self) -> History:
        return self.histories[self.blocks.start]

    def new_history(self) -> History:
        return History(self.swarm.stack.carried, self.swarm.histories, length_of(self.past))

    def keeps_history(self, start: int) -> bool:
        """Whether the inputs of hops that begin at block ``start`` are kept."""
        return start == self.blocks.start or self.swarm.config.keep_histories == "each_hop"

    def begin_with(self, past: Named) -> None:
        """Let an unused session begin with these keys and values."""
        self.past = past
        self.histories = {self.blocks.start: self.new_history()}

    def cache_of(self, hop: Hop) -> PeerCache:
        """That of a hop, which may be new."""
        cache = self.caches.get(hop.span)
        if cache is None:
            cache = self.caches[hop.span] = PeerCache()
        return cache

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens, of which there are more now."""
        for history in self.histories.values():
            history.crop(length)
        if length < length_of(self.past):
            self.past = {name: tensor[:, :, :length] for name, tensor in self.past.items()} if length else {}
        with self.mutex:
            if length == 0 or self.swarm.stack.is_croppable:
                for cache in self._fed_caches():
                    cache.pending.append(length)
                return
            for span, cache in self.caches.items():  # they keep a state that cannot go back: peers compute it anew
                if cache.step_id:
                    self.caches[span] = PeerCache(replaces=cache.session_id)
            for copy in self._copies():
                copy.cache.pending.append(length)  # so it is never used

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``, int64 on the CPU."""
        for history in self.histories.values():
            history.select(indices)
        self.past = {name: tensor[indices] for name, tensor in self.past.items()}
        with self.mutex:
            for cache in self._fed_caches():
                cache.pending.append(indices)

    def _fed_caches(self) -> Iterator[PeerCache]:
        """Those that hold something, or are about to; others get all that was done to the history when they are fed."""
        yield from (cache for cache in self.caches.values() if cache.step_id)
        yield from (copy.cache for copy in self._copies())

    def _copies(self) -> list[Copy]:
        return [*self.buddies.values(), *self.targets]

    def num_rows(self) -> int:
        """Rows of the tokens so far, of which there must be some."""
        rows = next((len(tensor) for tensor in self.past.values()), 0)
        return rows or self.first_history.num_rows("hidden_states")

    def fork(self) -> tuple[HopCaches, list[Copy]]:
        """Equal history, and caches that are equal once the copies are made."""
        fork = HopCaches(self.swarm, self.blocks)
        fork.past, fork.coding = dict(self.past), self.coding
        with self.mutex:
            fork.hops = list(self.hops)
            fork.histories = {start: history.copy() for start, history in self.histories.items()}
            copies = []
            for hop in self.hops:
                cache = self.caches.get(hop.span)
                if cache is not None and cache.position and not cache.replaces:
                    twin = cache.twin()
                    twin.position, twin.step_id, twin.is_copy = cache.position, 1, True
                    fork.caches[hop.span] = twin
                    copies.append(Copy(hop, twin, cache.session_id))
        return fork, copies

    def commit(self, inputs: dict[int, Named], histories: dict[int, History], num_tokens: int) -> None:
        """A step is done by all of ``hops``.

        Args:
            inputs: what entered each hop, by its first block.
            histories: as they were before the step, those of new boundaries among them.
        """
        starts = [hop.span.start for hop in self.hops if self.keeps_history(hop.span.start)]
        self.histories = {start: histories[start] for start in starts if start in histories}
        for start, history in self.histories.items():
            history.append(inputs[start], num_tokens)
        if len(self.caches) > len(self.hops):  # each of which has one
            spans = {hop.span for hop in self.hops}
            for span in [span for span in self.caches if span not in spans]:
                del self.caches[span]

    def drop_peers(self) -> None:
        """Free all KV caches; the first history stays, so that a later step can build them anew."""
        hops, self.hops = self.hops, []
        for hop in hops:
            cache = self.caches.pop(hop.span, None)
            if cache is not None:
                self.free(hop, cache)
        self.histories = {self.blocks.start: self.first_history}
        with self.mutex:
            copies = self._copies()
            self.buddies.clear()
            self.targets.clear()
        for copy in copies:
            copy.stop()
            self.free(copy.hop, copy.cache)

    def replace(self, old: Hop, hops: tuple[Hop, ...], caches: dict[Span, PeerCache]) -> None:
        """Put ``hops`` and their ``caches`` in the place of a hop, and free what it had."""
        index = self.hops.index(old)
        with self.mutex:
            cache = self.caches.pop(old.span, None)
            self.hops[index : index + 1] = hops
            self.caches.update(caches)
        if cache is not None:
            self.free(old, cache)

    def promote(self, failed: Hop) -> Copy | None:
        """The buddy of a hop, if it can take over; it is a buddy no more."""
        with self.mutex:
            copy = self.buddies.pop(failed.span, None)
        if copy is None:
            return None
        copy.stop()
        if copy.cache.next_position > self.position:  # copied in the middle of the step that is made again now
            copy.cache.pending.append(self.position)
        goes_back = copy.cache.next_position < copy.cache.position
        is_elsewhere = copy.hop.peer_id != failed.peer_id  # else the hop moved to where its buddy was
        if not is_elsewhere or copy.cache.next_position == 0 or (goes_back and not self.swarm.stack.is_croppable):
            self.free(copy.hop, copy.cache)
            return None
        return copy

    def free(self, hop: Hop, cache: PeerCache) -> None:
        """Tell the hop's peer, if it can be told, that the cache is of no more use."""
        for session_id in filter(None, (cache.session_id, cache.replaces)):
            close_session(self.swarm, hop.peer_id, session_id)
