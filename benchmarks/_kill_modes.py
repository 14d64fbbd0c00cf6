"""The model of `benchmarks/kills.py`, and the ways to call it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["MODES", "Mode", "assisted", "build_checkpoint", "generate", "greedy", "prompt"]

PROMPT_TOKENS = 8
VOCABULARY = 128

Mode = Callable[[Any], list[torch.Tensor]]  # of a model, to what must be equal


def build_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prompt(seed: int = 1, *, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, num_tokens: int, **changes: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **options | {"max_new_tokens": num_tokens} | changes)


def greedy(num_tokens: int) -> Mode:
    return lambda model: [generate(model, prompt(), num_tokens)]


def beams(model: Any) -> list[torch.Tensor]:
    return [generate(model, prompt(2, rows=2), 60, num_beams=3)]


def prompt_lookup(model: Any) -> list[torch.Tensor]:
    return [generate(model, prompt(3), 200, prompt_lookup_num_tokens=3)]


def sampling(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [generate(model, prompt(4), 200, do_sample=True, temperature=0.8)]


def ragged(model: Any) -> list[torch.Tensor]:
    """A left-padded batch."""
    ids, mask = prompt(5, rows=3), torch.ones(3, PROMPT_TOKENS, dtype=torch.int64)
    for row, excess in ((0, 4), (2, 1)):
        ids[row, :excess], mask[row, :excess] = 0, 0
    return [generate(model, ids, 120, attention_mask=mask)]


def assisted(draft: Any) -> Mode:
    return lambda model: [generate(model, prompt(6), 120, assistant_model=draft)]


def training(model: Any) -> list[torch.Tensor]:
    """Steps on a soft prompt; its values after each."""
    soft = torch.zeros(1, 4, model.config.hidden_size, requires_grad=True)
    optimizer, ids, found = torch.optim.SGD([soft], lr=0.5), prompt(7), []
    for _ in range(60):
        embedded = torch.cat([soft, model.get_input_embeddings()(ids)], dim=1)
        labels = torch.cat([torch.full((1, 4), -100), ids], dim=1)
        loss = model(inputs_embeds=embedded, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        found.append(soft.detach().clone())
    return found


MODES: dict[str, Mode] = {
    "beam search": beams,
    "prompt lookup": prompt_lookup,
    "sampling": sampling,
    "ragged batch": ragged,
    "training": training,
}
