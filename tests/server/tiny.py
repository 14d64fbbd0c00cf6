"""A random llama of four tiny blocks: its checkpoint, its engine, and the same model run locally as the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import serving_class
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.probe import probe_stack
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.model.stack import cache_argument
from remote_modules.server.checks import RequestTensors
from remote_modules.server.engine import Engine
from remote_modules.spans import Span

NUM_BLOCKS = 4
HIDDEN_SIZE = 32
TOKEN_BYTES = 2 * 2 * 8 * 4  # keys and values, KV heads, head dimension, float32: of one token in one block


def save_tiny_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def load_engine(folder: Path, span: Span) -> Engine:
    checkpoint = open_checkpoint(str(folder))
    cls, config = serving_class(read_config(checkpoint))
    model, _ = load_span(checkpoint, config, cls, span)
    return Engine(SpanModel(model, probe_stack(cls, config), span))


def owner_call(inputs: torch.Tensor, **changes: Any) -> OwnerArguments:
    """The owner's call for hidden states ``[B, T, D]``."""
    return OwnerArguments(**{"rows": inputs.shape[0], "num_tokens": inputs.shape[1], **changes})


def given(inputs: torch.Tensor, **others: Any) -> RequestTensors:
    """What came with a request, once it is checked."""
    return RequestTensors(inputs={"hidden_states": inputs}, **others)


def hidden(rows: int = 1, num_tokens: int = 1, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, num_tokens, HIDDEN_SIZE, generator=generator)


@dataclass(slots=True)
class Passed:
    """What entered and left each block in one call of the local model."""

    inputs: dict[int, torch.Tensor]
    outputs: dict[int, torch.Tensor]


class LocalModel:
    """The whole model in this process; what entered and left each block is the oracle."""

    def __init__(self, folder: Path) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.model: Any = loaded.eval().requires_grad_(False)
        self._passed = Passed({}, {})
        self._leaf_block: int | None = None
        self._cache_argument = cache_argument(self.model.model)
        for index, block in enumerate(self.model.model.layers):
            block.register_forward_pre_hook(lambda _, args, index=index: self._enter(index, args))
            block.register_forward_hook(lambda _, args, output, index=index: self._leave(index, output))

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def run(
        self,
        embeddings: torch.Tensor,
        cache: DynamicCache | None = None,
        *,
        leaf_block: int | None = None,
        **kwargs: Any,
    ) -> Passed:
        """One call of the owner; with ``leaf_block`` the graph of gradients begins where that block is entered."""
        self._passed, self._leaf_block = Passed({}, {}), leaf_block
        assert self._cache_argument is not None
        call: dict[str, Any] = {self._cache_argument: cache, "use_cache": cache is not None, **kwargs}
        with torch.set_grad_enabled(leaf_block is not None):
            self.model.model(inputs_embeds=embeddings, **call)
        return self._passed

    def _enter(self, index: int, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        entry = args[0]
        if index == self._leaf_block:
            entry = entry.detach().requires_grad_()
        self._passed.inputs[index] = entry
        return (entry, *args[1:])

    def _leave(self, index: int, output: torch.Tensor) -> None:
        self._passed.outputs[index] = output
