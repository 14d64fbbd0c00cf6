"""Throughput of each block of a swarm, kept up to date while peers come, go and move.

`throughput.coverage` sums over all peers; here one change costs one slice of an array, whatever the number of
peers. The sums are in fixed point, so that they are the same for any order of changes and come back to
exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from remote_modules.plan.throughput import Floats, Holder

__all__ = ["UNIT_TOKENS_PER_S", "Coverage"]

UNIT_TOKENS_PER_S = 2.0**-20  # of the fixed point; 2**63 of them are 10**5 peers at 8e7 tokens/s each


class Coverage:
    """Sums over the peers that were added and not removed.

    Attributes:
        units: [num_blocks] int64, throughput of each block in `UNIT_TOKENS_PER_S`.
        num_holders: [num_blocks] int64; 0 where nobody holds the block.
    """

    def __init__(self, num_blocks: int, holders: Iterable[Holder] = ()) -> None:
        self.units: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self.num_holders: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        for holder in holders:
            self.add(holder)

    def add(self, holder: Holder) -> None:
        self._change(holder, 1)

    def remove(self, holder: Holder) -> None:
        self._change(holder, -1)

    def _change(self, holder: Holder, count: int) -> None:
        blocks = slice(holder.span.start, holder.span.end)
        self.units[blocks] += count * round(holder.throughput / UNIT_TOKENS_PER_S)
        self.num_holders[blocks] += count

    @property
    def tokens_per_s(self) -> Floats:
        """[num_blocks] float64."""
        return self.units.astype(np.float64) * UNIT_TOKENS_PER_S

    def minimum(self) -> float:
        """Throughput of the weakest block, which is that of the swarm."""
        return float(self.units.min()) * UNIT_TOKENS_PER_S

    def num_missing(self) -> int:
        """Blocks that nobody holds."""
        return int((self.num_holders == 0).sum())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Coverage):
            return NotImplemented
        return np.array_equal(self.units, other.units) and np.array_equal(self.num_holders, other.num_holders)

    __hash__ = None  # type: ignore[assignment]
