"""Where a transformers model keeps its decoder blocks, and how they are called.

The *owner* is the module whose ``forward`` loops over the list of blocks (``LlamaModel``). `find_stack` looks at names
and sizes alone; `model.probe` fills in the rest of a `StackSpec` by watching a tiny model of the same structure run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from remote_modules.errors import CheckpointError, UnsupportedCallError, first_line
from remote_modules.model.building import building
from remote_modules.model.tensors import TensorSpec
from remote_modules.spans import Span

__all__ = [
    "SideInput",
    "StackSpec",
    "cache_argument",
    "find_stack",
    "input_argument",
    "meta_skeleton",
    "takes_argument",
]

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past", "cache_params")  # by release and family
INPUT_ARGUMENTS = ("inputs_embeds", "hidden_states")


@dataclass(frozen=True)
class SideInput:
    """An argument of the blocks, beside what the block before returned, that depends on the text.

    Attributes:
        key: position or name of the argument.
        is_per_block: whether each block gets another tensor.
        spec: shape and kind.
    """

    key: int | str
    is_per_block: bool
    spec: TensorSpec

    def name(self, block: int) -> str:
        """Of the tensor that travels."""
        return f"side.{self.key}.{block}" if self.is_per_block else f"side.{self.key}"


@dataclass(frozen=True)
class StackSpec:
    """The list of blocks of one model, and what crosses from one block to the next.

    Attributes:
        path: dotted name of the list from the model, such as ``"model.layers"``.
        num_blocks: entries of the list.
        hidden: the tensor that every block takes and returns.
        container, arity: `tuple` or `list` and its length when blocks return one; None and 0 for a bare tensor.
        states: position in that container to its tensor, for what the next block takes beside hidden states.
        state_keys: position in that container to the argument of the next block.
        sides: content-dependent arguments.
        owner_tensors: what the owner was given beside inputs, mask, positions and cache.
        indirect: those of them that reach the blocks through side inputs alone.
        takes_ids: whether its forward is replayed with token ids in the place of ``inputs_embeds``.
        cache_map: for each block, the layers of the KV cache that it fills.
        num_layers: of that cache; 0 if the class knows by itself.
        cache_class: its class, where it is not `DynamicCache`.
        is_croppable: whether tokens can be taken back from the cache without computing it anew.
        replays_steps: whether a cache is rebuilt exactly only by the same steps (rotary tables that follow the length).
        cuts: boundaries where one span may end and the next begin, 0 and ``num_blocks`` among them; empty: all.
        no_cache: why calls with a KV cache are not carried; "" if they are.
        hides_past: whether ``use_cache=True`` alone makes the model keep its past where nobody sees it.
    """

    path: str
    num_blocks: int
    hidden: TensorSpec = TensorSpec(("B", "T", "1H"))
    container: type | None = None
    arity: int = 0
    states: Mapping[int, TensorSpec] = field(default_factory=dict)
    state_keys: Mapping[int, int | str] = field(default_factory=dict)
    sides: tuple[SideInput, ...] = ()
    owner_tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    indirect: frozenset[str] = frozenset()
    takes_ids: bool = False
    cache_map: tuple[tuple[int, ...], ...] = ()
    num_layers: int = 0
    cache_class: type[Cache] | None = None
    is_croppable: bool = True
    replays_steps: bool = False
    cuts: frozenset[int] = frozenset()
    no_cache: str = ""
    hides_past: bool = False

    @property
    def list_name(self) -> str:
        return self.path.rpartition(".")[2]

    @cached_property
    def carried(self) -> Mapping[str, TensorSpec]:
        """What crosses from one block to the next, by name."""
        return {"hidden_states": self.hidden, **{f"state.{k}": spec for k, spec in self.states.items()}}

    @cached_property
    def coded(self) -> frozenset[str]:
        """What crosses from block to block and may lose bits on its way (`wire.codecs`), and its gradients."""
        vectors = [n for n, spec in self.carried.items() if spec.is_float and spec.dims[-1] not in ("B", "T", "?")]
        return frozenset(prefix + name for name in vectors for prefix in ("", "grad."))

    def owner(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path.rpartition(".")[0])

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        blocks = model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def layers_of(self, blocks: Span) -> tuple[int, ...]:
        """The cache layers that ``blocks`` fill."""
        if not self.cache_map:
            return tuple(blocks)
        return tuple(layer for block in blocks for layer in self.cache_map[block])

    def side_specs(self, blocks: Span) -> dict[str, TensorSpec]:
        """The side inputs of ``blocks``, by the names that travel."""
        return {side.name(block): side.spec for block in blocks for side in self.sides} if self.sides else {}

    def check_cuts(self, blocks: Span) -> None:
        """Raise `UnsupportedCallError` if a span may not begin or end there."""
        wrong = [cut for cut in (blocks.start, blocks.end) if cut not in self.cuts] if self.cuts else []
        if wrong:
            raise UnsupportedCallError(
                f"blocks {blocks} cannot be served apart: the model shares keys and values across block {wrong[0]}; "
                f"spans may begin and end at {ranges(self.cuts)}"
            )

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What a block would return, made of the named tensors."""
        if self.container is None:
            return tensors["hidden_states"]
        items = [tensors.get(f"state.{k}") for k in range(self.arity)]
        items[0] = tensors["hidden_states"]
        return self.container(items)

    def unpack(self, output: Any) -> dict[str, torch.Tensor]:
        """The named tensors of what a block returned.

        Raises:
            UnsupportedCallError: it is not what blocks of this architecture return.
        """
        items: dict[str, Any]
        if self.container is None:
            items = {"hidden_states": output}
        elif isinstance(output, tuple | list) and len(output) == self.arity:
            items = {"hidden_states": output[0], **{f"state.{k}": output[k] for k in self.states}}
        else:
            items = {"hidden_states": None}
        named = {name: item for name, item in items.items() if item is not None}
        if not all(isinstance(item, torch.Tensor) for item in named.values()) or "hidden_states" not in named:
            expected = "one tensor" if self.container is None else f"a {self.container.__name__} of {self.arity}"
            raise UnsupportedCallError(f"a block returned a {type(output).__name__}, expected {expected}")
        return named

    def blocks_of_keys(self, keys: Iterable[str]) -> dict[str, int]:
        """The block of each checkpoint key that belongs to one; embeddings, norms and head are left out.

        Keys may differ from the names in the model: transformers renames some while loading. The blocks are the
        numbered group of keys that looks most like `path`.
        """
        groups: dict[str, dict[str, int]] = {}
        for key in keys:
            for match in _NUMBER.finditer(key):
                groups.setdefault(key[: match.start()], {})[key] = int(match[1])
        fitting = [prefix for prefix, found in groups.items() if max(found.values()) < self.num_blocks]
        if not fitting:
            return {}
        return groups[max(fitting, key=lambda prefix: self._likeness(prefix, groups[prefix]))]

    def _likeness(self, prefix: str, found: Mapping[str, int]) -> tuple[bool, bool, float, int]:
        parts, own = prefix.split("."), self.path.split(".")
        is_whole = len(set(found.values())) == self.num_blocks
        return prefix == self.path, is_whole, len(set(parts) & set(own)) - 0.1 * len(parts), len(found)


