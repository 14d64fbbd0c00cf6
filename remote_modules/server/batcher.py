"""Steps of sessions as work for the device: which may run together, how they do, and how a long one is cut."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from remote_modules.model.kv import GrowingLayer, SpanCache
from remote_modules.model.packed import Member
from remote_modules.model.replay import OwnerArguments
from remote_modules.model.tensors import concat_all, slice_tokens
from remote_modules.server.checks import RequestTensors
from remote_modules.server.engine import Engine, apply_op
from remote_modules.server.jobs import Batchable
from remote_modules.server.transfers import to_cpu
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp

__all__ = ["StepWork"]

logger = logging.getLogger(__name__)

Named = dict[str, torch.Tensor]

MAX_FAILURES = 3  # in a row; then steps run alone from then on


@dataclass(slots=True, eq=False)
class StepWork(Batchable):
    """One step of a session.

    Attributes:
        who: the session.
        position: tokens that the cache holds once ``ops`` are applied.
    """

    engine: Engine
    who: str
    cache: SpanCache
    blocks: Span
    ops: tuple[CacheOp, ...]
    tensors: RequestTensors
    arguments: OwnerArguments
    num_outputs: int | None
    position: int
    group: Hashable | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        self.rows = self.arguments.rows
        self.group = self._group() if self.engine.packs else None

    def __call__(self) -> Named:
        return self.engine.step(self.cache, self.blocks, self.ops, self.tensors, self.arguments, self.num_outputs)

    def with_others(self, others: Sequence[StepWork]) -> list[Named]:
        answers = _together([self, *others])
        self.engine.packing_failures = 0
        return answers

    def parted(self) -> None:
        self.engine.packing_failures += 1
        if self.engine.packing_failures >= MAX_FAILURES:
            logger.warning("steps failed together %d times in a row: each runs alone from now on", MAX_FAILURES)
            self.engine.packs = False

    @property
    def may_run_here(self) -> bool:  # type: ignore[override]
        """A longer text may be captured, or compiled, when it comes."""
        return self.engine.model.graphs is None

    @property
    def may_cut(self) -> bool:
        """Whether its tokens may run a few at a time: the same, but for rounding."""
        arguments, mask, stack = self.arguments, self.arguments.attention_mask, self.engine.model.stack
        if arguments.tensors or arguments.record or arguments.adapter is not None or self.tensors.past:
            return False
        if stack.replays_steps or not (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)):
            return False
        specs = self.engine.specs(self.blocks)
        has_tokens = all(specs[name].time is not None for name in self.tensors.inputs)
        return has_tokens and all(type(layer) is GrowingLayer for layer in self.cache.held)

    def cut(self, num_tokens: int) -> tuple[StepWork, StepWork]:
        """Its first tokens, and the others, which come after them."""
        total = self.arguments.num_tokens
        wanted = total if self.num_outputs is None else self.num_outputs
        first = self._part(0, num_tokens, num_outputs=max(0, wanted - (total - num_tokens)))
        rest = self._part(num_tokens, total, num_outputs=min(wanted, total - num_tokens))
        return first, rest

    def _part(self, start: int, end: int, *, num_outputs: int) -> StepWork:
        arguments, specs = self.arguments, self.engine.specs(self.blocks)
        positions, mask = arguments.position_ids, arguments.attention_mask
        inputs = {name: slice_tokens(each, specs[name], start, end) for name, each in self.tensors.inputs.items()}
        return replace(
            self,
            ops=self.ops if start == 0 else (),
            tensors=replace(self.tensors, inputs=inputs),
            arguments=replace(
                arguments,
                num_tokens=end - start,
                position_ids=None if positions is None else positions[..., start:end],
                attention_mask=mask[:, : self.position + end] if isinstance(mask, torch.Tensor) else mask,
            ),
            num_outputs=num_outputs,
            position=self.position + start,
        )

    def join(self, parts: Sequence[Named]) -> Named:
        """The answer, of those of all parts."""
        return concat_all(parts, self.engine.specs(self.blocks))

    def _group(self) -> Hashable | None:
        """What must be equal of steps that run together; None: this one runs alone."""
        arguments, tensors = self.arguments, self.tensors
        if arguments.num_tokens != 1 or self.position == 0 or tensors.past or arguments.tensors:
            return None
        if arguments.adapter is not None or arguments.record or self.num_outputs == 0:
            return None
        if any(op.kind != "crop" for op in self.ops) or not _sees_all(arguments.attention_mask):
            return None
        positions = arguments.position_ids
        shapes = []
        for name, tensor in sorted(tensors.inputs.items()):
            batch = self.engine.specs(self.blocks)[name].batch
            if batch is None or tensor.shape[batch] != self.rows:
                return None
            shapes.append((name, tensor.dtype, *tensor.shape[:batch], *tensor.shape[batch + 1 :]))
        leading = () if positions is None else tuple(positions.shape[:-2])
        options = tuple(sorted((name, type(value).__name__, value) for name, value in arguments.options.items()))
        return (self.blocks, *shapes, leading, arguments.use_cache, arguments.autocast, options)


def _sees_all(mask: torch.Tensor | dict[str, torch.Tensor | None] | None) -> bool:
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all()))


def _together(works: Sequence[StepWork]) -> list[Named]:
    """What each step gives, run as one; raises with all caches as before, but for crops, which may be repeated."""
    try:
        with works[0].engine.stepping():
            return _packed(works)
    except BaseException:
        for work in works:
            work.cache.crop(work.position)
        raise


def _packed(works: Sequence[StepWork]) -> list[Named]:
    first, rows = works[0], [work.rows for work in works]
    specs = first.engine.specs(first.blocks)
    dims = {name: spec.batch or 0 for name, spec in specs.items()}
    for work in works:
        for op in work.ops:
            apply_op(work.cache, op, work.tensors.indices)
    inputs = {
        name: torch.cat([work.tensors.inputs[name] for work in works], dim=dims[name]) for name in first.tensors.inputs
    }
    arguments = OwnerArguments(
        rows=sum(rows),
        num_tokens=1,
        position_ids=torch.cat([_positions(work) for work in works], dim=-2),
        options=first.arguments.options,
        use_cache=False,
        autocast=first.arguments.autocast,
    )
    members = [Member(work.cache, work.rows) for work in works]
    outputs = first.engine.model.run_packed(inputs, first.blocks, arguments, members)
    outputs = to_cpu(outputs, lambda _, tensor: tensor.dtype)
    parts = {name: tensor.split(rows, dim=dims[name]) for name, tensor in outputs.items()}
    answers = [{name: parts[name][number] for name in parts} for number in range(len(works))]
    dtypes = [work.tensors.inputs["hidden_states"].dtype for work in works]
    return [_of_dtype(answer, dtype) for answer, dtype in zip(answers, dtypes, strict=True)]


def _positions(work: StepWork) -> torch.Tensor:
    """``[B, 1]``, or ``[n, B, 1]``."""
    positions = work.arguments.position_ids
    if positions is None:
        return torch.full((work.rows, 1), work.position, dtype=torch.int64)
    return positions.expand(*positions.shape[:-2], work.rows, 1)


def _of_dtype(tensors: Named, dtype: torch.dtype) -> Named:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
