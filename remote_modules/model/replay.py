"""Running a span by *replaying* the owner's own forward.

The skeleton is complete: masks, rotary tables, per-layer dispatch and cache indexing are computed by the
architecture's own code. Blocks before the span pass on what the block before the span returned, so the first block to
run is called with the true values, and an exception leaves with the output of the last. This is the reference path of
a peer: exact, for every architecture whose blocks can be run apart from each other. Steps of one token go without the
owner where that was found to give the same (`model.decode_plans`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.adapted import applied
from remote_modules.model.adapted_item import Batch
from remote_modules.model.adapters import Adapter
from remote_modules.model.decode_graphs import DecodeGraphs, configs_of
from remote_modules.model.decode_plans import BlockCall, DecodePlans, Plan
from remote_modules.model.kv import SpanCache
from remote_modules.model.packed import Member, Packing, by_graph
from remote_modules.model.quantization import compute_dtype
from remote_modules.model.recording import RouterTaps
from remote_modules.model.rotary import RotaryMemory
from remote_modules.model.stack import SideInput, StackSpec, cache_argument, input_argument, takes_argument
from remote_modules.spans import Span

__all__ = ["OwnerArguments", "SpanModel"]

Named = Mapping[str, torch.Tensor]
Mask = torch.Tensor | dict[str, torch.Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerArguments:
    """What the owner was called with at the client, besides hidden states and cache.

    Attributes:
        rows, num_tokens: shape of its inputs ``[B, T]``.
        position_ids: int64 ``[B, T]``, ``[1, T]`` or ``[n, B, T]``, or None for positions that follow the cache.
        attention_mask: ``[B, P + T]``, ``[B, h, T, P + T]`` or one of these for each layer type, as given; or None.
        tensors: further tensors, by argument name.
        options: further arguments, by name.
        use_cache: for calls without a session, whether the owner made a throw-away cache.
        autocast: dtype of an enclosing `torch.autocast`, or None.
        record: what to return of each block beside the output: ``"hidden_states"``, ``"router_logits"``.
        adapter, seed: applied to the blocks; see `model.adapted`.
        first_row: number of the first row in the client's batch, of which this is a part.
        adapter_rows: of each row the group of its adapter, where ``adapter`` has several.
        with_grad: whether the caller records a gradient; who runs the blocks sets the grad mode accordingly.
    """

    rows: int
    num_tokens: int
    position_ids: torch.Tensor | None = None
    attention_mask: Mask | None = None
    tensors: Named = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    use_cache: bool = True
    autocast: torch.dtype | None = None
    record: tuple[str, ...] = ()
    adapter: Adapter | None = None
    seed: int | None = None
    first_row: int = 0
    adapter_rows: bytes = b""
    with_grad: bool = False


class _SpanDone(Exception):  # not an error: carries the result past the rest of the owner's forward
    def __init__(self, output: object) -> None:
        self.output = output


class _Pass:
    """Which blocks run now, and what enters the first; set for the time of one call."""

    __slots__ = ("calls", "end", "entry", "has_begun", "inputs", "recorded", "sides", "start")

    def __init__(self, sides: tuple[SideInput, ...]) -> None:
        self.start = self.end = 0
        self.entry: Any = None  # what block start - 1 returned
        self.inputs: Named = {}
        self.sides = sides
        self.has_begun = False
        self.recorded: dict[int, Any] | None = None
        self.calls: list[BlockCall] | None = None


class _Blocks(nn.ModuleList):
    """Many owners loop over ``layers[:num_hidden_layers]``, for which torch would build a new list at each token."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)


class _Slot(nn.Module):
    """The place of a block: runs a held one, passes others over, or ends the pass."""

    def __init__(self, block: nn.Module, index: int, current: _Pass) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.current = current

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        current = self.current
        if self.index < current.start:
            return current.entry
        current.has_begun = True
        if self.index == 0:
            args, kwargs = _with_input(args, kwargs, current.inputs["hidden_states"])
        for side in current.sides:
            args, kwargs = _with_argument(args, kwargs, side.key, current.inputs[side.name(self.index)])
        output = self.block(*args, **kwargs)
        if current.recorded is not None:
            current.recorded[self.index] = output
        if current.calls is not None:
            current.calls.append(BlockCall(self.index, args, kwargs, output))
        if self.index == current.end - 1:
            raise _SpanDone(output)
        return output

    def __getattr__(self, name: str) -> Any:  # some owners read a block's attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _with_argument(args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: torch.Tensor) -> Any:
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, kwargs | {key: value}


class SpanModel:
    """The blocks of one span, ready to run on one device. Not thread-safe: one call at a time.

    Args:
        model: from `loading.load_span`; its blocks are wrapped in place.
        stack: from `probe.probe_stack`.
        span: the blocks held.

    Attributes:
        graphs: captured steps, which run in the place of replays that they are the same as (`server.captures`).
        attention_configs: those that name the attention of the blocks.

    Raises:
        UnsupportedCallError: the span begins or ends where it may not.
    """

    def __init__(self, model: PreTrainedModel, stack: StackSpec, span: Span) -> None:
        stack.check_cuts(span)
        self.config = model.config
        self.stack = stack
        self.span = span
        self.hidden_size: int = model.config.get_text_config(decoder=True).hidden_size
        self._owner = stack.owner(model)
        self._input_argument = "input_ids" if stack.takes_ids else input_argument(self._owner)
        self._cache_argument = cache_argument(self._owner)
        self._takes_use_cache = takes_argument(self._owner, "use_cache")
        self._current = _Pass(stack.sides)
        blocks = stack.blocks(model)
        self.blocks = {index: blocks[index] for index in span}
        self.device = next(blocks[span.start].parameters()).device
        self.dtype = compute_dtype(model)
        self._weights = [w for block in self.blocks.values() for w in block.parameters() if w.is_floating_point()]
        self._taps = RouterTaps(model, self.blocks)
        for index in range(len(blocks)):
            blocks[index] = _Slot(blocks[index], index, self._current)
        setattr(self._owner, stack.list_name, _Blocks(blocks))
        self._rotary = RotaryMemory(self._owner)
        self._plans = DecodePlans(self._owner, self.blocks, stack)
        self.attention_configs = configs_of(self._owner)
        self._packing = Packing(self.attention_configs)
        self.graphs: DecodeGraphs | None = None

    def new_cache(self) -> SpanCache:
        """An empty cache for the span.

        Raises:
            UnsupportedCallError: the architecture's cache is not carried.
        """
        if self.stack.no_cache:
            raise UnsupportedCallError(
                f"KV caches of '{self.config.model_type}' models are not carried ({self.stack.no_cache}); use "
                "use_cache=False"
            )
        arena = None if self.graphs is None else self.graphs.arena
        return SpanCache(self.config, self.stack, self.span, arena)

    def run(
        self, inputs: Named, blocks: Span, arguments: OwnerArguments, cache: SpanCache | None = None
    ) -> dict[str, torch.Tensor]:
        """Run ``inputs`` through ``blocks``; under the caller's grad mode.

        Args:
            inputs: what enters block ``blocks.start`` (`StackSpec.carried`) and the side inputs of all ``blocks``.
                Tensors may lie anywhere and be of any float dtype.
            cache: grows by T.

        Returns:
            What the last block returned, in the model's dtype, on its device or the CPU, and
            ``record.<kind>.<block>``.

        Raises:
            UnsupportedCallError: the owner needs more than it was given, or the adapter does not fit.
            ValueError: ``cache`` was used for other blocks.
        """
        if cache is not None:
            cache.use(blocks)
        self._require_grad(arguments.adapter is None)
        key = None if cache is None else self._plan_key(blocks, arguments, cache)
        if cache is None or key is None:
            result = self._replay(self._all_placed(inputs), blocks, arguments, cache)
        else:
            result = {"hidden_states": self._step(key, inputs, blocks, arguments, cache)}
        if cache is not None:
            cache.advance(arguments.num_tokens)
            cache.rotary = self._rotary.read()
        return result

    def _step(
        self, key: Hashable, inputs: Named, blocks: Span, arguments: OwnerArguments, cache: SpanCache
    ) -> torch.Tensor:
        """One token of each row, by a graph, a plan, or the owner."""
        if self.graphs is not None and blocks == self.span and not arguments.options:
            output = self.graphs.step(inputs["hidden_states"], [(cache, arguments.rows)])
            if output is not None:
                return output
        placed = self._all_placed(inputs)
        replay = lambda calls: self._replay(placed, blocks, arguments, cache, calls)["hidden_states"]  # noqa: E731
        return self._plans.step(key, placed["hidden_states"], cache, replay)

    def note_plan(self, hidden_states: torch.Tensor, cache: SpanCache) -> Plan:
        """The calls of all blocks in a step of one row and token, which ``cache`` takes.

        Raises:
            UnsupportedCallError: they do not follow from the position.
        """
        if not self._plans.may_plan(cache):
            raise UnsupportedCallError("the blocks or their cache are of another kind")
        arguments = OwnerArguments(rows=1, num_tokens=1)
        inputs = {"hidden_states": self._placed(hidden_states)}
        plan = self._plans.note(cache, lambda calls: self._replay(inputs, self.span, arguments, cache, calls))
        cache.advance(1)
        return plan

    def _plan_key(self, blocks: Span, arguments: OwnerArguments, cache: SpanCache) -> Hashable:
        """What steps have in common whose calls differ in the position alone; None for other calls."""
        mask, position_ids = arguments.attention_mask, arguments.position_ids
        is_plain = arguments.num_tokens == 1 and not arguments.tensors and not arguments.record
        if not is_plain or arguments.adapter is not None or arguments.autocast is not None:
            return None
        if not self._plans.may_plan(cache) or isinstance(mask, dict):
            return None
        if position_ids is not None and any(position != cache.length for position in position_ids.flatten().tolist()):
            return None
        if mask is not None and not (mask.dim() == 2 and bool(mask.all())):
            return None
        shape = None if position_ids is None else position_ids.shape
        options = tuple((name, type(value), value) for name, value in arguments.options.items())
        return (blocks, arguments.rows, shape, mask is None, options)

    def _replay(
        self,
        inputs: Named,
        blocks: Span,
        arguments: OwnerArguments,
        cache: SpanCache | None,
        calls: list[BlockCall] | None = None,
    ) -> dict[str, torch.Tensor]:
        """By the owner's own forward, which leaves when the last block returns; notes the ``calls`` of blocks."""
        current = self._current
        current.start, current.end, current.has_begun = blocks.start, blocks.end, False
        current.inputs, current.calls = inputs, calls
        current.entry = self.stack.pack(inputs) if blocks.start else None
        current.recorded = {} if "hidden_states" in arguments.record else None
        self._rotary.write(self._rotary.initial if cache is None or cache.rotary is None else cache.rotary)
        taps = self._taps.recording("router_logits" in arguments.record)
        try:
            with self._adapted(arguments, cache), self._autocast(arguments.autocast), taps as logits:
                self._owner(**self._owner_call(arguments, cache))
        except _SpanDone as done:
            output = done.output
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as exc:
            if current.has_begun or isinstance(exc, torch.OutOfMemoryError):
                raise  # inside a block: not for what the owner lacks
            text = first_line(exc)
            name = type(self._owner).__name__
            raise UnsupportedCallError(f"{name}.forward does not reach block {blocks.start}: {text}") from exc
        else:
            raise UnsupportedCallError(f"{type(self._owner).__name__} did not call block {blocks.end - 1}")
        finally:
            recorded, current.recorded = current.recorded, None
            current.inputs, current.entry, current.calls = {}, None, None
        result = self.stack.unpack(output)
        for index, block_output in (recorded or {}).items():
            result[f"record.hidden_states.{index}"] = self.stack.unpack(block_output)["hidden_states"]
        for index, values in logits.items():
            result[f"record.router_logits.{index}"] = values
        return result

    def run_packed(
        self, inputs: Named, blocks: Span, arguments: OwnerArguments, members: Sequence[Member]
    ) -> dict[str, torch.Tensor]:
        """`run` one token of each row of several sessions, whose caches grow by it; rows follow one another.

        Args:
            arguments: without a mask; with the positions of all rows.

        Raises:
            UnsupportedCallError: the architecture cannot; no cache has changed, as after whatever else a block raises.
            ValueError: a cache was used for other blocks.
        """
        for member in members:
            member.cache.use(blocks)
        if self.graphs is not None and blocks == self.span and not arguments.options and arguments.autocast is None:
            output = by_graph(self.graphs, inputs["hidden_states"], arguments.position_ids, members)
            if output is not None:
                return {"hidden_states": output}
        with self._packing.over(members):
            return self.run(inputs, blocks, arguments)

    def _require_grad(self, requires_grad: bool) -> None:
        """As the weights of a local model do, unless adapters are trained; no gradient of theirs is ever computed.

        torch.matmul looks at it even under no_grad (``should_fold``), and multiplies, so rounds, in another way.
        """
        if self._weights and self._weights[0].requires_grad != requires_grad:
            for weight in self._weights:
                weight.requires_grad_(requires_grad)

    def _all_placed(self, tensors: Named) -> Named:
        return {name: self._placed(tensor) for name, tensor in tensors.items()}

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)

    def _owner_call(self, arguments: OwnerArguments, cache: SpanCache | None) -> dict[str, Any]:
        call: dict[str, Any] = {
            **arguments.options,
            self._input_argument: self._placeholder(arguments.rows, arguments.num_tokens),
        }
        if self._takes_use_cache:
            call["use_cache"] = cache is not None or arguments.use_cache
        call.update({name: self._placed(tensor) for name, tensor in arguments.tensors.items()})
        if cache is not None:
            assert self._cache_argument is not None
            call[self._cache_argument] = cache.argument
        if arguments.position_ids is not None:
            call["position_ids"] = arguments.position_ids.to(self.device)
        mask = arguments.attention_mask
        if isinstance(mask, dict):
            call["attention_mask"] = {kind: None if m is None else self._placed(m) for kind, m in mask.items()}
        elif mask is not None:
            call["attention_mask"] = self._placed(mask) if mask.dim() > 2 else mask.to(self.device)
        return call

    def _placeholder(self, rows: int, num_tokens: int) -> torch.Tensor:
        """What the owner takes for its inputs; the true hidden states come in at the first block."""
        if self.stack.takes_ids:
            return torch.ones((rows, num_tokens), dtype=torch.int64, device=self.device)
        # not of zero stride: some owners scale it in place
        return torch.zeros((rows, num_tokens, self.hidden_size), dtype=self.dtype, device=self.device)

    def _adapted(self, arguments: OwnerArguments, cache: SpanCache | None) -> AbstractContextManager[object]:
        if arguments.adapter is None:
            return nullcontext()
        batch = Batch(
            rows=arguments.rows,
            num_tokens=arguments.num_tokens,
            first_row=arguments.first_row,
            position=0 if cache is None else cache.length,
            seed=arguments.seed,
            adapter_rows=arguments.adapter_rows,
        )
        return applied(self.blocks, arguments.adapter, batch)

    def _autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[object]:
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)
