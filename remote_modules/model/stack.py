"""Where a transformers model keeps its decoder blocks, and how their owner is called.

The *owner* is the module whose ``forward`` loops over the list of blocks (``LlamaModel``). Nothing here is per
family: the list is the largest `ModuleList` with as many entries as the config has hidden layers.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from remote_modules.errors import CheckpointError, UnsupportedCallError, first_line

__all__ = ["StackSpec", "causal_lm_class", "find_stack", "meta_skeleton"]

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past", "cache_params")  # by release and family


@dataclass(frozen=True)
class StackSpec:
    """The list of blocks of one architecture.

    Attributes:
        path: dotted name of the list from the model, such as ``"model.layers"``.
        num_blocks: entries of the list.
    """

    path: str
    num_blocks: int

    @property
    def list_name(self) -> str:
        return self.path.rpartition(".")[2]

    def owner(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path.rpartition(".")[0])

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        blocks = model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @cached_property
    def _block_key(self) -> re.Pattern[str]:
        return re.compile(rf"(?:^|\.){re.escape(self.list_name)}\.(\d+)\.")

    def block_of_key(self, key: str) -> int | None:
        """The block that a checkpoint key belongs to; None for embeddings, norms and head."""
        match = self._block_key.search(key)
        return int(match[1]) if match else None


def find_stack(model: nn.Module, config: PreTrainedConfig) -> StackSpec:
    """Locate the blocks of ``model``.

    Raises:
        UnsupportedCallError: no list has as many entries as the config has hidden layers.
    """
    num_blocks = config.get_text_config(decoder=True).num_hidden_layers
    best: tuple[int, str] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != num_blocks or "." not in name:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, name)
    if best is None:
        raise UnsupportedCallError(f"no list of {num_blocks} blocks found in {type(model).__name__}")
    return StackSpec(path=best[1], num_blocks=num_blocks)


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `AutoModelForCausalLM` would build.

    Raises:
        UnsupportedCallError: the architecture is no causal language model of transformers.
    """
    mapping = AutoModelForCausalLM._model_mapping  # no public accessor; the name is unchanged since transformers 4.0
    if type(config) not in mapping:
        raise UnsupportedCallError(f"model type '{config.model_type}' has no causal language model in transformers")
    cls: Any = mapping[type(config)]
    found: type[PreTrainedModel] = cls
    return found


def meta_skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without memory, for looking at names and shapes.

    Raises:
        CheckpointError: the config does not describe a model that transformers can build.
    """
    try:
        with torch.device("meta"):
            return cls(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as exc:
        text = first_line(exc)
        raise CheckpointError(f"config of type '{config.model_type}' builds no {cls.__name__}: {text}") from exc


def cache_argument(owner: nn.Module) -> str:
    """The name under which the owner's ``forward`` takes its KV cache.

    Raises:
        UnsupportedCallError: it takes none.
    """
    parameters = inspect.signature(owner.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in parameters:
            return name
    raise UnsupportedCallError(f"{type(owner).__name__}.forward takes no KV cache, expected one of {CACHE_ARGUMENTS}")


def bind_owner_call(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The owner's arguments by name, its ``**kwargs`` unfolded."""
    signature = inspect.signature(owner.forward)
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments
