"""What the owner of the blocks gave in each step: positions, masks, side inputs, for all hops alike."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from remote_modules.client.call import CallArguments, Named, mask_tensors
from remote_modules.client.history import History
from remote_modules.client.history_store import HistoryStore
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.tensors import TensorSpec, concat, concat_all, owner_spec, slice_tokens

__all__ = ["OwnerHistory", "StepInputs"]

Specs = Mapping[str, TensorSpec]


@dataclass(slots=True)
class _Step:
    """One step as it was made, and its masks of more than two dimensions, by name."""

    num_tokens: int
    masks: Named


class OwnerHistory:
    """Owner's and side inputs of all tokens so far.

    Args:
        store, start: as in `History`.
    """

    def __init__(self, store: HistoryStore, start: int = 0) -> None:
        self.start = start
        self.timed = History({}, store, start)
        self.positions: History | None = None  # None until some step gives positions
        self.attention_mask: torch.Tensor | None = None  # [B, P], as given by the caller
        self.steps: list[_Step] = []
        self.row_names: tuple[str, ...] = ()  # adapters of the rows now, as in `CallArguments`
        self._num_masked = 0  # of `steps`, those with masks of their own
        self._store = store

    def begin(
        self, position: int, call: CallArguments, side_specs: Specs, *, masks_may_end: bool = False
    ) -> StepInputs:
        """The inputs of a step at ``position``; self is unchanged.

        Args:
            masks_may_end: whether a step after others with a mask may come without one: its tokens are no padding.

        Raises:
            UnsupportedCallError: positions or mask do not fit the tokens, or what was given in earlier steps is
                missing now, or the reverse.
        """
        timed = call.timed()
        if position > self.start and timed.keys() != self.timed.specs.keys():
            names = ", ".join(sorted(timed.keys() ^ self.timed.specs.keys()))
            raise UnsupportedCallError(f"'{names}' must be given in every step of a KV cache, or in none")
        specs = {name: side_specs.get(name) or owner_spec(t, call.num_tokens) for name, t in timed.items()}
        columns = position + call.num_tokens
        masks = {name: _cut(name, mask, columns) for name, mask in mask_tensors(call.attention_mask).items()}
        plain = None
        if "attention_mask" in masks and masks["attention_mask"].dim() == 2:
            plain = masks.pop("attention_mask")
        if plain is None and self.attention_mask is not None and position:
            if masks or not masks_may_end:
                text = "attention_mask was given in earlier steps of this cache; give it in every step"
                raise UnsupportedCallError(text)
            new = self.attention_mask.new_ones(len(self.attention_mask), call.num_tokens)
            plain = torch.cat([self.attention_mask, new], dim=1)
        if self.steps and call.row_names != self.row_names:  # a peer that is lost could not be replaced by replay
            was, now = (", ".join(names[:8]) or "none" for names in (self.row_names, call.row_names))
            raise UnsupportedCallError(
                f"adapter_names of this KV cache were {was}, got {now}; give the same in each step"
            )
        _check_positions(call)
        return StepInputs(self, position, call, timed, specs, plain, masks)

    def commit(self, step: StepInputs) -> None:
        """The step is done."""
        num_tokens = step.call.num_tokens
        self.timed.specs.update(step.specs)
        self.timed.append(step.timed, num_tokens)
        given = step.call.position_ids
        if given is not None and self.positions is None:
            self.positions = History({"position_ids": owner_spec(given, num_tokens)}, self._store, self.start)
            old = step.position - self.start
            self.positions.append({"position_ids": _counted(self.start, old, given)}, old)
        elif self.positions is not None:
            given = step.position_ids()
        if self.positions is not None and given is not None:
            self.positions.append({"position_ids": given}, num_tokens)
        self.attention_mask = step.attention_mask
        if step.cuts:
            ends = (step.position, *step.cuts)
            self.steps += [_Step(end - start, {}) for start, end in itertools.pairwise(ends)]
        else:
            self.steps.append(_Step(num_tokens, step.masks))
        self._num_masked += bool(step.masks)
        self.row_names = step.call.row_names

    @property
    def has_step_masks(self) -> bool:
        """Whether some step had a mask of its own, so that only the same steps give the same cache."""
        return self._num_masked > 0

    def step_ends(self, *, after: int) -> list[int]:
        """Positions beyond ``after`` at which a step ended."""
        ends = itertools.accumulate((step.num_tokens for step in self.steps), initial=self.start)
        return [end for end in ends if end > after]

    def crop(self, length: int) -> None:
        self.start = min(self.start, length)
        self.timed.crop(length)
        if self.positions is not None:
            self.positions.crop(length)
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :length] if length else None
        excess = self.start + sum(step.num_tokens for step in self.steps) - length
        while excess > 0:
            last = self.steps.pop()
            kept = max(0, last.num_tokens - excess)
            excess -= last.num_tokens
            if kept:
                self.steps.append(_Step(kept, {n: _cropped(mask, kept, length) for n, mask in last.masks.items()}))
        if length == 0:
            self.timed, self.positions = History({}, self._store), None
        self._num_masked = sum(bool(step.masks) for step in self.steps)
        if not self.steps:
            self.row_names = ()

    def select(self, indices: torch.Tensor) -> None:
        self.timed.select(indices)
        if self.positions is not None:
            self.positions.select(indices)
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[indices]
        if self.row_names:
            self.row_names = tuple(self.row_names[index] for index in indices.tolist())
        for step in self.steps:
            step.masks = {n: mask if len(mask) < 2 else mask[indices] for n, mask in step.masks.items()}

    def copy(self) -> OwnerHistory:
        copied = OwnerHistory(self._store, self.start)
        copied.timed = self.timed.copy()
        copied.positions = None if self.positions is None else self.positions.copy()
        copied.attention_mask = self.attention_mask
        copied.row_names = self.row_names
        copied.steps = [_Step(step.num_tokens, dict(step.masks)) for step in self.steps]
        copied._num_masked = self._num_masked
        return copied


def _cut(name: str, mask: torch.Tensor, columns: int) -> torch.Tensor:
    if mask.dim() > 2:  # static caches ask for masks of their whole room
        return mask[..., :columns]
    if mask.dim() == 2 and mask.shape[-1] != columns:
        raise UnsupportedCallError(f"{name} must have {columns} columns, got {mask.shape[-1]}")
    return mask


def _cropped(mask: torch.Tensor, num_tokens: int, columns: int) -> torch.Tensor:
    return mask[..., :num_tokens, :columns] if mask.dim() > 2 else mask[..., :columns]


def _check_positions(call: CallArguments) -> None:
    position_ids = call.position_ids
    if position_ids is None:
        return
    if position_ids.dim() not in (2, 3) or position_ids.shape[-1] != call.num_tokens:
        n, got = call.num_tokens, list(position_ids.shape)
        raise UnsupportedCallError(f"position_ids must be [B, {n}] or [1, {n}], got {got}")


def _counted(start: int, num_tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Positions that follow the tokens, shaped as ``like`` ``[..., T]`` with one row for all."""
    counted = torch.arange(start, start + num_tokens, dtype=torch.int64)
    return counted.expand(*like.shape[:-2], 1, num_tokens)


