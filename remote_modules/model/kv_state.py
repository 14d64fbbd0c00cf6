"""KV caches as named tensors, to be carried from one peer to another, and back.

What a cache of an architecture consists of is found by filling small ones (`CacheForm`): which tensors each layer
keeps, and which of their dimensions are rows or tokens. Only tensors of that form are taken from others. Numbers and
flags that a layer keeps beside its tensors never travel: they are either always the same, or the length.

Tensors are named ``layer.<i>.<attribute>``, ``linear.<i>`` (states beside the layers), ``indexed.<i>`` (positions of
indexed layers that the owner keeps on a layer of another block) and ``rotary.<m>.<attribute>``; the last two belong to
no block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import GrowingLayer, SpanCache
from remote_modules.model.length_layers import LengthLayer
from remote_modules.spans import Span

__all__ = ["PROBES", "CacheForm", "CacheImport"]

Named = dict[str, torch.Tensor]
Path = tuple[str | int, ...]

# (rows, tokens) of the small caches. The difference of the lengths is a prime: what counts tokens in rounds looks
# neither constant nor like a length.
PROBES = ((1, 29), (1, 66), (2, 29))
_MAX_INTEGER = 2**31  # of positions


@dataclass(frozen=True, slots=True)
class _Dim:
    """One dimension: ``size`` times rows, as many as tokens, at most as many, or always ``size``."""

    kind: Literal["rows", "tokens", "some", "fixed"]
    size: int

    def fits(self, size: int, rows: int, num_tokens: int, *, is_exact: bool) -> bool:
        if self.kind == "rows":
            return size == self.size * rows
        if self.kind == "fixed":
            return size == self.size
        return size == num_tokens if is_exact and self.kind == "tokens" else 0 < size <= num_tokens


@dataclass(frozen=True, slots=True)
class _Form:
    dtype: torch.dtype
    dims: tuple[_Dim, ...]
    text: str = "cached tensor"

    def check(self, name: str, tensor: torch.Tensor, rows: int, num_tokens: int, *, is_exact: bool) -> None:
        fits = tensor.dtype == self.dtype and tensor.dim() == len(self.dims)
        if not fits or not all(
            dim.fits(size, rows, num_tokens, is_exact=is_exact)
            for dim, size in zip(self.dims, tensor.shape, strict=True)
        ):
            dims = ", ".join(str(dim.size) if dim.kind == "fixed" else dim.kind for dim in self.dims)
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"'{name}' must be {self.dtype} [{dims}] for {rows} rows of {num_tokens} tokens, got {got}"
            )
        if not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= _MAX_INTEGER:
                raise ValueError(f"'{name}' must be in 0:2**31, got {low}..{high}")


class CacheForm:
    """What the caches of one peer consist of, for sessions of the same blocks.

    Args:
        caches: filled with `PROBES`, in that order.

    Raises:
        UnsupportedCallError: they keep something that is neither a tensor of known dimensions, nor constant, nor the
            length.
    """

    def __init__(self, caches: list[SpanCache]) -> None:
        self.small = caches[0]
        self._forms: dict[str, _Form] = {}
        self._lengths: dict[int, list[Path]] = {}  # of layers that do not grow: where their length is noted
        found = [dict(_tensors(cache, cache.blocks)) | _shared(cache) for cache in caches]
        for name in found[0].keys() | found[1].keys() | found[2].keys():
            self._forms[name] = _form_of(name, [tensors.get(name) for tensors in found])
        for index in self.small.held_layers(self.small.blocks):
            layers = [cache.layers[index] for cache in caches]
            if not isinstance(layers[0], GrowingLayer):
                self._lengths[index] = _lengths(index, layers)

    def read(self, cache: SpanCache, blocks: Span | None, first: int, last: int) -> Named:
        """Tokens ``[first, last)`` of what grows, all of what does not, in memory of its own on the CPU.

        Args:
            blocks: whose layers; None for what belongs to no block.

        Raises:
            ValueError: ``last`` is not the length of a cache that keeps something which does not grow.
        """
        tensors: Named = {}
        named = _shared(cache).items() if blocks is None else _tensors(cache, blocks)
        for name, tensor in named:
            if self._grows(name):
                tensor = tensor[:, :, first:last]
            elif last != cache.length:
                raise ValueError(f"the session holds {cache.length} tokens, {last} are asked for")
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return tensors

    def _grows(self, name: str) -> bool:
        kind, index, *_ = name.split(".")
        return kind == "layer" and int(index) not in self._lengths

    def only_grows(self, blocks: Span) -> bool:
        """Whether all that is kept of ``blocks`` grows with the text, so that any range of tokens can be read."""
        return all(self._grows(name) for name in self.names(self.small, blocks))

    def names(self, cache: SpanCache, blocks: Span | None) -> set[str]:
        """What there is to read of a cache that holds some tokens."""
        if blocks is None:
            return {name for name in self._forms if name.startswith(("rotary.", "indexed."))}
        layers = {str(layer) for layer in cache.held_layers(blocks)}
        held = {str(block) for block in blocks}
        parts = {name: name.split(".") for name in self._forms}
        return {
            name
            for name, (kind, index, *_) in parts.items()
            if (kind == "layer" and index in layers) or (kind == "linear" and index in held)
        }

    def check(self, name: str, tensor: torch.Tensor, rows: int, num_tokens: int) -> None:
        self._forms[name].check(name, tensor, rows, num_tokens, is_exact=self._grows(name))

    def new_layer(self, index: int, tensors: Mapping[str, torch.Tensor], length: int) -> Any:
        """A layer that does not grow, with these tensors."""
        layer = copy.deepcopy(self.small.layers[index])
        for path in self._lengths[index]:
            _put(layer, path, length)
        for name, tensor in tensors.items():
            place = next(path for path, _ in _walk(vars(layer)) if _name(index, path) == name)
            _put(layer, place, tensor)
        return layer

    def new_rotary(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What rotary tables remember."""
        memory = copy.deepcopy(self.small.rotary)
        for number, values in enumerate(memory or ()):
            for name, value in values.items():
                given = tensors.get(f"rotary.{number}.{name}")
                if isinstance(value, torch.Tensor) and given is not None:
                    values[name] = given.to(value.device)
                elif given is not None:
                    values[name] = type(value)(given.item())
        return memory


