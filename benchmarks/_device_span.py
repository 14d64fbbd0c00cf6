"""A span of random bf16 blocks on an accelerator, as a module here and as a checkpoint for a peer process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["SHAPES", "add_shape", "build", "config_of", "wait"]

SHAPES = {  # hidden, intermediate, heads, KV heads
    "70b": (8192, 28672, 64, 8),
    "8b": (4096, 14336, 32, 8),
    "tiny": (64, 128, 4, 2),
}


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--blocks", type=int, default=10)


def config_of(shape: str, blocks: int, max_tokens: int) -> LlamaConfig:
    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(4096, max_tokens),
    )


def build(config: LlamaConfig, device: torch.device, folder: Path) -> nn.Module:
    """The owner of the blocks, without its norm, frozen; the same as a checkpoint in ``folder``."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    model.save_pretrained(folder, max_shard_size="2GB")
    owner: Any = model.model
    owner.norm = nn.Identity()
    return owner  # type: ignore[no-any-return]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
