"""How much of a model fits here, and which part the swarm needs most."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from remote_modules.discovery.storage import give_memory_back
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.election import members_of
from remote_modules.plan.placement import choose_span
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

__all__ = ["activation_budget", "choose_blocks", "free_bytes", "free_unused", "parameter_bytes", "upload_budget"]

WORKSPACE_BYTES = 512 * 1024 * 1024  # activations and allocator slack, where they are not measured
KV_TOKENS = 8192  # room that a peer keeps when it chooses how many blocks to hold

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now, by this process: what others use does not count, nor what a cgroup forbids."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_bytes(_MEMINFO), _allowed_bytes(_CGROUP))


def _available_bytes(meminfo: Path) -> int:
    """Free memory of the machine, page cache included; only free pages where the system does not tell."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allowed_bytes(cgroup: Path) -> int:
    """What the cgroup of a container leaves; 2**62 without one."""
    try:
        limit, used = ((cgroup / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return 2**62
    return 2**62 if limit == "max" else max(0, int(limit) - int(used))


def activation_budget(wanted_bytes: int | None, device: torch.device) -> int:
    """For kept graphs: what is wanted, or a quarter of what is free (the KV caches may take half of it)."""
    return free_bytes(device) // 4 if wanted_bytes is None else wanted_bytes


def upload_budget(device: torch.device) -> int:
    """For inputs that lie on an accelerator before their turn: a sixteenth of what is free, nothing on a CPU."""
    return 0 if device.type == "cpu" else free_bytes(device) // 16


def free_unused() -> None:
    """Give back what nothing refers to any more: of a span that is not held now, or of loading one."""
    gc.collect()
    give_memory_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parameter_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Weights of one block in ``dtype``."""
    return sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize


def choose_blocks(layout: Layout, capacity: Capacity, records: Sequence[PeerRecord], *, token_bytes: int) -> Span:
    """The span to hold.

    Args:
        layout: with the size of each block, KV cache included, unless ``capacity`` says how many to hold.
        capacity: of this peer; a speed of 0 is taken for that of the fastest of the others.
        records: what others hold.
        token_bytes: of one token between blocks.

    Raises:
        ValueError: no span that may be served fits.
    """
    members = members_of(records, token_bytes=token_bytes, default_tokens_per_s=capacity.tokens_per_s)
    if not capacity.tokens_per_s:
        fastest = max((member.capacity.tokens_per_s for member in members), default=1.0)
        capacity = Capacity(
            tokens_per_s=fastest,
            max_blocks=capacity.max_blocks,
            room_bytes=capacity.room_bytes,
            network_tokens_per_s=capacity.network_tokens_per_s,
            is_full=capacity.is_full,
        )
    holders = [member.holder for member in members if member.state is not PeerState.DRAINING]
    return choose_span(layout, capacity, holders)
