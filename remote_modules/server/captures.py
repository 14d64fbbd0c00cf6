"""Capturing the steps of a span when it is loaded, and trying the graphs against the reference path."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import torch

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.arena import Arena, LayerShape
from remote_modules.model.decode_graphs import DecodeGraphs, Step
from remote_modules.model.joined import JoinedLinears
from remote_modules.model.kv import SpanCache
from remote_modules.model.replay import OwnerArguments, SpanModel

__all__ = ["TOLERANCES", "capture_steps", "can_capture"]

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 6e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value
LENGTHS = (3, 8, 21)  # of the sessions that are tried together
MIN_TOKENS = 1024  # of an arena
SEED = 0


def can_capture(model: SpanModel) -> bool:
    """Whether the device has what graphs and their attention need."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(model.device) >= (8, 0)


def capture_steps(
    model: SpanModel,
    budget_bytes: int,
    *,
    compiled: Collection[int] = (),
    capture: Callable[[Step], Step] | None = None,
) -> bool:
    """Let ``model`` do steps of one token by graphs, if they give the same within rounding.

    Args:
        budget_bytes: of all KV caches; taken at once.
        compiled: numbers of rows whose blocks are compiled, which takes a minute or more for each.

    Returns:
        Whether it does.
    """
    try:
        graphs = _graphs(model, budget_bytes, compiled, capture)
        model.graphs = graphs
        graphs.prepare()
        difference = _difference(model)
        if difference > TOLERANCES[model.dtype]:
            raise UnsupportedCallError(f"results differ by {difference:.1g} of the largest value")
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, UnsupportedCallError) as exc:
        model.graphs = None
        if isinstance(exc, torch.AcceleratorError):
            raise
        logger.warning("steps are not captured: %s", first_line(exc))
        return False
    logger.info("captured steps arena_tokens=%d compiled_rows=%s", graphs.arena.num_tokens, sorted(compiled))
    return True


def _graphs(
    model: SpanModel, budget_bytes: int, compiled: Collection[int], capture: Callable[[Step], Step] | None
) -> DecodeGraphs:
    cache = _filled(model, LENGTHS[0])
    with torch.inference_mode():
        plan = model.note_plan(_random(model, 1), cache)
        joined = JoinedLinears(model.blocks.values(), lambda: model.note_plan(_random(model, 1), cache))
    shapes = {}
    for index, layer in zip(cache.held_layers(model.span), cache.held, strict=True):
        keys, values = layer.keys, layer.values
        if keys.shape != values.shape or keys.shape[-1] % 8 or keys.shape[-1] > 256:
            raise UnsupportedCallError(f"heads of {keys.shape[-1]} and {values.shape[-1]} numbers")
        shapes[index] = LayerShape(keys.shape[1], keys.shape[-1])
    token_bytes = sum(2 * shape.heads * shape.head_size * model.dtype.itemsize for shape in shapes.values())
    num_tokens = budget_bytes // token_bytes
    if num_tokens < MIN_TOKENS:
        raise UnsupportedCallError(f"memory for KV caches is of {num_tokens} tokens")
    arena = Arena(shapes, num_tokens, device=model.device, dtype=model.dtype)
    return DecodeGraphs(
        plan,
        arena,
        model.attention_configs,
        hidden_size=model.hidden_size,
        joined=joined,
        compiled=compiled,
        capture=capture,
    )


def _difference(model: SpanModel) -> float:
    """The largest, of sessions in one graph from each by replay."""
    assert model.graphs is not None
    graphs, steps = model.graphs, [_random(model, 1, SEED + length) for length in LENGTHS]
    captured, replayed = ([_filled(model, length) for length in LENGTHS] for _ in range(2))
    with torch.inference_mode():
        found = graphs.step(torch.cat(steps), [(cache, 1) for cache in captured])
        if found is None:
            raise UnsupportedCallError("caches do not lie in the arena")
        model.graphs = None
        expected = [
            model.run({"hidden_states": step}, model.span, _arguments(1), cache)["hidden_states"]
            for step, cache in zip(steps, replayed, strict=True)
        ]
        model.graphs = graphs
    wanted = torch.cat(expected).float().cpu()
    return float((found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def _filled(model: SpanModel, num_tokens: int) -> SpanCache:
    cache = model.new_cache()
    with torch.inference_mode():
        hidden_states = _random(model, num_tokens, SEED + num_tokens)
        model.run({"hidden_states": hidden_states}, model.span, _arguments(num_tokens), cache)
    return cache


def _arguments(num_tokens: int) -> OwnerArguments:
    return OwnerArguments(rows=1, num_tokens=num_tokens)


def _random(model: SpanModel, num_tokens: int, seed: int = SEED) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_tokens, model.hidden_size, generator=generator).to(model.dtype)
