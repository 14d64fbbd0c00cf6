"""A step of one token as a list of torch calls: those that the blocks make, without the Python between them.

transformers' modules spend as long on Python as small blocks take to compute. While a planned step runs (`model.
decode_plans`), a `Tape` notes each torch function with its arguments, and makes the same calls again for other hidden
states, positions and caches: the same kernels with the same arguments, so the same bits. What may be noted is known to
depend on shapes alone; a step that does anything else, looks at a value or a length, or takes a tensor that is neither
a weight nor comes from the step, is refused. Whoever uses a tape compares it first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from remote_modules.errors import UnsupportedCallError

__all__ = ["Tape", "record"]

# Functions without side effects whose results have shapes that follow from the shapes of their arguments.
_PURE = frozenset(
    "linear matmul mm bmm addmm baddbmm add sub rsub mul div true_divide neg pow square sqrt rsqrt reciprocal abs exp "
    "erf mean sum cos sin tanh sigmoid silu gelu relu softplus softmax scaled_dot_product_attention layer_norm "
    "rms_norm cat stack chunk split unbind transpose t permute view reshape flatten unflatten unsqueeze squeeze expand "
    "contiguous to type_as float half bfloat16 __getitem__ __rmul__ __rsub__ __radd__ __rtruediv__ __rpow__ clamp "
    "addcmul dropout repeat_interleave".split()
)
_DECIDED = frozenset({"__getitem__", "repeat_interleave"})  # tensors among their other arguments decide the shape
_LISTS = frozenset({"cat", "stack"})  # take a list of tensors first
_ABOUT = frozenset("dtype device layout requires_grad is_cuda is_sparse is_nested ndim is_meta is_mps is_xpu".split())
_QUESTIONS = frozenset("dim element_size is_floating_point is_complex is_contiguous get_device".split())
_SIZES = frozenset("shape size numel __len__ stride".split())
_KNOWN_READER = "transformers.integrations.sdpa_attention"  # does with a length what does not change for one token


@dataclass(slots=True)
class _Noted:
    """A call that was seen.

    Attributes:
        taken: places of its arguments; those that have ``names`` come last, and first the ``listed`` ones, which make
            a list.
        given: places of what it returns.
        is_single: whether that is one tensor, or a sequence.
    """

    function: Callable[..., Any]
    taken: tuple[int, ...]
    names: tuple[str, ...] = ()
    listed: int = 0
    given: tuple[int, ...] = ()
    is_single: bool = True

    @property
    def is_update(self) -> bool:
        return self.function is _update

    def key(self) -> Hashable:
        """Equal for calls that return the same."""
        return (self.function, self.taken, self.names, self.listed)

    def bound(self, constants: Mapping[int, Any]) -> tuple[Callable[..., Any], tuple[int, ...]]:
        """What takes the values at some places in order, and these."""
        function, taken = self.function, self.taken
        if self.listed:
            function = partial(_with_list, function, self.listed)
        if self.names:
            number = len(taken) - len(self.names)
            named = dict(zip(self.names, taken[number:], strict=True))
            if all(place in constants for place in named.values()):
                return partial(function, **{name: constants[place] for name, place in named.items()}), taken[:number]
            function = partial(_with_names, function, number, self.names)
        return function, taken


def _update(update: Callable[..., Any], keys: torch.Tensor, values: torch.Tensor) -> Any:
    return update(keys, values)


def _with_list(function: Callable[..., Any], number: int, *args: Any, **kwargs: Any) -> Any:
    return function(args[:number], *args[number:], **kwargs)


def _with_names(function: Callable[..., Any], number: int, names: tuple[str, ...], *args: Any) -> Any:
    return function(*args[:number], **dict(zip(names, args[number:], strict=True)))


class Tape:
    """Calls of one step. Places are numbers of values: first those of the plan, then constants, then what is made.

    Args:
        calls: in order: a function, the places of its arguments, and that or those of what it returns.
        more: constants, and room for what is made.
        updates: places where the ``update`` of each cache layer is put.
        output: place of the last block's output.
    """

    def __init__(
        self,
        calls: Iterable[tuple[Callable[..., Any], tuple[int, ...], int | tuple[int, ...]]],
        more: list[Any],
        updates: Sequence[int],
        output: int,
    ) -> None:
        self._calls = [(f, taken[0] if len(taken) == 1 else itemgetter(*taken), given) for f, taken, given in calls]
        self._more = more
        self._updates = updates
        self._output = output

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, values: Sequence[Any], layers: Sequence[Any]) -> torch.Tensor:
        """One step.

        Args:
            values: of the plan at this position, hidden states among them.
            layers: the cache's, which grow by a token.
        """
        places = [*values, *self._more]
        for place, layer in zip(self._updates, layers, strict=True):
            places[place] = layer.update
        for function, taken, given in self._calls:
            made = function(places[taken]) if isinstance(taken, int) else function(*taken(places))
            if isinstance(given, int):
                places[given] = made
            else:
                for place, part in zip(given, made, strict=True):
                    places[place] = part
        output: torch.Tensor = places[self._output]
        return output


def record(
    step: Callable[[], torch.Tensor], values: Sequence[Any], layers: Sequence[Any], blocks: Sequence[nn.Module]
) -> tuple[torch.Tensor, Tape | None, str]:
    """Run a planned step and note what it calls: its output, and the tape, or None and why there is none.

    Args:
        values: of the plan at this position; hidden states among them.
        layers: of the cache that the step fills.
        blocks: whose weights are constants.
    """
    recorder = _Recorder(values, layers, blocks)
    with recorder.watching(layers), recorder:
        output = step()
    try:
        return output, recorder.tape(output), ""
    except UnsupportedCallError as exc:
        return output, None, str(exc)


@dataclass
class _Places:
    """Places of values, by identity or by what constants are equal to; what is held is never collected meanwhile."""

    count: int
    by_id: dict[int, int] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)  # by place
    _equal: dict[Any, int] = field(default_factory=dict)
    _held: list[Any] = field(default_factory=list)

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def hold(self, tensor: torch.Tensor, place: int) -> None:
        self.by_id[id(tensor)] = place
        self._held.append(tensor)

    def of_constant(self, value: Any) -> int:
        key = id(value) if isinstance(value, torch.Tensor) else _key_of(value)
        if key not in self._equal:
            place = self._equal[key] = self.new()
            self.constants[place] = value
            self._held.append(value)
        return self._equal[key]


class _Recorder(TorchFunctionMode):
    def __init__(self, values: Sequence[Any], layers: Sequence[Any], blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self._num_values = len(values)
        self._places = _Places(len(values))
        for place, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                self._places.hold(value, place)
        self._weights = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
        self._updates = [self._places.new() for _ in layers]
        self._calls: list[_Noted] = []
        self._known: dict[Any, tuple[int, ...]] = {}  # places of what a call gave before
        self._of_cache: set[int] = set()  # places of what follows from keys and values, and is as long
        self._length = layers[0].get_seq_length() + 1 if layers else 0
        self._is_paused = False
        self.reason = ""
        if any(module._forward_hooks or module._forward_pre_hooks for block in blocks for module in block.modules()):
            self.reason = "a module has hooks"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (self._is_paused or self.reason):
            reader = sys._getframe(1).f_globals.get("__name__", "")
            try:
                self._note(func, args, kwargs, result, reader)
            except UnsupportedCallError as exc:
                self.reason = str(exc)
        return result

    @contextmanager
    def watching(self, layers: Sequence[Any]) -> Iterator[None]:
        """What cache layers do is one call each."""
        before = [dict(vars(layer)) for layer in layers]
        for number, layer in enumerate(layers):
            layer.update = partial(self._update, number, layer.update)
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.update  # the class has one
                if "update" in own:
                    layer.update = own["update"]

    def _update(
        self, number: int, update: Callable[..., Any], keys: Any, values: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._is_paused = True
        try:
            result = update(keys, values, *args, **kwargs)
        finally:
            self._is_paused = False
        if not self.reason:
            try:
                call = _Noted(_update, (self._updates[number], self._place(keys), self._place(values)))
                self._add(call, result, is_of_cache=True)
            except UnsupportedCallError as exc:
                self.reason = str(exc)
        return result

    def _note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, reader: str) -> None:
        name = _name_of(func)
        if name in _ABOUT or name in _QUESTIONS:
            return
        if name in _SIZES:
            self._check_reading(args[0], reader)
            return
        if name not in _PURE or kwargs.get("out") is not None or kwargs.get("inplace") or kwargs.get("dropout_p"):
            raise UnsupportedCallError(f"'{name}' is called")
        if any(result is arg for arg in args):
            return
        if name == "dropout" or (name in _DECIDED and any(isinstance(arg, torch.Tensor) for arg in args[1:])):
            raise UnsupportedCallError(f"'{name}' is called, and not only shapes decide what it returns")
        listed = args[0] if name in _LISTS else ()
        flat = [*listed, *args[1:]] if listed else args
        taken = tuple(self._place(value) for value in (*flat, *kwargs.values()))
        call = _Noted(func, taken, tuple(kwargs), len(listed))
        given = self._known.get(call.key())
        if given is None:
            is_of_cache = not self._of_cache.isdisjoint(taken)
            self._known[call.key()] = self._add(call, result, is_of_cache=is_of_cache)
            return
        for place, tensor in zip(given, _tensors_of(result), strict=True):
            self._places.hold(tensor, place)

    def _place(self, value: Any) -> int:
        if not isinstance(value, torch.Tensor):
            return self._places.of_constant(value)
        place = self._places.by_id.get(id(value))
        if place is not None:
            return place
        if id(value) not in self._weights:
            raise UnsupportedCallError("a tensor is of unknown origin")
        return self._places.of_constant(value)

    def _add(self, call: _Noted, result: Any, *, is_of_cache: bool) -> tuple[int, ...]:
        """Places of what it returned."""
        call.is_single = isinstance(result, torch.Tensor)
        for tensor in _tensors_of(result):
            place = self._places.new()
            call.given += (place,)
            self._places.hold(tensor, place)
            if is_of_cache and self._length in tensor.shape:
                self._of_cache.add(place)
        self._calls.append(call)
        return call.given

    def _check_reading(self, tensor: Any, reader: str) -> None:
        place = self._places.by_id.get(id(tensor))
        if place in self._of_cache and reader != _KNOWN_READER:
            raise UnsupportedCallError(f"the length of the cache is looked at by {reader}")

    def tape(self, output: torch.Tensor) -> Tape:
        """Of all that was noted.

        Raises:
            UnsupportedCallError: something was noted that cannot be made again.
        """
        place = self._places.by_id.get(id(output))
        if not self.reason and place is None:
            self.reason = "the output is of unknown origin"
        if not self.reason and sorted(c.taken[0] for c in self._calls if c.is_update) != self._updates:
            self.reason = "not every layer of the cache took a token"
        if self.reason:
            raise UnsupportedCallError(self.reason)
        assert place is not None
        return _lowered(self._calls, place, self._num_values, self._places.constants, self._updates)


def _lowered(
    calls: Sequence[_Noted], output: int, num_values: int, constants: Mapping[int, Any], updates: Sequence[int]
) -> Tape:
    """Without calls whose results nobody takes; what is made lies where something lay that nobody takes any more."""
    kept, needed = [], {output}
    for call in reversed(calls):
        if call.is_update or not needed.isdisjoint(call.given):
            needed.update(call.taken)
            kept.append((call, *call.bound(constants)))
    kept.reverse()
    last_taken = {place: number for number, (_, _, taken) in enumerate(kept) for place in taken}
    more: list[Any] = []

    def room(value: Any = None) -> int:
        more.append(value)
        return num_values + len(more) - 1

    places = {place: place for place in range(num_values)}
    places.update({place: room() for place in updates})
    places.update({place: room(value) for place, value in constants.items() if place in last_taken})
    fixed, free, lowered = set(places), list[int](), []
    for number, (call, function, taken) in enumerate(kept):
        taken_from = tuple(places[place] for place in taken)
        ended = {place for place in taken if last_taken[place] == number} - fixed - {output}
        free += [places[place] for place in ended]
        for place in call.given:
            places[place] = free.pop() if free else room()
        free += [places[place] for place in call.given if place not in last_taken and place != output]
        given = tuple(places[place] for place in call.given)
        lowered.append((function, taken_from, given[0] if call.is_single else given))
    return Tape(lowered, more, [places[place] for place in updates], places[output])


def _name_of(func: Any) -> str:
    """Of a function, or of the attribute that is read."""
    name: str = getattr(func, "__name__", "")
    return str(func.__self__.__name__) if name == "__get__" else name


def _tensors_of(result: Any) -> Sequence[torch.Tensor]:
    found = (result,) if isinstance(result, torch.Tensor) else result
    if not isinstance(found, tuple | list) or not all(isinstance(part, torch.Tensor) for part in found):
        raise UnsupportedCallError(f"something returns a {type(result).__name__}")
    return found


def _key_of(value: Any) -> Hashable:
    """Equal for constants that do the same: 1, 1.0 and True are equal in Python."""
    if value is None or value is Ellipsis or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_key_of, value))
    if isinstance(value, slice):
        return slice, tuple(map(_key_of, (value.start, value.stop, value.step)))
    raise UnsupportedCallError(f"an argument is a {type(value).__name__}")
