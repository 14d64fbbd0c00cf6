"""The model of the simulations: small enough that a whole run takes milliseconds, and exact in fp32."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules.client.adapters import CallAdapter
from remote_modules.client.call import CallArguments
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import serving_class
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.replay import SpanModel
from remote_modules.server.engine import Engine
from remote_modules.spans import Span
from remote_modules.testing.simulation import Holding

VOCABULARY = 64
PAD = 0


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A local model and its blocks as peers hold them.

    Attributes:
        local: the reference; its embeddings, norm and head are also the client's.
        holdings: by span.
    """

    local: LlamaForCausalLM
    holdings: dict[str, Holding]

    @property
    def num_blocks(self) -> int:
        return int(self.local.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.local.config.hidden_size)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.local.model.embed_tokens(tokens).detach()
        return embedded

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.local.lm_head(self.local.model.norm(hidden_states))
        return logits


def call_of(
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    adapter: CallAdapter | None = None,
) -> CallArguments:
    """As the owner would be called with ``hidden_states`` ``[B, T, D]``."""
    rows, num_tokens = hidden_states.shape[:2]
    return CallArguments(
        rows=rows, num_tokens=num_tokens, position_ids=position_ids, attention_mask=attention_mask, adapter=adapter
    )


@functools.cache
def tiny_model(num_blocks: int, spans: tuple[str, ...]) -> TinyModel:
    """A random llama of ``num_blocks`` blocks, hidden size 32, and an engine for each span."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=PAD,
        eos_token_id=None,
    )
    local = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in local.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    with tempfile.TemporaryDirectory() as folder:
        transformers_logging.disable_progress_bar()
        local.save_pretrained(folder)
        return TinyModel(local, {text: _holding(Path(folder), Span.parse(text)) for text in spans})


def _holding(folder: Path, span: Span) -> Holding:
    checkpoint = open_checkpoint(str(folder))
    cls, config = serving_class(read_config(checkpoint))
    model, stack = load_span(checkpoint, config, cls, span)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # off the file, which is deleted
    engine = Engine(SpanModel(model, stack, span))
    return Holding(engine, engine.kv_costs())