class CacheImport:
    """A copy on its way into a cache, part by part; the cache is as before until `finish`.

    Args:
        cache: empty, or a copy that holds fewer tokens.
        rows: of the copied session.
        last: tokens that it will hold.
    """

    def __init__(self, form: CacheForm, cache: SpanCache, rows: int, last: int) -> None:
        self._form = form
        self._cache = cache
        self._rows = rows
        self._last = last
        self._whole: Named = {}
        self._grown: set[int] = set()

    def add(self, tensors: Named, blocks: Span | None, first: int, last: int) -> None:
        """Take what `CacheForm.read` gave of ``blocks`` for tokens ``[first, last)``.

        Raises:
            ValueError: there is more or less of it than these blocks keep, or it is of another shape or dtype.
        """
        cache, form = self._cache, self._form
        layers = cache.layers
        expected = form.names(cache, blocks)
        if tensors.keys() != expected:
            other = sorted(tensors.keys() ^ expected)[:4]
            raise ValueError(
                f"the parts of a cache of blocks {blocks} are {len(expected)} tensors; too many or missing: {other}"
            )
        pairs: dict[int, list[torch.Tensor]] = {}
        for name in sorted(tensors):  # keys before values
            tensor = tensors[name]
            form.check(name, tensor, self._rows, last - first if form._grows(name) else self._last)
            if form._grows(name):
                pairs.setdefault(int(name.split(".")[1]), []).append(tensor)
            else:
                self._whole[name] = tensor
        for index, (keys, values) in pairs.items():
            layer = layers[index]
            device = form.small.layers[index].keys.device
            layer.write(first, keys.to(device), values.to(device), self._last)
            self._grown.add(index)

    def finish(self) -> None:
        """Let the cache hold what came."""
        cache, small = self._cache, self._form.small
        layers: dict[int, Named] = {}
        for name, tensor in self._whole.items():
            kind, number, *_ = name.split(".")
            index = int(number)
            if kind == "layer":
                layers.setdefault(index, {})[name] = tensor.to(_device_of(small.layers[index]))
            elif kind == "linear":
                cache.linear[index] = tensor.to(small.linear[index].device)
            elif kind == "indexed":
                kept = small.layers[index].indexer_position_ids
                cache.layers[index].indexer_position_ids = tensor.to(kept.device)
        for index in self._grown:
            cache.layers[index].show(self._last)
        made = {index: self._form.new_layer(index, tensors, self._last) for index, tensors in layers.items()}
        cache.begin_with(made, self._last)
        cache.rotary = self._form.new_rotary(self._whole)


