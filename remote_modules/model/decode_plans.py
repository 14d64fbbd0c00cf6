"""Steps of one token without the owner: the calls that its blocks got, made again for another position.

The owner's forward costs as much for one token as for many, and each hop pays for it. What the blocks of most families
get beside hidden states and cache follows from the position alone: it is constant, the position itself, or a rotary
table of it. A *plan* is such a set of calls, noted in a replayed step. It is used after a step in which it gave the
same output, keys and values as the replay to the last bit, and is compared again whenever the length has doubled.
Where the blocks do nothing but call torch, a plan then goes by its `Tape`, compared in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import GrowingLayer, SpanCache
from remote_modules.model.stack import StackSpec
from remote_modules.model.tape import Tape, record

__all__ = ["BlockCall", "DecodePlans", "Plan"]

logger = logging.getLogger(__name__)

MAX_PLANS = 64  # of different calls: a plan holds a few hundred bytes
_CHECKED_AHEAD = 64  # tokens
_ROWS_AHEAD = 16  # whose values are made at once
_MAX_AHEAD = 64  # positions of a plan whose values are kept, each of fewer rows than that
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
_HIDDEN, _CACHE = 0, 1  # places of the values that each call begins with


class BlockCall(NamedTuple):
    """What one block was called with, and what it returned."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Call(NamedTuple):
    """Of a module, or of what does the same: places of its arguments among the values."""

    module: Callable[..., Any]
    args: tuple[int, ...]
    kwargs: dict[str, int]


@dataclass(slots=True)
class Plan:
    """
    Attributes:
        values: constants, at their places.
        positions: places of tensors that hold the position, and how to make them.
        tables: rotary modules, with the places of what they return: the whole, and its items.
        blocks: in order.
        checked_until: position from which it is to be compared with the replay again.
        num_ahead: positions whose values are made at once.
        tape: of the blocks' calls, once there is one.
        may_tape: whether one may be had.
        ahead: values that depend on the position, by position and place, made before they are needed: several at once
            take a third of the time that each takes alone, after a block has filled the processor's cache.
    """

    values: list[Any] = field(default_factory=lambda: [None, None])
    positions: list[tuple[int, torch.Size, torch.dtype, torch.device]] = field(default_factory=list)
    tables: list[tuple[_Call, int, tuple[int, ...]]] = field(default_factory=list)
    blocks: list[_Call] = field(default_factory=list)
    checked_until: int = 0
    num_ahead: int = 1
    tape: Tape | None = None
    may_tape: bool = True
    ahead: dict[int, list[Any]] = field(default_factory=dict)

    def run(self, hidden_states: torch.Tensor, cache: SpanCache) -> torch.Tensor:
        values = self._values_at(cache.length)
        if self.tape is None:
            return self.call(hidden_states, cache.argument, values)
        values[_HIDDEN] = hidden_states
        return self.tape.run(values, cache.held)

    def run_noting(self, hidden_states: torch.Tensor, cache: SpanCache, blocks: Sequence[nn.Module]) -> torch.Tensor:
        """`run`, after which there is a tape if that can be."""
        values = self._values_at(cache.length)
        values[_HIDDEN] = hidden_states
        step = partial(self.call, hidden_states, cache.argument, values.copy())
        output, self.tape, reason = record(step, values, cache.held, blocks)
        self.may_tape = self.tape is not None
        if reason:
            logger.debug("steps of one token go block by block: %s", reason)
        return output

    def call(self, hidden_states: torch.Tensor, cache: object, values: list[Any]) -> torch.Tensor:
        """The blocks, one after another.

        Args:
            values: those of the step's position.
        """
        values[_CACHE], values[_HIDDEN] = cache, hidden_states
        for call in self.blocks:
            values[_HIDDEN] = _made(call, values)
        output: torch.Tensor = values[_HIDDEN]
        return output

    def replaced(self, modules: Mapping[Callable[..., Any], Callable[..., Any]]) -> Plan:
        """The same with other callables in the place of blocks."""
        blocks = [call._replace(module=modules[call.module]) for call in self.blocks]
        return Plan(self.values, self.positions, self.tables, blocks)

    def _values_at(self, position: int) -> list[Any]:
        """For one step: a block may change them."""
        if position not in self.ahead:
            if len(self.ahead) > _MAX_AHEAD:  # of sessions that ended
                self.ahead.clear()
            for later in range(position, position + self.num_ahead):
                if later in self.ahead:
                    break  # another session comes after this one
                self.ahead[later] = self.values_at(partial(_full, later))
        return self.ahead.pop(position)

    def values_at(self, position: Callable[[torch.Size, torch.dtype, torch.device], torch.Tensor]) -> list[Any]:
        """Values of one step; ``position`` makes a tensor that holds it, like one of the shape in the noted step."""
        values = self.values.copy()
        for place, shape, dtype, device in self.positions:
            values[place] = position(shape, dtype, device)
        for call, whole, items in self.tables:
            values[whole] = _made(call, values)
            for number, place in enumerate(items):
                values[place] = values[whole][number]
        return values


