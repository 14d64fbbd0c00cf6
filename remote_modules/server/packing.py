"""Whether a span gives the same when sessions decode together as when each is alone: tried when it is loaded.

Some architectures cannot: their attention does not go through transformers' interface, keeps its past in its modules,
or looks at its place in the text in a way that only an owner with a cache shows it. Nothing here knows them by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.kv import SpanCache
from remote_modules.model.packed import Member, is_packable
from remote_modules.model.replay import OwnerArguments
from remote_modules.server.captures import TOLERANCES
from remote_modules.server.engine import Engine
from remote_modules.spans import Span

__all__ = ["packing_fault"]

LENGTHS = (3, 8, 21)  # of the sessions that are tried
SPACES = ("window", "chunk", "floor_scale")  # in names of numbers of a config that say where attention changes
MAX_LONG = 16384
SEED = 0


def packing_fault(engine: Engine) -> str:
    """Why sessions must not decode together on ``engine``; empty if they may."""
    stack, span = engine.model.stack, engine.model.span
    if stack.no_cache or stack.replays_steps or any(spec.batch is None for spec in engine.specs(span).values()):
        return "its cache, or what its blocks take, is of another kind"
    tolerance = TOLERANCES.get(engine.model.dtype)
    if tolerance is None:
        return f"nothing is known of how {engine.model.dtype} rounds"
    long = _long(engine)
    try:
        with engine.stepping(), _without_graphs(engine):
            difference = _difference(engine, span, LENGTHS)
            for part in _kinds(engine) if long else []:
                difference = max(difference, _difference(engine, part, (*LENGTHS, long)))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, UnsupportedCallError) as exc:
        return first_line(exc)
    return "" if difference <= tolerance else f"results differ by {difference:.1g} of the largest value"


@contextmanager
def _without_graphs(engine: Engine) -> Iterator[None]:
    """They were tried already (`server.captures`), and do not serve all steps."""
    graphs, engine.model.graphs = engine.model.graphs, None
    try:
        yield
    finally:
        engine.model.graphs = graphs


def _difference(engine: Engine, span: Span, lengths: Sequence[int]) -> float:
    """The largest, of sessions of ``lengths`` in one call from each alone."""
    generator = torch.Generator().manual_seed(SEED)
    alone, packed = ([_cache(engine, span, length) for length in lengths] for _ in range(2))
    inputs = [engine.random_inputs(span, generator) for _ in lengths]
    one = OwnerArguments(rows=1, num_tokens=1)
    expected = [engine.model.run(each, span, one, cache) for each, cache in zip(inputs, alone, strict=True)]
    specs = engine.specs(span)
    together = {name: torch.cat([each[name] for each in inputs], dim=specs[name].batch or 0) for name in inputs[0]}
    arguments = OwnerArguments(
        rows=len(lengths), num_tokens=1, position_ids=torch.tensor(lengths)[:, None], use_cache=False
    )
    found = engine.model.run_packed(together, span, arguments, [Member(cache, 1) for cache in packed])
    worst = 0.0
    for name, tensor in found.items():
        wanted = torch.cat([each[name] for each in expected], dim=specs[name].batch or 0).float()
        size = max(float(wanted.abs().max()), 1e-30)
        worst = max(worst, float((tensor.float() - wanted).abs().max()) / size)
    return worst


def _cache(engine: Engine, span: Span, length: int) -> SpanCache:
    """As if a text of ``length`` tokens had gone through ``span``: some true tokens, and those repeated."""
    cache = engine.new_cache()
    num_tokens = min(length, LENGTHS[-1])
    generator = torch.Generator().manual_seed(SEED + length)
    inputs = engine.random_inputs(span, generator, num_tokens)
    engine.model.run(inputs, span, OwnerArguments(rows=1, num_tokens=num_tokens), cache)
    if length > num_tokens and is_packable(cache):
        for layer in cache.held:
            keys, values = (_repeated(states, length) for states in (layer.keys, layer.values))
            layer.write(0, keys, values, length)
            layer.show(length)
        cache.advance(length - num_tokens)
    return cache


def _repeated(states: torch.Tensor, length: int) -> torch.Tensor:
    return states.repeat(1, 1, -(-length // states.shape[2]), 1)[:, :, :length]


def _long(engine: Engine) -> int:
    """Beyond where attention changes with the length, if that can be tried; 0: it does not."""
    config: dict[str, Any] = vars(engine.model.config.get_text_config(decoder=True))
    numbers = [
        value
        for name, value in config.items()
        if any(space in name for space in SPACES) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return min(max(numbers), MAX_LONG) + LENGTHS[0] if any(number > 0 for number in numbers) else 0


def _kinds(engine: Engine) -> list[Span]:
    """The first part of the span of each kind of attention."""
    model = engine.model
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    here = range(model.span.start, model.span.end + 1)
    cuts = [cut for cut in here if not model.stack.cuts or cut in model.stack.cuts]
    found: dict[tuple[str, ...], Span] = {}
    for start, end in pairwise(cuts):
        found.setdefault(tuple(types[start:end]), Span(start, end))
    return list(found.values())