def _tensors(cache: SpanCache, blocks: Span) -> Iterator[tuple[str, torch.Tensor]]:
    """What the layers of ``blocks`` keep."""
    for index in cache.held_layers(blocks):
        layer = cache.layers[index]
        if isinstance(layer, GrowingLayer):
            if layer.get_seq_length():
                assert layer.keys is not None
                assert layer.values is not None
                yield f"layer.{index}.keys", layer.keys
                yield f"layer.{index}.values", layer.values
        else:
            for path, value in _walk(vars(layer)):
                if isinstance(value, torch.Tensor) and value.dim():
                    yield _name(index, path), value
    for index in blocks:
        if index < len(cache.linear) and isinstance(cache.linear[index], torch.Tensor):
            yield f"linear.{index}", cache.linear[index]


def _shared(cache: SpanCache) -> Named:
    """What belongs to no block of those that are held."""
    tensors: Named = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LengthLayer) and layer.indexer_position_ids is not None:
            tensors[f"indexed.{index}"] = layer.indexer_position_ids
    for number, values in enumerate(cache.rotary or ()):
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"rotary.{number}.{name}"] = value
            elif isinstance(value, int | float):
                tensors[f"rotary.{number}.{name}"] = torch.tensor(
                    value, dtype=torch.float64 if isinstance(value, float) else torch.int64
                )
    return tensors


def _walk(values: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All that a layer keeps, dictionaries entered."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, key))
        else:
            yield (*path, key), value


def _put(layer: Any, path: Path, value: Any) -> None:
    target: Any = vars(layer)
    for key in path[:-1]:
        target = target[key]
    old = target[path[-1]]
    target[path[-1]] = old.new_tensor(value) if isinstance(old, torch.Tensor) and isinstance(value, int) else value


def _name(index: int, path: Path) -> str:
    return ".".join(map(str, ("layer", index, *path)))


def _device_of(layer: Any) -> torch.device:
    return next(value.device for _, value in _walk(vars(layer)) if isinstance(value, torch.Tensor) and value.dim())


def _form_of(name: str, found: list[torch.Tensor | None]) -> _Form:
    """Of one tensor in the caches of `PROBES`."""
    small, longer, wider = found
    if small is None or longer is None or wider is None:
        raise UnsupportedCallError(f"the KV cache keeps '{name}' at some lengths only")
    if {small.dtype} != {longer.dtype, wider.dtype} or {small.dim()} != {longer.dim(), wider.dim()}:
        raise UnsupportedCallError(f"'{name}' of the KV cache changes its kind with the length")
    sizes = zip(small.shape, longer.shape, wider.shape, strict=True)
    return _Form(small.dtype, tuple(_dim_of(name, *three) for three in sizes))


def _dim_of(name: str, small: int, longer: int, wider: int) -> _Dim:
    if small == longer == wider:
        return _Dim("fixed", small)
    if small == longer and wider == 2 * small:
        return _Dim("rows", small)
    if small == wider and small < longer:
        return _Dim("tokens" if (small, longer) == (PROBES[0][1], PROBES[1][1]) else "some", 0)
    raise UnsupportedCallError(f"'{name}' of the KV cache has sizes that follow neither rows nor tokens")


def _lengths(index: int, layers: list[Any]) -> list[Path]:
    """Where layer ``index`` notes how many tokens there are; everything else that is no tensor must be constant."""
    noted: list[Path] = []
    found = [dict(_walk(vars(layer))) for layer in layers]
    if len({frozenset(values) for values in found}) > 1:
        raise UnsupportedCallError(f"layer {index} of the KV cache keeps other things at other lengths")
    for path, first in found[0].items():
        if isinstance(first, torch.Tensor) and first.dim():
            continue
        values = [value[path].item() if isinstance(value[path], torch.Tensor) else value[path] for value in found]
        if values == [tokens for _, tokens in PROBES]:
            noted.append(path)
        elif not all(value == values[0] for value in values) or not _is_plain(values[0]):
            raise UnsupportedCallError(
                f"layer {index} of the KV cache keeps a {type(first).__name__} that cannot be copied"
            )
    return noted


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)
