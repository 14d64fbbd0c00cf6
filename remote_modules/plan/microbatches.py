"""How a training batch is cut into microbatches, and how many of them are under way at once.

The cut follows from shapes and settings alone, never from anything that was measured: kernels round by the shape of
their input, so numbers must not depend on how fast a peer happened to be. Which peers run a microbatch, and when, may.

A pass over p hops with m microbatches keeps each hop busy for m of m + p - 1 turns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

__all__ = ["MAX_DEPTH", "depth", "interleaved", "split"]

MAX_DEPTH = 8  # microbatches of one pass that wait for one hop, travel, or are computed by it

SPARE = 2  # of them wait at the device, so that it does not wait when others are late

T = TypeVar("T", bound=Hashable)


def split(
    rows: int, tokens_per_row: int, *, max_tokens: int, bytes_per_row: int = 0, max_bytes: int = 0
) -> tuple[range, ...]:
    """The rows of each microbatch: as few microbatches as the limits allow, of equal size or one row less.

    A row is never cut: one that is beyond a limit is a microbatch of its own.

    Args:
        max_tokens: of one microbatch, all rows.
        bytes_per_row: what the largest request holds for each row.
        max_bytes: of that request; without meaning where ``bytes_per_row`` is 0.
    """
    most = max(1, max_tokens // max(1, tokens_per_row))
    if bytes_per_row:
        most = min(most, max(1, max_bytes // bytes_per_row))
    count = max(1, -(-rows // most))
    size, larger = divmod(rows, count)
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return tuple(range(start, end) for start, end in zip(starts, starts[1:], strict=False))


def depth(*, compute_s: float, transfer_s: float, rtt_s: float) -> int:
    """Microbatches to have under way at one hop, so that neither its device nor its link ever waits for us.

    Args:
        compute_s: of one microbatch.
        transfer_s: of its request, at the speed of the link.
        rtt_s: of the connection.
    """
    turn_s = max(compute_s, transfer_s)
    if turn_s <= 0.0:
        return MAX_DEPTH
    return min(MAX_DEPTH, SPARE + math.ceil((compute_s + 2.0 * transfer_s + rtt_s) / turn_s - 1e-6))


def interleaved(routes: Sequence[T]) -> list[T]:
    """``routes`` in an order in which each part of the list has about the same mixture of them."""
    totals, seen = Counter(routes), Counter[T]()
    placed = []
    for number, route in enumerate(routes):
        placed.append(((seen[route] + 0.5) / totals[route], number, route))
        seen[route] += 1
    return [route for _, _, route in sorted(placed, key=lambda item: item[:2])]
