"""Decode steps of several sessions as the rows of one call, each row attending to its own session's KV cache.

Norms, projections, MLPs and experts run once for all rows. Attention is the owner's own, called for each session: for
the time of a packed call the configs name a function of ours, which splits the rows, lets each session's cache layer
take its keys and values, and calls what the configs named before. So sessions of any lengths go together, and a call
that is not packed is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.decode_attention import FIELD
from remote_modules.model.decode_graphs import DecodeGraphs
from remote_modules.model.kv import GrowingLayer, SpanCache

__all__ = ["Member", "Packing", "by_graph", "is_packable"]

NAME = "remote_modules_packed"


@dataclass(frozen=True, slots=True)
class Member:
    """One session in a packed call.

    Attributes:
        rows: of its batch.
    """

    cache: SpanCache
    rows: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """The packed call that runs now.

    Attributes:
        members: each session's cache layers and rows.
        implementation: what the configs named before.
    """

    members: list[tuple[list[Any], int]]
    implementation: str


_plan: ContextVar[_Plan | None] = ContextVar("remote_modules_packed", default=None)


class Packing:
    """Packed calls of an owner.

    Args:
        configs: those that name the attention of its blocks.
    """

    def __init__(self, configs: list[Any]) -> None:
        self._configs = configs

    @contextmanager
    def over(self, members: Sequence[Member]) -> Iterator[None]:
        """Calls of the owner in this context, without a cache, are packed: one token of each row.

        Raises:
            UnsupportedCallError: the blocks did not attend through the function that was named, or caches are not such
                as can be packed. All caches are as before, as after any other exception.
        """
        before = [getattr(config, FIELD) for config in self._configs]
        if len(set(before)) != 1 or not all(is_packable(member.cache) for member in members):
            raise UnsupportedCallError("these caches, or the attention of this model, cannot be packed")
        token = _plan.set(_Plan([(member.cache.layers, member.rows) for member in members], before[0]))
        try:
            for config in self._configs:
                setattr(config, FIELD, NAME)
            yield
            if not all(_has_grown(member.cache) for member in members):
                raise UnsupportedCallError("the blocks keep keys and values by themselves")
        except BaseException:
            for member in members:
                member.cache.rewind()
            raise
        finally:
            _plan.reset(token)
            for config, name in zip(self._configs, before, strict=True):
                setattr(config, FIELD, name)
        for member in members:
            member.cache.advance(1)


def by_graph(
    graphs: DecodeGraphs, hidden_states: torch.Tensor, position_ids: torch.Tensor | None, members: Sequence[Member]
) -> torch.Tensor | None:
    """One token ``[R, 1, H]`` of each row by a graph; None, and nothing has changed, if there is none for it."""
    lengths = torch.tensor([[member.cache.length] for member in members for _ in range(member.rows)])
    if position_ids is None or bool((position_ids != lengths).any()):
        return None
    output = graphs.step(hidden_states, [(member.cache, member.rows) for member in members])
    if output is not None:
        for member in members:
            member.cache.advance(1)
    return output


def is_packable(cache: SpanCache) -> bool:
    """Whether ``cache`` holds keys and values of attention alone, of at least one token."""
    return cache.length > 0 and all(type(layer) is GrowingLayer for layer in cache.held)


def _has_grown(cache: SpanCache) -> bool:
    return all(layer.get_seq_length() == cache.length + 1 for layer in cache.held)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    plan = _plan.get()
    if plan is None or attention_mask is not None:
        raise UnsupportedCallError("this attention is for packed calls without a mask")
    attend, index = _original(plan.implementation, module), module.layer_idx
    outputs, start = [], 0
    for layers, rows in plan.members:
        part = slice(start, start + rows)
        keys, values = layers[index].update(key[part], value[part])
        outputs.append(attend(module, query[part], keys, values, None, **kwargs)[0])
        start += rows
    return torch.cat(outputs), None


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if function is None:
        raise UnsupportedCallError(f"{type(module).__name__} has an attention of its own")
    return function


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
