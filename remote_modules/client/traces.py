"""What a pass did, and what its backward needs: microbatches, and the hops of each with what went into them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from remote_modules.client.call import CallArguments, Named
from remote_modules.client.coding import Coding
from remote_modules.client.microbatches import Microbatch, cut, whole
from remote_modules.client.swarm import Swarm
from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.stack import StackSpec
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span

__all__ = ["Batch", "Segment", "Trace", "Wanted", "release"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Segment:
    """One hop of a pass and what went into it.

    Attributes:
        kept: where the hop's peer keeps the forward's graph: the connection, and the id of the request there.
    """

    hop: Hop
    inputs: Named
    kept: tuple[ClientConnection, int] | None = None

    def take_kept(self, connection: ClientConnection) -> int | None:
        """The id of the forward whose graph the peer keeps, for the one backward that may use it."""
        if self.kept is not None and self.kept[0] is not connection:
            self.release()
        kept, self.kept = self.kept, None
        return None if kept is None else kept[1]

    def release(self) -> None:
        """No backward will come here: the peer need not keep the graph until its lease ends."""
        kept, self.kept = self.kept, None
        if kept is not None:
            kept[0].release_graph(kept[1])


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients have a use.

    Attributes:
        names: of inputs that cross from block to block, of side inputs, and of ``past``.
        adapters: numbers of tensors in the call's `AdapterSet`.
    """

    names: frozenset[str]
    adapters: frozenset[int]

    def has_own(self, call: CallArguments, stack: StackSpec, span: Span) -> bool:
        """Whether anything that the blocks of ``span`` take for themselves is wanted."""
        own = call.sides_of(stack, span) | call.past_of(stack, span)
        if self.names & own.keys():
            return True
        adapter = call.adapter_of(span)
        return adapter is not None and bool(self.adapters & set(adapter.positions))


@dataclass(frozen=True)  # not slots: weakly referenced
class Trace:
    """What a forward did: the microbatches, and the segments of each."""

    microbatches: Sequence[Microbatch]
    segments: Sequence[list[Segment]]
    batch: Batch

    def route(self, number: int) -> tuple[Hop, ...]:
        return tuple(segment.hop for segment in self.segments[number])

    def needed(self, number: int, swarm: Swarm, wanted: Wanted | None) -> list[Segment]:
        """The segments of a microbatch whose backward has a use: from the first one that has something wanted on."""
        segments, part = self.segments[number], self.microbatches[number]
        if wanted is None or wanted.names & part.inputs.keys():
            return segments
        for index, segment in enumerate(segments):
            if wanted.has_own(part.call, swarm.stack, segment.hop.span):
                return segments[index:]
        return segments

    @property
    def is_kept(self) -> bool:
        """Whether a peer keeps anything of it."""
        return any(segment.kept is not None for segments in self.segments for segment in segments)


@dataclass(frozen=True, slots=True)
class Batch:
    """A whole call.

    Attributes:
        wanted: the most that a backward will be asked for; None for all.
        may_cut: whether what came of its microbatches, if any, could be joined.
        coding: of its tensors; None until it is chosen.
    """

    blocks: Span
    inputs: Named
    call: CallArguments
    wanted: Wanted | None = None
    may_cut: bool = True
    coding: Coding | None = None

    def cut(self, swarm: Swarm) -> list[Microbatch]:
        if not self.may_cut:
            return whole(self.inputs, self.call)
        return cut(swarm.stack, self.blocks, self.inputs, self.call, swarm.config, swarm.most_tokens)

    def cut_finer(self, swarm: Swarm, parts: Sequence[Microbatch], error: PeerRefused) -> list[Microbatch]:
        """Smaller microbatches than ``parts``, for which no peer has room; later batches are cut so, too.

        Raises:
            PeerRefused: it is something else, or there are none.
        """
        if error.reason is not RefusalReason.OUT_OF_MEMORY:
            raise error
        rows, num_tokens = len(parts[0].rows), self.call.num_tokens
        limit = swarm.batch_limit(PeerId(error.peer_id))
        before, swarm.most_tokens = swarm.most_tokens, max(1, rows * num_tokens // 2)
        if 0 < limit < rows * num_tokens:
            swarm.most_tokens = limit
        finer = self.cut(swarm) if rows > 1 else parts
        if len(finer) <= len(parts):
            swarm.most_tokens = before
            what = f"{rows} x {num_tokens} tokens, which cannot be cut into fewer rows, are too much for all peers"
            text = f"{what} of blocks {self.blocks}: {error}; send shorter rows, or serve fewer blocks for each peer"
            raise PeerRefused(text, peer_id=error.peer_id, reason=error.reason) from error
        logger.warning("no room for %d x %d tokens, cutting the batch finer: %s", rows, num_tokens, error)
        return list(finer)


def release(segments: Sequence[Sequence[Segment]]) -> None:
    """No backward will come for these, or no other: let peers drop what they keep. On the event loop."""
    for own in segments:
        for segment in own:
            segment.release()
