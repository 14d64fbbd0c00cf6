"""Learning how an architecture calls its blocks, by watching a tiny random model of the same structure.

Nothing here is per family. The tiny model has the user's own config with all sizes made small (`model.shrink`); two
texts of equal shape tell which arguments depend on the text, a third of another shape tells which dimensions are rows
and tokens, and a cached run tells which layers of the KV cache belong to which block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from remote_modules.errors import CheckpointError, UnsupportedCallError, first_line
from remote_modules.model.capture import OwnerCall, OwnerCapture
from remote_modules.model.kv import is_croppable
from remote_modules.model.length_layers import has_state
from remote_modules.model.rotary import follows_length
from remote_modules.model.selftest import Trace, self_tested
from remote_modules.model.shrink import shrunk, tiny_model
from remote_modules.model.stack import SideInput, StackSpec, cache_argument, find_stack
from remote_modules.model.tensors import TensorSpec

__all__ = ["probe_stack", "tiny_twin"]

_SHAPES = ((3, 7), (2, 5))  # rows, tokens: apart from each other and from all small sizes of a tiny model
_FIRST_TOKEN, _NUM_TOKENS = 4, 90
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError)

Key = int | str


@dataclass
class _Call:
    """One block's call: its arguments by position or name, its output, and the cache layers that it filled."""

    arguments: dict[Key, Any]
    output: Any = None
    filled: list[int] = field(default_factory=list)
    shared: int = 0  # tensors in containers that were passed in, when the block began


@dataclass
class _Record:
    calls: list[_Call] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    owner: OwnerCall = field(default_factory=OwnerCall)
    cache: Cache | None = None
    cache_class: type[Cache] | None = None

    def trace(self, stack: StackSpec) -> Trace:
        """What a replay of this run must give."""
        sides: dict[str, torch.Tensor] = {}
        for index, call in enumerate(self.calls):
            sides |= {side.name(index): call.arguments[side.key] for side in stack.sides}
        entry = {"hidden_states": _hidden(self.calls[0])}
        return Trace(self.owner, [entry, *(stack.unpack(call.output) for call in self.calls)], sides)