def _full(position: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, position, dtype=dtype, device=device)


def _made(call: _Call, values: list[Any]) -> Any:
    return call.module(*[values[place] for place in call.args], **{name: values[p] for name, p in call.kwargs.items()})


class DecodePlans:
    """Plans of one span, by what is the same in all their steps.

    Args:
        owner: of the blocks, whose rotary modules are watched.
        blocks: those held.
    """

    def __init__(self, owner: nn.Module, blocks: dict[int, nn.Module], stack: StackSpec) -> None:
        held = {id(module) for block in blocks.values() for module in block.modules()}
        self._blocks = blocks
        self._tables = [module for module in owner.modules() if _is_rotary(module) and id(module) not in held]
        self._plans: dict[Hashable, Plan | None] = {}
        is_bare = stack.container is None and not stack.sides
        self._is_possible = is_bare and stack.cache_class is None and stack.is_croppable and not stack.replays_steps

    def may_plan(self, cache: SpanCache) -> bool:
        """Whether a step of one token on ``cache`` might do without the owner."""
        if not self._is_possible or cache.length == 0:
            return False
        return all(type(layer) is GrowingLayer and not layer.is_sliding for layer in cache.held)

    def step(
        self,
        key: Hashable,
        hidden_states: torch.Tensor,
        cache: SpanCache,
        replay: Callable[[list[BlockCall] | None], torch.Tensor],
    ) -> torch.Tensor:
        """Run one token of each row at position ``cache.length``, the only one that the owner's call has.

        Args:
            key: equal for calls of the owner that differ in their position alone.
            replay: the same by the owner; notes the calls of the blocks.
        """
        plan = self._plans.get(key)
        if plan is not None and cache.length < plan.checked_until:
            return plan.run(hidden_states, cache)
        if plan is not None:
            return self._checked(key, plan, hidden_states, cache, replay)
        if key in self._plans:
            return replay(None)
        outputs: list[torch.Tensor] = []
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[key] = None
        try:
            self._plans[key] = self.note(cache, lambda calls: outputs.append(replay(calls)))
        except UnsupportedCallError as exc:
            if not outputs:
                raise  # it is the replay's
            logger.debug("steps of one token need the owner: %s", exc)
        return outputs[0]

    def note(self, cache: SpanCache, replay: Callable[[list[BlockCall]], object]) -> Plan:
        """The plan of one replayed step.

        Raises:
            UnsupportedCallError: an argument is neither constant nor known to follow from the position.
        """
        calls: list[BlockCall] = []
        with self._watched() as tables:
            replay(calls)
        return self._noted(calls, tables, cache)

    def _checked(
        self,
        key: Hashable,
        plan: Plan,
        hidden_states: torch.Tensor,
        cache: SpanCache,
        replay: Callable[[list[BlockCall] | None], torch.Tensor],
    ) -> torch.Tensor:
        """The replay's output; the plan, or its tape, stays only if it gave the same."""
        found: list[torch.Tensor] = []
        is_noted = plan.may_tape and plan.tape is None
        try:
            run = partial(plan.run_noting, blocks=list(self._blocks.values())) if is_noted else plan.run
            found = [run(hidden_states, cache), *_last_states(cache)]
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as exc:
            if isinstance(exc, torch.OutOfMemoryError):
                raise
            logger.warning("a planned step failed, the owner does it", exc_info=exc)
        cache.rewind()
        output = replay(None)
        expected = [output, *_last_states(cache)]
        is_same = len(found) == len(expected) and all(map(torch.equal, found, expected))
        if is_same and is_noted and plan.tape is not None:
            plan.checked_until = 0  # the tape is yet to be compared
        elif is_same:
            plan.checked_until = max(2 * cache.length, cache.length + _CHECKED_AHEAD)
        elif plan.tape is not None and not is_noted:
            logger.info("a step by its torch calls differs from the owner's: block by block from now on")
            plan.tape, plan.may_tape, plan.checked_until = None, False, 0
        else:
            logger.info("a planned step differs from the owner's, which does steps of its kind from now on")
            self._plans[key] = None
        return output

    @contextmanager
    def _watched(self) -> Iterator[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]]]:
        """Calls of rotary modules meanwhile."""
        calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((module, args, kwargs, output))

        handles = [module.register_forward_hook(note, with_kwargs=True) for module in self._tables]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _noted(
        self,
        calls: Sequence[BlockCall],
        tables: Sequence[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]],
        cache: SpanCache,
    ) -> Plan:
        plan = Plan()
        places: dict[int, int] = {id(cache.argument): _CACHE}  # by identity: all these values live as long as `calls`

        def place(value: Any, *, is_like_inputs: bool = False) -> int:
            if id(value) in places:
                return places[id(value)]
            plan.values.append(None)
            number = places[id(value)] = len(plan.values) - 1
            if isinstance(value, _CONSTANTS) or (is_like_inputs and _is_float(value)):
                plan.values[number] = value  # of floats, rotary modules look at dtype and device alone
            elif isinstance(value, torch.Tensor) and _is_position(value, cache.length):
                plan.positions.append((number, value.shape, value.dtype, value.device))
            else:
                raise UnsupportedCallError(f"an argument of kind {type(value).__name__} is of unknown origin")
            return number

        for module, args, kwargs, output in tables:
            call = _Call(
                module,
                tuple(place(value, is_like_inputs=True) for value in args),
                {name: place(value, is_like_inputs=True) for name, value in kwargs.items()},
            )
            items = output if isinstance(output, tuple) else ()
            first = len(plan.values)
            plan.values += [None] * (1 + len(items))
            places[id(output)] = first
            places.update((id(item), first + 1 + number) for number, item in enumerate(items))
            plan.tables.append((call, first, tuple(range(first + 1, len(plan.values)))))
        entered: Any = None
        for block, args, kwargs, output in calls:
            entered = (args[0] if args else kwargs.get("hidden_states")) if entered is None else entered
            places[id(entered)] = _HIDDEN
            plan.blocks.append(
                _Call(
                    self._blocks[block],
                    tuple(place(value) for value in args),
                    {name: place(value) for name, value in kwargs.items()},
                )
            )
            if _HIDDEN not in (*plan.blocks[-1].args, *plan.blocks[-1].kwargs.values()):
                raise UnsupportedCallError(f"block {block} does not take what the block before it returned")
            del places[id(entered)]
            entered = output
        plan.num_ahead = max(1, _ROWS_AHEAD // len(entered))
        return plan


def _last_states(cache: SpanCache) -> list[torch.Tensor]:
    """Keys and values of the last token, copied."""
    return [states[:, :, -1:].clone() for layer in cache.held for states in (layer.keys, layer.values)]


def _is_rotary(module: nn.Module) -> bool:
    return "Rotary" in type(module).__name__ and not list(module.parameters())


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_position(tensor: torch.Tensor, position: int) -> bool:
    """Whether all that it holds is the position."""
    return not tensor.is_floating_point() and tensor.dtype is not torch.bool and bool((tensor == position).all())
