"""What a session has at its peers, and what the client keeps so that it can be built again."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import torch

from remote_modules.client.call import Named
from remote_modules.client.history import History
from remote_modules.client.swarm import Swarm
from remote_modules.model.past import length_of
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span
from remote_modules.wire import messages
from remote_modules.wire.messages import CacheOp

__all__ = ["HopCaches", "PeerCache"]


@dataclass(slots=True)
class PeerCache:
    """The session on one hop's peer, as we know it.

    Attributes:
        position: tokens that the peer holds, before ``pending`` is done.
        step_id: of the next step; 0 while the peer knows nothing of the session.
        pending: selections, and lengths to crop to, that the peer has not been told.
        replaces: a session there that is of no more use.
    """

    session_id: str = field(default_factory=lambda: secrets.token_hex(16))
    position: int = 0
    step_id: int = 0
    pending: list[torch.Tensor | int] = field(default_factory=list)
    replaces: str = ""

    @property
    def next_position(self) -> int:
        """Tokens that the peer will hold once ``pending`` is done."""
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


class HopCaches:
    """Hops of one session, the KV cache of each, and the history of each boundary.

    Cache operations apply to the histories at once; for the peers they are queued, and cost no message of their own.

    Attributes:
        hops: the route; empty before the first step, and after the peers were dropped.
        caches: by span of the hop.
        histories: by first block of the hop. That of the first hop is always there; others may lack theirs.
        past: keys and values that the session began with (`model.past`).
    """

    def __init__(self, swarm: Swarm, blocks: Span) -> None:
        self.swarm = swarm
        self.blocks = blocks
        self.hops: list[Hop] = []
        self.caches: dict[Span, PeerCache] = {}
        self.past: Named = {}
        self.histories: dict[int, History] = {blocks.start: self.new_history()}

    @property
    def position(self) -> int:
        """Tokens in the session; derived from the history."""
        return len(self.first_history)

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

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens, of which there are more now."""
        for history in self.histories.values():
            history.crop(length)
        if length < length_of(self.past):
            self.past = {name: tensor[:, :, :length] for name, tensor in self.past.items()} if length else {}
        for span, cache in self._fed_caches():
            if length == 0 or self.swarm.stack.is_croppable:
                cache.pending.append(length)
            else:  # it keeps a state that cannot go back: the peer computes it anew
                self.caches[span] = PeerCache(replaces=cache.session_id)

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``, int64 on the CPU."""
        for history in self.histories.values():
            history.select(indices)
        self.past = {name: tensor[indices] for name, tensor in self.past.items()}
        for _, cache in self._fed_caches():
            cache.pending.append(indices)

    def _fed_caches(self) -> list[tuple[Span, PeerCache]]:
        """Those that hold something; others get all that was done to the history when they are fed."""
        return [(span, cache) for span, cache in self.caches.items() if cache.step_id]

    def num_rows(self) -> int:
        """Rows of the tokens so far, of which there must be some."""
        rows = next((len(tensor) for tensor in self.past.values()), 0)
        return rows or self.first_history.num_rows("hidden_states")

    def fork(self) -> HopCaches:
        """Equal history, no caches yet."""
        fork = HopCaches(self.swarm, self.blocks)
        fork.histories = {self.blocks.start: self.first_history.copy()}
        fork.past = dict(self.past)
        return fork

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

    def free(self, hop: Hop, cache: PeerCache) -> None:
        """Tell the hop's peer, if it can be told, that the cache is of no more use."""
        connection = self.swarm.open_connection(hop.peer_id, "step")
        if connection is not None:
            for session_id in filter(None, (cache.session_id, cache.replaces)):
                connection.send(messages.CloseSession(session_id))
