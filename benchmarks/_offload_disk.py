"""A model whose blocks are on disk, as an arm: accelerate reads them for each token, and they are in no page cache.

A model that does not fit evicts its own pages while it is read, in order, so that none is left when the next token
comes. Here the model would fit: before each token its files are dropped from the page cache (``posix_fadvise``), which
is not timed. How much was then read from the device is counted (``/proc/self/io``), not assumed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _arms import ModelArm, Sample
from transformers import AutoModelForCausalLM, DynamicCache

from remote_modules.model.stack import cache_argument

__all__ = ["DiskArm", "ReadArm", "disk_arm", "memory_arm"]

CHUNK_BYTES = 1 << 23
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers": "disk",
}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_pages(folder: Path) -> None:
    """Take the weights in ``folder`` out of the page cache; what a process has mapped stays."""
    for path in shards(folder):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)  # pages that are not on disk yet would stay, too
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def bytes_read() -> int:
    """By this process from devices, so far."""
    with open("/proc/self/io", encoding="ascii") as lines:
        return next(int(line.partition(":")[2]) for line in lines if line.startswith("read_bytes"))


@dataclass
class DiskArm(ModelArm):
    """Attributes:
    folder: where its weights are.
    block_bytes: of the weights of all blocks.
    read_shares: of ``block_bytes``, what each token read from the device.
    """

    folder: Path = Path()
    block_bytes: int = 1
    read_shares: list[float] = field(default_factory=list)

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        cache, ids, seconds, output = DynamicCache(config=self.model.config), list(prompt), [], []
        with torch.no_grad():
            for _ in range(tokens + 1):
                drop_pages(self.folder)
                before, began_s = bytes_read(), time.perf_counter()
                arguments: dict[str, Any] = {cache_argument(self.model.model) or "": cache, "use_cache": True}
                logits = self.model(input_ids=torch.tensor([ids]), logits_to_keep=1, **arguments).logits
                ids = [int(logits[0, -1].argmax())]
                seconds.append(time.perf_counter() - began_s)
                self.read_shares.append((bytes_read() - before) / self.block_bytes)
                output += ids
        return Sample(seconds[0], sum(seconds[1:]) / tokens, tuple(output))


@dataclass
class ReadArm:
    """Nothing but reading the weights once for each token, front to back: what no offloading from this disk exceeds."""

    folder: Path
    name: str = "reading the disk alone"
    is_paced: bool = False

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        seconds = []
        buffer = bytearray(CHUNK_BYTES)
        for _ in range(tokens + 1):
            drop_pages(self.folder)
            began_s = time.perf_counter()
            for path in shards(self.folder):
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            seconds.append(time.perf_counter() - began_s)
        return Sample(seconds[0], sum(seconds[1:]) / tokens, None)


def disk_arm(folder: Path, scratch: Path) -> DiskArm:
    """As accelerate's documentation has it: a device map with ``"disk"``, and an offload folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE_MAP, offload_folder=str(scratch))
    if any(parameter.device.type != "meta" for parameter in model.model.layers.parameters()):
        raise SystemExit("accelerate has not put all blocks on disk")
    block_bytes = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    return DiskArm("accelerate disk offload", model.eval(), folder=folder, block_bytes=block_bytes)


def memory_arm(folder: Path) -> ModelArm:
    """Weights stay in memory, as if they fitted; on a CPU accelerate's hooks have nothing to copy."""
    from accelerate import cpu_offload

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for block in model.model.layers:
        cpu_offload(block, execution_device=torch.device("cpu"))
    return ModelArm("accelerate CPU offload (blocks fit)", model)
