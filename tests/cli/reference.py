"""The built-in model in this process, to compare with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from remote_modules.model.checkpoint import built_in_path

__all__ = ["encode", "generate_here", "text_of"]


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(built_in_path())


@functools.cache
def _model() -> Any:
    transformers_logging.disable_progress_bar()  # else its thread stays
    return AutoModelForCausalLM.from_pretrained(built_in_path(), dtype=torch.float32)


def encode(text: str) -> list[int]:
    ids: list[int] = _tokenizer()(text)["input_ids"]
    return ids


def text_of(ids: list[int]) -> str:
    return str(_tokenizer().decode(ids, skip_special_tokens=True))


def generate_here(ids: list[int], num_tokens: int) -> list[int]:
    """What the model goes on with, greedily."""
    inputs = torch.tensor([ids])
    mask = torch.ones_like(inputs)
    output = _model().generate(inputs, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens)
    new: list[int] = output[0, len(ids) :].tolist()
    return new
