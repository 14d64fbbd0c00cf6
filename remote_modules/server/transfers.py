"""Tensors between the host and an accelerator, so that the accelerator waits for them as little as may be.

Answers leave through pinned memory, all of a request with one wait. Inputs of a pass without a session come in over a
stream of their own while the request waits for its turn. On a CPU there is nothing to move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["to_cpu", "uploaded"]

LARGE_BYTES = 1 << 20  # below, a plain copy costs less than what is around it

Named = dict[str, torch.Tensor]


def to_cpu(tensors: Mapping[str, torch.Tensor], dtype_of: Callable[[str, torch.Tensor], torch.dtype]) -> Named:
    """Copies on the CPU, in the dtypes wanted; all of them have arrived."""
    found: Named = {}
    devices = set()
    for name, tensor in tensors.items():
        dtype = dtype_of(name, tensor)
        if tensor.is_cuda and tensor.numel() * dtype.itemsize >= LARGE_BYTES:
            pinned = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
            found[name] = pinned.copy_(tensor.to(dtype), non_blocking=True)
            devices.add(tensor.device)
        else:
            found[name] = tensor.to("cpu", dtype)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return found


def uploaded(tensors: Mapping[str, torch.Tensor], device: torch.device) -> Named:
    """Large tensors on ``device``, without waiting for what runs there; as they are, where there is no room.

    Not on the event loop, nor on the device thread: it waits for the copies.
    """
    found = dict(tensors)
    if device.type != "cuda":
        return found
    stream, compute = torch.cuda.Stream(device), torch.cuda.default_stream(device)
    try:
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                if tensor.numel() * tensor.itemsize >= LARGE_BYTES:
                    found[name] = tensor.to(device, non_blocking=True)
                    found[name].record_stream(compute)  # its memory is not given away while that reads it
    except torch.OutOfMemoryError:  # the device thread will see whether it fits by then
        found = dict(tensors)
    stream.synchronize()
    return found
