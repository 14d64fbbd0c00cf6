"""Telling models apart without reading them.

`model_key` names an architecture: it is what lookups ask for, and anyone who holds a config can compute it. Two
fine-tunes of one model share it. `block_digests` tells their weights apart: per block, a digest of the first row of
each of its tensors. Peers announce the digests of their blocks; a client that has the checkpoint compares them with
its own, and peers that disagree never share a route.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from remote_modules.model.checkpoint import Checkpoint
from remote_modules.model.stack import StackSpec

__all__ = ["block_digests", "model_key"]

# Few and old fields, so that different transformers releases agree on the key.
_KEY_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_DIGEST_CHARACTERS = 12


def model_key(config: PreTrainedConfig) -> str:
    """Digest of the architecture, 32 hex characters; the same for an id, a folder, a config or a model."""
    text = config.get_text_config(decoder=True)
    fields = {name: getattr(text, name, None) for name in _KEY_FIELDS}
    canonical = json.dumps({"model_type": text.model_type, **fields}, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def block_digests(checkpoint: Checkpoint, stack: StackSpec, blocks: Iterable[int]) -> dict[int, str]:
    """Digest of each block that can be read locally; opens no file but those of these blocks, and fetches nothing."""
    digests = {}
    where = stack.blocks_of_keys(checkpoint.weight_map)
    for block in blocks:
        files = checkpoint.local_part(lambda key, block=block: where.get(key) == block)  # type: ignore[misc]
        if files:
            digests[block] = _digest(files)
    return digests


def _digest(files: dict[Path, list[str]]) -> str:
    parts = {}
    for path, keys in files.items():
        with safe_open(str(path), framework="pt") as file:
            for key in keys:
                tensor = file.get_slice(key)
                shape = tensor.get_shape()
                row = tensor[:1] if len(shape) > 1 else file.get_tensor(key)
                head = f"{key} {tensor.get_dtype()} {shape}".encode()
                parts[key] = head + row.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256()
    for key in sorted(parts):  # by name, not by file: the same weights may be sharded in another way
        digest.update(parts[key])
    return digest.hexdigest()[:_DIGEST_CHARACTERS]
