"""Which blocks a joining server should hold, and how many fit into its memory.

A swarm is as fast as its weakest block, so a newcomer goes where the throughput is least. Pure arithmetic
over what the other servers announced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from remote_modules.spans import Span

__all__ = ["choose_span", "coverage", "num_blocks_that_fit"]


def choose_span(
    num_blocks_of_model: int, length: int, holders: Sequence[tuple[Span, float]], *, cuts: Collection[int] = ()
) -> Span:
    """The span of ``length`` blocks that most needs another server.

    Windows are compared by their sorted throughputs: the one with the worst block wins, then the one whose
    second worst is worse, and so on; ties go to the longer one, then to the lowest start.

    Args:
        length: at least 1; clipped to the model.
        holders: span and throughput (tokens per second through one block) of every other server, in any
            order. One whose speed is unknown must come with an estimate: 0 would count it as absent.
        cuts: where a span may begin and end, 0 and ``num_blocks_of_model`` among them; empty for everywhere. From
            each of them the longest span of at most ``length`` blocks counts.

    Raises:
        ValueError: ``length`` is less than 1, or than the shortest span between two cuts.

    Source: Petals, server/block_selection.py (the rule, not the code).
    """
    throughputs = coverage(num_blocks_of_model, holders)
    length = min(length, num_blocks_of_model)
    windows = _windows(num_blocks_of_model, length, cuts)

    def need(window: Span) -> list[float]:
        return sorted(throughputs[window.start : window.end]) + [math.inf] * (length - len(window))

    return min(windows, key=need)


def _windows(num_blocks: int, length: int, cuts: Collection[int]) -> list[Span]:
    """What may be chosen, by start."""
    if not cuts:
        return [Span(start, start + length) for start in range(num_blocks - length + 1)]
    ordered = sorted(cuts)
    ends = {start: max((end for end in ordered if end <= start + length), default=start) for start in ordered[:-1]}
    windows = [Span(start, end) for start, end in ends.items() if end > start]
    if not windows:
        shortest = min(end - start for start, end in itertools.pairwise(ordered))
        raise ValueError(
            f"{length} blocks are too few: the shortest span that may be served has {shortest}, as spans may begin and "
            f"end only at {', '.join(map(str, ordered))}"
        )
    return windows


def coverage(num_blocks: int, holders: Sequence[tuple[Span, float]]) -> tuple[float, ...]:
    """Summed throughput of each block; the same to the last bit for any order of ``holders``."""
    shares: list[list[float]] = [[] for _ in range(num_blocks)]
    for span, tokens_per_s in holders:
        for block in range(span.start, min(span.end, num_blocks)):
            shares[block].append(tokens_per_s)
    return tuple(map(math.fsum, shares))


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
