"""How fast a device reads its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _device_span import wait

try:
    import triton  # type: ignore[import-not-found]
    import triton.language as tl  # type: ignore[import-not-found]
except ImportError:  # torch brings it along for CUDA alone
    triton = None

__all__ = ["read_rate"]

BLOCK, STEPS = 4096, 8  # numbers of a program, and how often


def _kernel() -> Any:
    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(data, sums, block: tl.constexpr, steps: tl.constexpr):  # type: ignore[no-untyped-def]
        program = tl.program_id(0)
        total = tl.zeros((block,), dtype=tl.int32)
        for step in range(steps):
            total += tl.load(data + (program * steps + step) * block + tl.arange(0, block))
        tl.store(sums + program, tl.sum(total))

    return kernel


def read_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes/s: numbers are added up by a kernel that does nothing else, or by torch where there is no triton."""
    data = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)
    read = _reader(data) if device.type == "cuda" and triton is not None else data.amax
    for _ in range(10):
        read()
    wait(device)
    began_s = time.perf_counter()
    for _ in range(10):
        read()
    wait(device)
    return 10 * data.nbytes / (time.perf_counter() - began_s)


def _reader(data: torch.Tensor) -> Callable[[], object]:
    programs = data.numel() // (BLOCK * STEPS)
    sums = torch.zeros(programs, dtype=torch.int32, device=data.device)
    kernel = _kernel()
    return lambda: kernel[(programs,)](data, sums, BLOCK, STEPS, num_warps=8)
