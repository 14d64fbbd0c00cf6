"""The whole local model as an oracle, and the spans that must agree with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from remote_modules.model.capture import OwnerCall, OwnerCapture
from remote_modules.model.checkpoint import Checkpoint, open_checkpoint
from remote_modules.model.classes import model_class
from remote_modules.model.kv import SpanCache
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.probe import probe_stack
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span

Named = Mapping[str, torch.Tensor]


def opened(folder: Path) -> tuple[Checkpoint, PreTrainedConfig, type[PreTrainedModel]]:
    checkpoint = open_checkpoint(str(folder))
    cls, config = model_class(read_config(checkpoint))
    return checkpoint, config, cls


def span_model(folder: Path, span: str, **kwargs: Any) -> SpanModel:
    """The blocks ``span`` of a checkpoint; ``kwargs`` are `load_span`'s."""
    checkpoint, config, cls = opened(folder)
    model, _ = load_span(checkpoint, config, cls, Span.parse(span), **kwargs)
    return SpanModel(model, probe_stack(cls, config), Span.parse(span))


def stack_of(model: PreTrainedModel) -> StackSpec:
    return probe_stack(type(model), model.config)


def run_span(
    part: SpanModel,
    hidden_states: torch.Tensor,
    blocks: Span | None = None,
    cache: SpanCache | None = None,
    **arguments: Any,
) -> torch.Tensor:
    """Hidden states ``[B, T, D]`` through ``blocks``, by default all of ``part``; ``arguments`` are the owner's."""
    rows, num_tokens = hidden_states.shape[:2]
    owner = OwnerArguments(rows=rows, num_tokens=num_tokens, **arguments)
    return part.run({"hidden_states": hidden_states}, blocks or part.span, owner, cache)["hidden_states"]


class Trace:
    """The latest call of ``model``: how the owner of its blocks was called, and what went from block to block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.stack = stack_of(model)
        self._capture = OwnerCapture()
        self._capture.hook(self.stack.owner(model))
        self._call: OwnerCall | None = None
        self._carried: dict[int, Named] = {}
        self._sides: dict[str, torch.Tensor] = {}
        for index, block in enumerate(self.stack.blocks(model)):
            block.register_forward_pre_hook(self._enters(index), with_kwargs=True)
            block.register_forward_hook(self._leaves(index))

    def __getitem__(self, boundary: int) -> torch.Tensor:
        """Hidden states: ``[i]`` entered block i, ``[num_blocks]`` left the last."""
        return self._carried[boundary]["hidden_states"]

    def carried(self, boundary: int) -> Named:
        """What went from block ``boundary - 1`` to the next, by the names that travel."""
        return self._carried[boundary]

    def sides(self, blocks: Span) -> dict[str, torch.Tensor]:
        """The side inputs of ``blocks``, by the names that travel."""
        return {name: self._sides[name] for name in self.stack.side_specs(blocks)}

    def arguments(self, **changes: Any) -> OwnerArguments:
        """How the owner was called, as a client would send it."""
        call = self._call
        assert call is not None
        known: dict[str, Any] = {
            "position_ids": call.position_ids,
            "attention_mask": call.attention_mask,
            "tensors": call.tensors,
            "options": call.options,
            "use_cache": call.use_cache,
        }
        return OwnerArguments(rows=call.rows, num_tokens=call.num_tokens, **(known | changes))

    def _enters(self, index: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments: dict[int | str, Any] = dict(enumerate(args))
            arguments.update(kwargs)
            if index == 0:
                self._call = self._capture.current
                self._carried = {0: {"hidden_states": args[0] if args else kwargs["hidden_states"]}}
            self._sides |= {side.name(index): arguments[side.key] for side in self.stack.sides}

        return hook

    def _leaves(self, index: int) -> Any:
        def hook(block: nn.Module, args: object, output: Any) -> None:
            self._carried[index + 1] = self.stack.unpack(output)

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