def probe_stack(cls: type[PreTrainedModel], config: PreTrainedConfig) -> StackSpec:
    """The whole `StackSpec` of models of this config.

    Raises:
        UnsupportedCallError: the blocks cannot be run apart from each other; the reason is named.
        CheckpointError: the config describes no model.
    """
    return _probe(_Subject(cls, config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _Subject:
    """What was probed, as a key: configs have no hash, their text has."""

    cls: type[PreTrainedModel]
    text: str
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=64)
def _probe(subject: _Subject) -> StackSpec:
    model = tiny_twin(subject.cls, subject.config)
    stack = find_stack(model, model.config)
    name = subject.config.model_type
    try:
        return _watch(model, stack)
    except _FAILURES as exc:
        raise UnsupportedCallError(f"architecture '{name}' failed its self-test: {first_line(exc)}") from exc
    except UnsupportedCallError as exc:
        raise UnsupportedCallError(f"architecture '{name}' is not carried: {exc}") from exc


def tiny_twin(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A tiny random model of the structure of ``config``.

    Raises:
        CheckpointError: the config describes no model.
    """
    small = shrunk(config)
    try:
        return tiny_model(small, cls=cls)
    except _FAILURES as exc:
        text = first_line(exc)
        raise CheckpointError(f"config of type '{config.model_type}' builds no {cls.__name__}: {text}") from exc


def _watch(model: PreTrainedModel, stack: StackSpec) -> StackSpec:
    with torch.random.fork_rng(devices=()), torch.no_grad():
        known = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
        vocab_size = min(known or _NUM_TOKENS, _NUM_TOKENS)
        shapes = (_SHAPES[0], _SHAPES[0], _SHAPES[1])
        texts = [_tokens(seed, *shape, vocab_size) for seed, shape in enumerate(shapes)]
        first, second, third = (_recorded(model, stack, ids, use_cache=False) for ids in texts)
        _check_order(first, stack.num_blocks)
        hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
        stack = _with_output(stack, first, third, hidden_size)
        stack = _with_sides(stack, (first, second, third), hidden_size)
        stack = replace(stack, cuts=_cuts(first), owner_tensors=_owner_tensors(first.owner, third.owner, hidden_size))
        stack = _with_cache(model, stack, texts[0])
        return self_tested(model, stack, first.trace(stack))


def _tokens(seed: int, rows: int, num_tokens: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(_FIRST_TOKEN, vocab_size - 1), vocab_size, (rows, num_tokens), generator=generator)


def _recorded(model: PreTrainedModel, stack: StackSpec, ids: torch.Tensor, *, use_cache: bool) -> _Record:
    capture = OwnerCapture()
    hooks = capture.hook(stack.owner(model))
    try:
        with _recording(stack.blocks(model), capture) as record:
            model(input_ids=ids, attention_mask=_padded(ids), use_cache=use_cache)
    finally:
        for hook in hooks:
            hook.remove()
    return record


def _padded(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return mask


@contextmanager
def _recording(blocks: nn.ModuleList, capture: OwnerCapture) -> Iterator[_Record]:
    record = _Record()
    before: list[list[bool]] = []

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments: dict[Key, Any] = dict(enumerate(args))
            arguments.update(kwargs)
            call = _Call(arguments)
            call.shared = sum(map(_num_shared, call.arguments.values()))
            for value in call.arguments.values():
                if record.cache is None and isinstance(value, Cache):
                    record.cache_class = type(value)
                    record.cache = getattr(value, "self_attention_cache", value)
            record.owner = capture.current or record.owner
            record.order.append(index)
            record.calls.append(call)
            before.append(_filled(record.cache))

        return hook

    def leave(module: nn.Module, args: object, output: object) -> None:
        call = record.calls[len(before) - 1]
        call.output = output
        now = _filled(record.cache)
        was = before[-1] + [False] * (len(now) - len(before[-1]))
        call.filled = [layer for layer, filled in enumerate(now) if filled and not was[layer]]

    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _num_shared(value: object) -> int:
    """Tensors in an argument that is one object for all blocks: a container, or containers on their cache."""
    inside = vars(value).values() if isinstance(value, Cache) else (value,)
    return sum(_num_tensors(part) for part in inside if isinstance(part, Mapping))


def _num_tensors(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return 1
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_tensors, items))


def _filled(cache: Any) -> list[bool]:
    if cache is None:
        return []
    filled = [_is_filled(layer) for layer in cache.layers]
    for index, state in enumerate(getattr(cache, "linear_cache", ())):
        filled += [False] * (index + 1 - len(filled))
        filled[index] |= isinstance(state, torch.Tensor)
    return filled


def _is_filled(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None or has_state(layer)


def _check_order(record: _Record, num_blocks: int) -> None:
    if record.order != list(range(num_blocks)):
        raise UnsupportedCallError(f"its blocks run in the order {record.order[:8]}..., expected each one once")
    for index in range(1, num_blocks):
        if _hidden(record.calls[index]) is not _first(record.calls[index - 1].output):
            raise UnsupportedCallError(f"it changes hidden states between blocks {index - 1} and {index}")


def _hidden(call: _Call) -> Any:
    return call.arguments.get("hidden_states", call.arguments.get(0))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _with_output(stack: StackSpec, first: _Record, third: _Record, hidden_size: int) -> StackSpec:
    outputs = [call.output for call in first.calls]
    kind = type(outputs[0])
    if kind not in (torch.Tensor, tuple, list):
        raise UnsupportedCallError(f"its blocks return a {kind.__name__}")
    hidden = _spec(_hidden(first.calls[0]), _hidden(third.calls[0]), hidden_size)
    for call in first.calls:
        if not hidden.fits(_first(call.output), *_SHAPES[0], hidden_size):
            raise UnsupportedCallError("the shape of its hidden states differs from block to block")
    if kind is torch.Tensor:
        return replace(stack, hidden=hidden)
    states: dict[int, TensorSpec] = {}
    keys: dict[int, Key] = {}
    for index, output in enumerate(outputs[:-1]):
        for position, item in enumerate(output):
            taken = [key for key, value in first.calls[index + 1].arguments.items() if value is item]
            if position == 0 or item is None or not taken:
                continue
            if not isinstance(item, torch.Tensor):
                raise UnsupportedCallError(f"its blocks hand a {type(item).__name__} to the next one")
            keys[position] = taken[0]
            states[position] = _loose(_spec(item, third.calls[index].output[position], hidden_size))
    arity = len(outputs[0])
    return replace(stack, hidden=hidden, container=kind, arity=arity, states=states, state_keys=keys)


def _spec(tensor: torch.Tensor, other: torch.Tensor, hidden_size: int) -> TensorSpec:
    """What the dimensions mean: ``other`` is the same thing for the other shape."""
    dims = []
    for size, other_size in zip(tensor.shape, other.shape, strict=True):
        if size == other_size:
            dims.append(f"{size // hidden_size}H" if size % hidden_size == 0 else str(size))
        elif (size, other_size) == (_SHAPES[0][0], _SHAPES[1][0]) and "B" not in dims:
            dims.append("B")
        elif (size, other_size) == (_SHAPES[0][1], _SHAPES[1][1]) and "T" not in dims:
            dims.append("T")
        else:
            dims.append("?")
    return TensorSpec(tuple(dims), tensor.is_floating_point())


def _loose(spec: TensorSpec) -> TensorSpec:
    """Sizes of the tiny model that are not those of the true one are left open."""
    dims = tuple(dim if dim in ("B", "T", "1") or dim[-1] == "H" else "?" for dim in spec.dims)
    return replace(spec, dims=dims, is_exact=False)


def _with_sides(stack: StackSpec, records: tuple[_Record, _Record, _Record], hidden_size: int) -> StackSpec:
    first, second, third = records
    known = {0, "hidden_states", *stack.state_keys.values()}
    found: dict[Key, list[tuple[Any, Any]]] = {}
    for call, same, other in zip(first.calls, second.calls, third.calls, strict=True):
        for key, value in call.arguments.items():
            if key in known or isinstance(value, Cache | Mapping) or _equal(value, same.arguments.get(key)):
                continue
            if not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise UnsupportedCallError(f"its blocks take a {kind} '{key}' that depends on the text")
            found.setdefault(key, []).append((value, other.arguments[key]))
    sides = []
    for key, values in found.items():
        value, other_value = values[0]
        is_shared = all(item is value or torch.equal(item, value) for item, _ in values[1:])
        sides.append(SideInput(key, not is_shared, _loose(_spec(value, other_value, hidden_size))))
    return replace(stack, sides=tuple(sides))


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, tuple | list):
        return isinstance(other, tuple | list) and len(value) == len(other) and all(map(_equal, value, other))
    return True


def _cuts(record: _Record) -> frozenset[int]:
    """No cut after a block has put something where later blocks look."""
    num_blocks = len(record.calls)
    at_first = record.calls[0].shared
    legal = [index for index, call in enumerate(record.calls) if call.shared <= at_first]
    return frozenset([*legal, num_blocks])


def _owner_tensors(call: OwnerCall, other: OwnerCall, hidden_size: int) -> dict[str, TensorSpec]:
    return {name: _spec(tensor, other.tensors[name], hidden_size) for name, tensor in call.tensors.items()}


def _with_cache(model: PreTrainedModel, stack: StackSpec, ids: torch.Tensor) -> StackSpec:
    stack = replace(stack, replays_steps=follows_length(stack.owner(model)))
    if cache_argument(stack.owner(model)) is None:
        return replace(stack, no_cache=f"{type(stack.owner(model)).__name__} takes no KV cache")
    before = _loose_tensors(stack.blocks(model))
    try:
        record = _recorded(model, stack, ids, use_cache=True)
    except _FAILURES as exc:
        return replace(stack, no_cache=f"its KV cache does not work in the local model: {first_line(exc)}")
    if record.cache is None:
        text = "it keeps its past in something else than a KV cache of transformers"
        return replace(stack, no_cache=text, hides_past=True)
    if _loose_tensors(stack.blocks(model)) != before:
        return replace(stack, no_cache="it keeps its past in its modules, where sessions would mix", hides_past=True)
    times = stack.hidden.time
    if times is None:
        return replace(stack, no_cache="it gives a text more positions than tokens")
    layers = tuple(tuple(call.filled) for call in record.calls)
    if not all(layers):  # some blocks take the keys of others, which may be handed over on the cache itself
        stack = replace(stack, cuts=stack.cuts & _cuts(record))
    if len({layer for filled in layers for layer in filled}) != sum(map(len, layers)):
        return replace(stack, no_cache="two blocks fill one layer of its KV cache")
    croppable = is_croppable(record.cache)
    kind = record.cache_class if record.cache_class is not DynamicCache else None
    num_layers = max([len(record.cache.layers), *(layer + 1 for filled in layers for layer in filled)])
    return replace(stack, cache_map=layers, num_layers=num_layers, cache_class=kind, is_croppable=croppable)


def _loose_tensors(blocks: nn.Module) -> dict[str, int]:
    """Tensors that modules hold beside their parameters and buffers, by name and identity."""
    found = {}
    for name, module in blocks.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{attribute}"] = id(value)
    return found
