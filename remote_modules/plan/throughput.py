"""How fast a swarm is: the one model of throughput that placement, rebalancing and the solver share.

A server runs ``rate`` tokens per second through one block. Every token of a busy swarm needs every block once, so a
server that holds ``L`` blocks spends ``L / rate`` seconds on each token that it takes, and serves each of its blocks at

    ``min(rate / L, network)``

tokens per second, where ``network`` is what its link carries: a token comes in once and goes out once, whatever ``L``
is. The throughput of a block is the sum over the servers that hold it, and that of the swarm its least block's, the
*bottleneck*.

Petals announces ``rate / ((L + 1) / 2)`` instead, the mean over requests that enter anywhere in a span and run to its
end. Summed over the blocks that is up to twice what the server can do; ``rate / L`` is what it can keep up on all of
its blocks at once, and sums up to ``rate`` for any ``L``. One request at a time through an idle swarm does not pay for
length: it takes ``1 / rate`` for each block and a round trip for each hop, wherever spans begin. So the bottleneck
decides, and among spans that are equal in it the longer one, which saves hops.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from remote_modules.spans import Span

__all__ = ["Capacity", "Floats", "Holder", "Layout", "coverage", "span_throughput"]

Floats: TypeAlias = NDArray[np.float64]


def span_throughput(tokens_per_s: float, num_blocks: float, network_tokens_per_s: float = math.inf) -> float:
    """Tokens per second that a server keeps up on each of ``num_blocks`` blocks.

    Args:
        tokens_per_s: through one block.
        network_tokens_per_s: in and out of the server.
    """
    return min(tokens_per_s / num_blocks, network_tokens_per_s)


@dataclass(frozen=True, slots=True)
class Holder:
    """A server as others see it: what it holds and how fast it is.

    Attributes:
        tokens_per_s: through one block; if it is not known an estimate, as 0 counts as absent.
        network_tokens_per_s: what its link carries; infinite while unknown.
    """

    span: Span
    tokens_per_s: float
    network_tokens_per_s: float = math.inf

    @property
    def throughput(self) -> float:
        """Tokens per second on each block of the span."""
        return span_throughput(self.tokens_per_s, len(self.span), self.network_tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a server could hold and do.

    Attributes:
        tokens_per_s: through one block.
        max_blocks: most blocks that it holds, at least 1.
        room_bytes: memory for the blocks, in the unit of `Layout.block_bytes`.
        network_tokens_per_s: what its link carries; infinite while unknown.
        is_full: whether it holds as many as fit, even where fewer would be faster.
    """

    tokens_per_s: float
    max_blocks: int
    room_bytes: float = math.inf
    network_tokens_per_s: float = math.inf
    is_full: bool = False

    def throughput(self, num_blocks: int) -> float:
        """Tokens per second on each block of a span."""
        return span_throughput(self.tokens_per_s, num_blocks, self.network_tokens_per_s)


@dataclass(frozen=True)
class Layout:
    """The blocks of a model as placement sees them. Make it once and use it often: it keeps tables.

    Attributes:
        num_blocks: at least 1.
        cuts: where spans may begin and end, ascending, 0 and ``num_blocks`` among them; empty for everywhere.
        block_bytes: what each block needs with its KV cache; empty where `Capacity.max_blocks` says it all.

    Raises:
        ValueError: ``cuts`` or ``block_bytes`` do not fit ``num_blocks``.
    """

    num_blocks: int
    cuts: tuple[int, ...] = ()
    block_bytes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.cuts and (
            self.cuts[0] != 0 or self.cuts[-1] != self.num_blocks or list(self.cuts) != sorted(set(self.cuts))
        ):
            raise ValueError(f"cuts must ascend from 0 to {self.num_blocks}, got {', '.join(map(str, self.cuts))}")
        if self.block_bytes and len(self.block_bytes) != self.num_blocks:
            raise ValueError(f"layout of {self.num_blocks} blocks got the sizes of {len(self.block_bytes)}")

    @classmethod
    def of(cls, num_blocks: int, cuts: Collection[int] = (), block_bytes: Sequence[float] = ()) -> Layout:
        """From cuts in any order."""
        return cls(num_blocks, tuple(sorted(cuts)), tuple(block_bytes))

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """``[K]``: the cuts, all of them."""
        return np.array(self.cuts or range(self.num_blocks + 1), dtype=np.int64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """``[K, K]``: blocks from one cut to another; not positive where the second is not behind the first."""
        return self.bounds[None, :] - self.bounds[:, None]

    @cached_property
    def _span_bytes(self) -> Floats:
        sums = np.concatenate(([0.0], np.cumsum(self.block_bytes)))[self.bounds]
        bytes_: Floats = sums[None, :] - sums[:, None]
        return bytes_

    def legal(self, capacity: Capacity) -> NDArray[np.bool_]:
        """``[K, K]``: whether a server may hold the blocks from one cut to another."""
        legal = (self.lengths > 0) & (self.lengths <= capacity.max_blocks)
        if self.block_bytes:
            legal &= self._span_bytes <= capacity.room_bytes
        if capacity.is_full:  # cannot grow at either end
            lengths = np.where(legal, self.lengths, 0)
            legal &= (lengths == lengths.max(axis=1)[:, None]) & (lengths == lengths.max(axis=0)[None, :])
        return legal

    def allows(self, span: Span, capacity: Capacity) -> bool:
        """Whether a server may hold ``span``."""
        start, end = np.searchsorted(self.bounds, (span.start, span.end))
        is_at_cuts = end < len(self.bounds) and self.bounds[start] == span.start and self.bounds[end] == span.end
        return bool(is_at_cuts and self.legal(capacity)[start, end])

    def longest(self, capacity: Capacity) -> int:
        """Blocks of the longest span that a server may hold; 0 if there is none."""
        return int(np.max(self.lengths, where=self.legal(capacity), initial=0))

    def first(self, capacity: Capacity) -> Span:
        """The longest span at the lowest start; there must be one."""
        legal = self.legal(capacity)
        start = int(legal.any(axis=1).argmax())
        return self.span(start, int(np.flatnonzero(legal[start])[-1]))

    def heights(self, capacity: Capacity) -> Floats:
        """``[K, K]``: what a server would add to each block of a span; 0 where it may not hold it."""
        legal = self.legal(capacity)
        lengths = np.where(legal, self.lengths, 1)
        added: Floats = np.minimum(capacity.tokens_per_s / lengths, capacity.network_tokens_per_s)
        return np.where(legal, added, 0.0)

    def span(self, start: int, end: int) -> Span:
        """The span between two cuts, by their numbers."""
        return Span(int(self.bounds[start]), int(self.bounds[end]))


def coverage(num_blocks: int, holders: Iterable[Holder]) -> tuple[float, ...]:
    """Throughput of each block; the same to the last bit for any order of ``holders``."""
    shares: list[list[float]] = [[] for _ in range(num_blocks)]
    for holder in holders:
        throughput = holder.throughput
        for block in range(holder.span.start, min(holder.span.end, num_blocks)):
            shares[block].append(throughput)
    return tuple(map(math.fsum, shares))
