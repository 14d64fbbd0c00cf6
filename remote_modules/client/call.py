"""How the owner of the blocks was called, as it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from remote_modules.model.past import select_layers
from remote_modules.model.stack import StackSpec
from remote_modules.model.tensors import owner_spec
from remote_modules.plan.routing import Demand
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta, Option
from remote_modules.wire.parts import RecordKind

if TYPE_CHECKING:
    from remote_modules.client.adapters import CallAdapter, HopAdapter

__all__ = ["CallArguments", "demand_of", "mask_tensors"]

Named = dict[str, torch.Tensor]
Mask = torch.Tensor | dict[str, torch.Tensor | None]

_NO_MASK = torch.empty(0, dtype=torch.bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArguments:
    """What travels beside that which goes from block to block; tensors lie on the CPU.

    Attributes:
        rows, num_tokens: shape of the owner's inputs ``[B, T]``.
        position_ids: int64 ``[B, T]``, ``[1, T]`` or ``[n, B, T]``; None: they follow the position.
        attention_mask: ``[B, P + T]``, ``[B, h, T, P + T]``, a dict of these by layer type, or None.
        tensors: the owner's other tensors, by argument name.
        sides: side inputs of the blocks, by the names that travel.
        past: keys and values that the blocks' caches begin with (`model.past`), in a call without a session.
        options: the owner's other arguments.
        first_row, use_cache, autocast, record, with_grad: as in `wire.messages.CallMeta`.
        adapter: of the blocks, if any.
        row_names: of each row the name of its adapter, where they have different ones.
        head_tokens, head_top_k: as in `wire.messages.CallMeta`.
    """

    rows: int
    num_tokens: int
    first_row: int = 0
    position_ids: torch.Tensor | None = None
    attention_mask: Mask | None = None
    tensors: Named = field(default_factory=dict)
    sides: Named = field(default_factory=dict)
    past: Named = field(default_factory=dict)
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    use_cache: bool = True
    autocast: str = ""
    record: tuple[RecordKind, ...] = ()
    with_grad: bool = False
    adapter: CallAdapter | None = None
    row_names: tuple[str, ...] = ()
    head_tokens: int = 0
    head_top_k: int = 0

    def meta(self, num_tokens: int | None = None) -> CallMeta:
        """For all tokens, or as many as one of several requests brings."""
        return CallMeta(
            rows=self.rows,
            num_tokens=self.num_tokens if num_tokens is None else num_tokens,
            use_cache=self.use_cache,
            autocast=self.autocast,
            options=tuple(Option(name, value) for name, value in self.options.items()),
            record=self.record,
            with_grad=self.with_grad,
            seed=None if self.adapter is None else self.adapter.seed,
            first_row=self.first_row,
            adapter_rows=b"" if self.adapter is None else self.adapter.rows(self.row_names),
            head_tokens=self.head_tokens,
            head_top_k=self.head_top_k,
        )

    def owner_tensors(self) -> Named:
        """Of a call without a session: everything that every hop gets."""
        tensors = mask_tensors(self.attention_mask)
        if self.position_ids is not None:
            tensors["position_ids"] = self.position_ids
        tensors.update((f"owner.{name}", tensor) for name, tensor in self.tensors.items())
        return tensors

    def timed(self) -> Named:
        """What has one entry for each token, but for positions and mask."""
        if not self.tensors:
            return dict(self.sides)
        owner = {f"owner.{name}": tensor for name, tensor in self.tensors.items()}
        return self.sides | {n: t for n, t in owner.items() if owner_spec(t, self.num_tokens).time is not None}

    def constant(self) -> Named:
        """What is the same for all tokens."""
        if not self.tensors:
            return {}
        owner = {f"owner.{name}": tensor for name, tensor in self.tensors.items()}
        return {n: t for n, t in owner.items() if owner_spec(t, self.num_tokens).time is None}

    def sides_of(self, stack: StackSpec, blocks: Span) -> Named:
        """The side inputs that ``blocks`` take."""
        return {name: self.sides[name] for name in stack.side_specs(blocks)}

    def adapter_of(self, blocks: Span) -> HopAdapter | None:
        """What ``blocks`` have of the adapter."""
        return None if self.adapter is None else self.adapter.part(blocks)

    def past_of(self, stack: StackSpec, blocks: Span) -> Named:
        """What the caches of ``blocks`` begin with."""
        return select_layers(self.past, stack.layers_of(blocks))


def mask_tensors(mask: Mask | None) -> Named:
    """A mask by the names that travel; an empty tensor stands for a layer type without one."""
    if isinstance(mask, dict):
        return {f"attention_mask.{kind}": _NO_MASK if part is None else part for kind, part in mask.items()}
    return {} if mask is None else {"attention_mask": mask}


def demand_of(num_bytes: int, call: CallArguments, *, kv_tokens: int, is_decode: bool = False) -> Demand:
    """What a pass asks of every hop whose inputs, or gradients, take ``num_bytes`` on the wire."""
    tokens = max(1, call.rows * call.num_tokens)
    return Demand(
        num_tokens=call.num_tokens,
        kv_tokens=kv_tokens,
        bytes_per_token=-(-num_bytes // tokens),
        is_decode=is_decode,
        rows=call.rows,
        adapter="" if call.adapter is None else call.adapter.offered,
        minor=0 if call.adapter is None else call.adapter.minor,
    )
