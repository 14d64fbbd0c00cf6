"""Which blocks a joining server should hold, and how many fit into its memory.

A swarm is as fast as its weakest block (`plan.throughput`), so a newcomer goes where it raises the least throughput
most. Pure arithmetic over what the other servers announced.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remote_modules.plan.throughput import Capacity, Floats, Holder, Layout, coverage
from remote_modules.spans import Span

__all__ = ["best_span", "bottlenecks_with", "choose_span", "num_blocks_that_fit", "pressure"]

# Of two blocks, one with throughput 10 % of the mean below the other counts e**1.6 = 5 times as much.
SHARPNESS = 16.0
EQUAL = 1e-9  # spans that differ by less are equal, whatever a machine's rounding is


def choose_span(layout: Layout, capacity: Capacity, holders: Sequence[Holder]) -> Span:
    """The span that most raises the bottleneck of the swarm.

    Of those that raise it equally, as all do while other blocks are worse, the one that helps the weakest blocks most
    (`pressure`), then the longer one, then the one with the lowest start. Fewer blocks than fit are chosen where
    that gives the weakest ones more.

    Args:
        holders: every other server, in any order.

    Raises:
        ValueError: no span between two cuts fits into ``capacity``.

    Takes O(holders x blocks + cuts^2) time, about 0.1 ms for 80 blocks.
    """
    totals = np.array(coverage(layout.num_blocks, holders))
    return best_span(layout, capacity, totals)[0]


def best_span(
    layout: Layout, capacity: Capacity, totals: Floats, *, allowed: NDArray[np.bool_] | None = None
) -> tuple[Span, float]:
    """`choose_span`, and the bottleneck with it.

    Args:
        totals: ``[num_blocks]`` throughput of each block without this server, tokens per second.
        allowed: ``[K, K]`` legal spans, from cut to cut; None: all that fit into ``capacity``.
    """
    legal = layout.legal(capacity) if allowed is None else allowed
    if not legal.any():
        raise ValueError(_too_small(layout, capacity))
    heights = layout.heights(capacity)
    bottlenecks = np.where(legal, bottlenecks_with(layout, totals, heights), -1.0)
    best = float(bottlenecks.max())
    sums = np.concatenate(([0.0], np.cumsum(pressure(totals, capacity.tokens_per_s))))[layout.bounds]
    relief = (sums[None, :] - sums[:, None]) * -np.expm1(-SHARPNESS / scale_of(totals, capacity.tokens_per_s) * heights)
    relief[(bottlenecks < best * (1 - EQUAL)) | ~legal] = -1.0
    equal = relief >= float(relief.max()) * (1 - EQUAL)
    start, end = np.unravel_index(int(np.argmax(np.where(equal, layout.lengths, 0))), equal.shape)
    return layout.span(int(start), int(end)), float(bottlenecks[start, end])


def scale_of(totals: Floats, added_tokens_per_s: float) -> float:
    """The mean throughput once a server has joined: what differences between blocks are measured by."""
    return (float(totals.sum()) + added_tokens_per_s) / len(totals) or 1.0


def pressure(totals: Floats, added_tokens_per_s: float) -> Floats:
    """``[num_blocks]``: how much each block needs another server, falling exponentially with its throughput.

    The sum over all blocks falls with every useful move and by nothing else, so that servers which move one after the
    other to lower it come to rest.
    """
    needs: Floats = np.exp((totals.min() - totals) * (SHARPNESS / scale_of(totals, added_tokens_per_s)))
    return needs


def bottlenecks_with(layout: Layout, totals: Floats, heights: Floats) -> Floats:
    """``[K, K]``: the least throughput of all blocks if the ones from one cut to another got ``heights`` more."""
    parts = np.minimum.reduceat(totals, layout.bounds[:-1])  # the blocks between two cuts, which nobody holds apart
    count = len(layout.bounds)
    inside = np.full((count, count), np.inf)
    inside[:, 1:] = parts
    inside[layout.lengths <= 0] = np.inf
    inside = np.minimum.accumulate(inside, axis=1)
    before = np.concatenate(([np.inf], np.minimum.accumulate(parts)))
    behind = np.concatenate((np.minimum.accumulate(parts[::-1])[::-1], [np.inf]))
    outside = np.minimum(before[:, None], behind[None, :])
    least: Floats = np.minimum(inside + heights, outside)
    return least


def _too_small(layout: Layout, capacity: Capacity) -> str:
    shortest = int(np.diff(layout.bounds).min())
    if capacity.max_blocks < shortest:
        ends = ", ".join(map(str, layout.bounds))
        return (
            f"{capacity.max_blocks} blocks are too few: the shortest span that may be served has {shortest}, as spans "
            f"may begin and end only at {ends}"
        )
    return f"no span fits into {capacity.room_bytes:.0f} bytes: use a smaller KV budget, quantization or another device"


def num_blocks_that_fit(
    *,
    block_bytes: int,
    kv_bytes_per_token_block: int,
    kv_tokens: int,
    free_bytes: int,
    workspace_bytes: int,
    num_blocks: int,
) -> int:
    """How many blocks a device can hold with their KV cache, at most ``num_blocks``.

    Args:
        block_bytes: weights of one block, as stored.
        kv_bytes_per_token_block: keys and values of one token in one block.
        kv_tokens: tokens, over all sessions, that every block must have room for.
        free_bytes: free on the device now, not its total.
        workspace_bytes: kept for activations, whatever the number of blocks.

    Raises:
        ValueError: not even one fits.
    """
    kv_bytes = kv_bytes_per_token_block * kv_tokens
    fitting = (free_bytes - workspace_bytes) // (block_bytes + kv_bytes)
    if fitting < 1:
        raise ValueError(
            f"one block needs {block_bytes + kv_bytes + workspace_bytes} bytes (weights {block_bytes}, "
            f"KV cache of {kv_tokens} tokens {kv_bytes}, workspace {workspace_bytes}), "
            f"but {free_bytes} are free; lower the KV budget or use another device"
        )
    return min(fitting, num_blocks)
