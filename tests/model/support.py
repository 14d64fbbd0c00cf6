"""The whole local model as an oracle, and the spans that must agree with it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from remote_modules.model.checkpoint import Checkpoint, open_checkpoint
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.replay import SpanModel
from remote_modules.model.stack import StackSpec, causal_lm_class, find_stack
from remote_modules.spans import Span


def opened(folder: Path) -> tuple[Checkpoint, PreTrainedConfig, type[PreTrainedModel]]:
    checkpoint = open_checkpoint(str(folder))
    config = read_config(checkpoint)
    return checkpoint, config, causal_lm_class(config)


def span_model(folder: Path, span: str, **kwargs: Any) -> SpanModel:
    checkpoint, config, cls = opened(folder)
    model, stack = load_span(checkpoint, config, cls, Span.parse(span), **kwargs)
    return SpanModel(model, stack, Span.parse(span))


def stack_of(model: PreTrainedModel) -> StackSpec:
    return find_stack(model, model.config)


@functools.cache
def returns_one_tensor(family: str) -> bool:
    """Whether the blocks of ``family`` do so in the release at hand; ctrl's and gptj's have not always."""
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family))
    outputs: list[object] = []
    stack_of(model).blocks(model)[0].register_forward_hook(lambda block, args, output: outputs.append(output))
    model.eval()(input_ids=torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    return isinstance(outputs[0], torch.Tensor)


class Trace:
    """Hidden states in the latest call of ``model``: ``[i]`` entered block i, ``[num_blocks]`` left the last."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._states: dict[int, torch.Tensor] = {}
        blocks = stack_of(model).blocks(model)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._enters(index), with_kwargs=True)
        blocks[-1].register_forward_hook(self._leaves(len(blocks)))

    def __getitem__(self, boundary: int) -> torch.Tensor:
        return self._states[boundary]

    def _enters(self, index: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._states[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _leaves(self, index: int) -> Any:
        def hook(block: nn.Module, args: object, output: torch.Tensor) -> None:
            self._states[index] = output

        return hook


@contextmanager
def opened_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the real safetensors files that are opened, by transformers or by us, inside the block."""
    names: set[str] = set()
    real = safe_open

    def counting(path: str, *args: Any, **kwargs: Any) -> Any:
        names.add(Path(path).resolve().name)
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        for module in (
            "transformers.modeling_utils",
            "remote_modules.model.shard_header",
            "remote_modules.model.fingerprint",
            "remote_modules.model.quantized_cache",
        ):
            patch.setattr(f"{module}.safe_open", counting)
        yield names
