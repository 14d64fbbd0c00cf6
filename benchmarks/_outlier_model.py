"""The built-in model with outlier channels, as large language models have them.

Two channels of the residual stream hold a constant: the embeddings write it, and nothing else writes or reads them.
They change what the norms divide by, so norms are scaled back and the other weights trained for some steps, with which
the constants stay: a model that works, with channels some ten times as large as the others at every boundary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _lora import Task
from transformers import AutoModelForCausalLM, AutoTokenizer

from remote_modules.model.checkpoint import built_in_path

__all__ = ["CONSTANTS", "channel_ratio", "save_outlier_model"]

CONSTANTS = {5: 10.0, 77: -8.0}
SCALE_TOKENS = (16, 128)
RATE = 1e-3


def save_outlier_model(folder: Path, ids: torch.Tensor, steps: int) -> None:
    """Write a checkpoint to ``folder``, trained on the text ``ids`` for so many steps."""
    model: Any = AutoModelForCausalLM.from_pretrained(built_in_path(), dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    rows, num_tokens = SCALE_TOKENS
    _add_channels(model, ids[: rows * num_tokens].reshape(rows, num_tokens))
    _train(model, ids, steps)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(built_in_path()).save_pretrained(folder)


def channel_ratio(hidden_states: torch.Tensor) -> float:
    """The size of the largest channel (root mean square over tokens) by that of the median."""
    sizes = hidden_states.flatten(0, -2).float().square().mean(0).sqrt()
    return float(sizes.max() / sizes.median())


def _add_channels(model: Any, tokens: torch.Tensor) -> None:
    norms = _norms(model)
    divisors: dict[int, torch.Tensor] = {}

    def note(number: int) -> Any:
        def hook(norm: Any, args: Any) -> None:
            divisors[number] = args[0].square().mean(-1).sqrt()

        return hook

    handles = [norm.register_forward_pre_hook(note(number)) for number, norm in enumerate(norms)]
    with torch.no_grad():
        model(tokens)
        before = dict(divisors)
        for channel, value in CONSTANTS.items():
            model.model.embed_tokens.weight[:, channel] = value
        for weight, dim in _touching(model):
            weight.index_fill_(dim, torch.tensor(list(CONSTANTS)), 0.0)
        for number, norm in enumerate(norms):  # each sees what those before it made
            model(tokens)
            norm.weight *= (divisors[number] / before[number]).median()
    for handle in handles:
        handle.remove()


def _norms(model: Any) -> list[Any]:
    of_layers = [
        norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    return [*of_layers, model.model.norm]


def _touching(model: Any) -> list[tuple[torch.Tensor, int]]:
    """Weights that write to the residual stream, and norms that read it; with the dimension of its channels."""
    writers = [
        (w, 0) for layer in model.model.layers for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
    ]
    return [*writers, *((norm.weight, 0) for norm in _norms(model))]


def _train(model: Any, ids: torch.Tensor, steps: int) -> None:
    """All but the embeddings, and what touches the constants."""
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    task = Task(steps=steps)
    for step in range(steps):
        batch = task.batch(ids, step)
        model(batch, labels=batch, use_cache=False).loss.backward()
        for weight, dim in _touching(model):
            assert weight.grad is not None
            weight.grad.index_fill_(dim, torch.tensor(list(CONSTANTS)), 0.0)
        optimizer.step()
        optimizer.zero_grad()
