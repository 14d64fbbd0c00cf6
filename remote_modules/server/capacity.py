"""How much of a model fits here, and which part the swarm needs most."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection

import torch
from torch import nn

from remote_modules.peers import PeerRecord
from remote_modules.plan.placement import choose_span, num_blocks_that_fit
from remote_modules.spans import Span

__all__ = ["choose_blocks", "free_bytes", "free_unused", "parameter_bytes"]

WORKSPACE_BYTES = 512 * 1024 * 1024  # activations and allocator slack
KV_TOKENS = 8192  # room that a peer keeps when it chooses how many blocks to hold


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_unused() -> None:
    """Give back the memory of a span that is held no more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parameter_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Weights of one block in ``dtype``."""
    return sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize


def choose_blocks(
    *,
    num_blocks_of_model: int,
    wanted: int | None,
    block_bytes: int,
    kv_token_bytes: int,
    device: torch.device,
    records: list[PeerRecord],
    cuts: Collection[int] = (),
) -> Span:
    """The span to hold.

    Args:
        wanted: how many blocks; None: as many as fit. Fewer are taken where ``cuts`` allow no such span.
        kv_token_bytes: KV cache of one token in one block.
        records: what others hold.
        cuts: where a span may begin and end; empty for everywhere.

    Raises:
        ValueError: not even one block fits, or no span between two cuts.
    """
    length = wanted
    if length is None:
        length = num_blocks_that_fit(
            block_bytes=block_bytes,
            kv_bytes_per_token_block=kv_token_bytes,
            kv_tokens=KV_TOKENS,
            free_bytes=free_bytes(device),
            workspace_bytes=WORKSPACE_BYTES,
            num_blocks=num_blocks_of_model,
        )
    # a holder that is still joining has not measured yet: take it for as fast as the fastest, so that its blocks
    # count as covered
    fastest = max((record.decode_tokens_per_s for record in records), default=0.0) or 1.0
    holders = [(record.span, record.decode_tokens_per_s or fastest) for record in records]
    return choose_span(num_blocks_of_model, length, holders, cuts=cuts)