_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def ranges(numbers: frozenset[int]) -> str:
    """``0..20, 35``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}..{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def find_stack(model: nn.Module, config: PreTrainedConfig) -> StackSpec:
    """Locate the blocks of ``model``: the largest list of the right length, those of its decoder first.

    Raises:
        UnsupportedCallError: there is no list that can be the blocks.
    """
    num_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = _decoder_of(model)
    inside = set() if decoder is None else {id(part) for part in decoder.modules()}
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and "." in name]
    found = [(name, part) for name, part in lists if len(part) == num_blocks]
    found = found or [(name, part) for name, part in lists if id(part) in inside and len(part) > 1]
    if not found:
        raise UnsupportedCallError(f"no list of {num_blocks} blocks found in {type(model).__name__}")
    name, blocks = max(found, key=lambda item: (id(item[1]) in inside, sum(p.numel() for p in item[1].parameters())))
    return StackSpec(path=name, num_blocks=len(blocks))


def _decoder_of(model: nn.Module) -> nn.Module | None:
    decoder: Any = getattr(model, "get_decoder", lambda: None)()
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def meta_skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without memory, for looking at names and shapes.

    Raises:
        CheckpointError: the config does not describe a model that transformers can build.
    """
    try:
        with building, torch.device("meta"):
            return cls(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as exc:
        text = first_line(exc)
        raise CheckpointError(f"config of type '{config.model_type}' builds no {cls.__name__}: {text}") from exc


def input_argument(owner: nn.Module) -> str:
    """The name under which the owner's ``forward`` takes its inputs ``[B, T, D]``.

    Raises:
        UnsupportedCallError: it takes none.
    """
    parameters = inspect.signature(owner.forward).parameters
    for name in INPUT_ARGUMENTS:
        if name in parameters:
            return name
    raise UnsupportedCallError(f"{type(owner).__name__}.forward takes none of {INPUT_ARGUMENTS}")


def cache_argument(owner: nn.Module) -> str | None:
    """The name under which the owner's ``forward`` takes its KV cache; None if it takes none."""
    parameters = inspect.signature(owner.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def takes_argument(owner: nn.Module, name: str) -> bool:
    """Whether the owner's ``forward`` takes an argument ``name``, by name or among others."""
    parameters = inspect.signature(owner.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def bind_owner_call(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The owner's arguments by name, its ``**kwargs`` unfolded. What it does not take, it refuses itself."""
    if not args:
        return dict(kwargs)
    names = _positional_names(owner.forward)
    if len(args) > len(names):  # too many, or ``*args``
        return dict(inspect.signature(owner.forward).bind_partial(*args).arguments) | kwargs
    return dict(zip(names, args, strict=False)) | kwargs


def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """To look at a signature takes longer than all else that is done with a call of the owner."""
    function = getattr(forward, "__func__", forward)  # a method is a new object at each access
    names = _names.get(function)
    if names is None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)
        _names[function] = names
    return names


_names: WeakKeyDictionary[Callable[..., Any], tuple[str, ...]] = WeakKeyDictionary()