@dataclass(slots=True)
class StepInputs:
    """One step under way: what it brings, on top of what went before.

    Attributes:
        cuts: ends of the chunks in which peers are given the new tokens; empty: in one.
    """

    old: OwnerHistory
    position: int
    call: CallArguments
    timed: Named
    specs: dict[str, TensorSpec]
    attention_mask: torch.Tensor | None
    masks: Named = field(default_factory=dict)
    cuts: tuple[int, ...] = ()

    def position_ids(self) -> torch.Tensor:
        """Of the new tokens, in a session where positions are given."""
        given = self.call.position_ids
        if given is not None:
            return given
        assert self.old.positions is not None
        like = self.old.positions.read()["position_ids"]
        return _counted(self.position, self.call.num_tokens, like)

    def chunks(self, behind: int, max_tokens: int, *, is_exact: bool, is_apart: bool) -> Sequence[tuple[int, int]]:
        """Token ranges of the requests that feed ``behind`` old tokens and the new ones.

        Args:
            max_tokens: of one request that merges several steps.
            is_exact: only the same steps give the same cache.
            is_apart: the new tokens make a request of their own.
        """
        start, end = self.position - behind, self.position + self.call.num_tokens
        if behind == 0:
            ends = list(self.cuts) or [end]
        elif is_exact or self.masks or self.old.has_step_masks:
            ends = [*self.old.step_ends(after=start), *(self.cuts or [end])]
        elif is_apart:
            ends = [*_ends(start, self.position, max_tokens), end]
        else:
            ends = _ends(start, end, max_tokens)
        return list(zip([start, *ends[:-1]], ends, strict=True))

    def may_begin_at(self, position: int) -> bool:
        """Whether a peer that holds so many old tokens can be fed the others."""
        return not self.old.has_step_masks or position in (self.old.start, *self.old.step_ends(after=self.old.start))

    def tensors(self, start: int, end: int, side_names: Collection[str]) -> Named:
        """What the hop that takes ``side_names`` needs for tokens ``[start, end)``, but for the plain mask."""
        tensors = {n: t for n, t in self._range(start, end).items() if n in side_names or not n.startswith("side.")}
        if self.call.position_ids is not None or self.old.positions is not None:
            tensors["position_ids"] = self._positions(start, end)
        tensors.update(self.call.constant())
        tensors.update(self._masks(start))
        return tensors

    def _range(self, start: int, end: int) -> Named:
        if not self.timed:
            return {}
        new_start, new_end = max(0, start - self.position), end - self.position
        new = self.timed
        if (new_start, new_end) != (0, self.call.num_tokens):
            new = {n: slice_tokens(t, self.specs[n], new_start, max(0, new_end)).contiguous() for n, t in new.items()}
        if start >= self.position:
            return new
        old = self.old.timed.slice(start, min(end, self.position))
        if end <= self.position:
            return old
        return concat_all([old, new], self.specs)

    def _positions(self, start: int, end: int) -> torch.Tensor:
        if start >= self.position:
            return self.position_ids()[..., start - self.position : end - self.position].contiguous()
        if self.old.positions is not None:
            old = self.old.positions.slice(start, min(end, self.position))["position_ids"]
        else:
            assert self.call.position_ids is not None
            old = _counted(start, min(end, self.position) - start, self.call.position_ids)
        if end <= self.position:
            return old
        new = self.position_ids()[..., : end - self.position]
        return concat([old, new], owner_spec(new, new.shape[-1]))

    def _masks(self, start: int) -> Named:
        if start >= self.position:
            return self.masks
        reached = self.old.start
        for step in self.old.steps:
            if reached == start and step.masks:
                return step.masks
            reached += step.num_tokens
        return {}


def _ends(start: int, end: int, most: int) -> list[int]:
    """Where pieces of at most ``most`` tokens end."""
    return [min(piece + most, end) for piece in range(start, end, most)]
