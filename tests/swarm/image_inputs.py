"""Inputs of vision-language models as their processors make them, for the tiny configs of `model.shrink`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

__all__ = ["IMAGE_TOKENS", "image_inputs"]

# Tokens of one image of 16 x 16 pixels in patches of 4 x 4.
IMAGE_TOKENS: Mapping[str, int] = {
    "llava": 16,
    "paligemma": 16,
    "aya_vision": 4,
    "gemma3": 4,
    "glm4v": 4,
    "idefics3": 4,
    "internvl": 4,
    "mistral3": 4,
    "qwen2_5_vl": 4,
    "qwen2_vl": 4,
    "qwen3_vl": 4,
    "smolvlm": 4,
}
PATCHED = ("glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
ROWS, SIZE, PATCHES = 2, 16, 4


def image_inputs(config: PreTrainedConfig, *, seed: int = 0) -> dict[str, Any]:
    """Two texts, the first with left padding, each with one image after its third token.

    Args:
        seed: of the pixels; the texts are always the same.
    """
    kind = config.model_type
    image_token: int = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    words = torch.randint(20, 90, (ROWS, 11), generator=torch.Generator().manual_seed(0))
    image = torch.full((ROWS, IMAGE_TOKENS[kind]), image_token)
    ids = torch.cat([words[:, :3], image, words[:, 3:]], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": _pixels(config, seed)}
    if kind in PATCHED:
        inputs["image_grid_thw"] = torch.tensor([[1, PATCHES, PATCHES]] * ROWS)
        inputs["mm_token_type_ids"] = torch.eq(ids, image_token).long()
    elif kind == "gemma3":
        inputs["token_type_ids"] = torch.eq(ids, image_token).long()
    elif kind == "mistral3":
        inputs["image_sizes"] = torch.tensor([[SIZE, SIZE]] * ROWS)
    return inputs


def _pixels(config: PreTrainedConfig, seed: int) -> torch.Tensor:
    if config.model_type in PATCHED:
        vision = config.vision_config
        shape: tuple[int, ...] = (ROWS * PATCHES**2, 3 * vision.temporal_patch_size * vision.patch_size**2)
    elif config.model_type in ("idefics3", "smolvlm"):
        shape = (ROWS, 1, 3, SIZE, SIZE)
    else:
        shape = (ROWS, 3, SIZE, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
