"""What a session has fed to its hops, so that a lost KV cache can be built again.

`History` holds the inputs of one block boundary, `SideInputs` what all hops share (positions, mask). Both follow the
cache's operations, so that rollback, beam reorder and repeat apply to them as to the peers' caches. The position of a
session is the
length of its history: it is kept nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remote_modules.errors import UnsupportedCallError

__all__ = ["History", "SideInputs"]


class History:
    """Hidden states ``[B, P, D]`` that went into one block, as a list of chunks.

    A batch selection (beam reorder) is only noted: it costs one index vector per step, and is folded into the chunks
    when the history is read.
    """

    def __init__(self, chunks: Sequence[torch.Tensor] = ()) -> None:
        self._items: list[torch.Tensor | _Selection] = list(chunks)
        self._length = sum(chunk.shape[1] for chunk in chunks)

    def __len__(self) -> int:
        return self._length

    def append(self, hidden_states: torch.Tensor) -> None:
        """Add the inputs ``[B, T, D]`` of a step."""
        self._items.append(hidden_states)
        self._length += hidden_states.shape[1]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        while self._length > length:
            last = self._items[-1]
            if isinstance(last, _Selection):
                self._fold()
                continue
            self._items.pop()
            self._length -= last.shape[1]
            if self._length < length:
                self.append(last[:, : length - self._length])
        if self._length == 0:
            self._items.clear()

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``."""
        if self._items:
            self._items.append(_Selection(indices))

    def read(self) -> torch.Tensor:
        """All of it, ``[B, P, D]``; P must not be 0."""
        self._fold()
        (whole,) = self._items
        assert isinstance(whole, torch.Tensor)
        return whole

    def copy(self) -> History:
        copied = History()
        copied._items, copied._length = list(self._items), self._length
        return copied

    def num_bytes(self) -> int:
        return sum(item.numel() * item.itemsize for item in self._items if isinstance(item, torch.Tensor))

    def _fold(self) -> None:
        if len(self._items) < 2:
            return
        rows: torch.Tensor | None = None
        chunks = []
        for item in reversed(self._items):
            if isinstance(item, _Selection):
                rows = item.indices if rows is None else item.indices[rows]
            else:
                chunks.append(item if rows is None else item[rows])
        self._items = [torch.cat(chunks[::-1], dim=1)]


class _Selection:
    __slots__ = ("indices",)

    def __init__(self, indices: torch.Tensor) -> None:
        self.indices = indices


class SideInputs:
    """Positions and attention mask of all tokens so far; None while the caller gives none."""

    def __init__(self) -> None:
        self.position_ids: torch.Tensor | None = None  # [B or 1, P]
        self.attention_mask: torch.Tensor | None = None  # [B, P], as given by the caller

    def extended(
        self, position: int, num_tokens: int, position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> SideInputs:
        """These inputs after a step of ``num_tokens`` at ``position``; self is unchanged.

        Raises:
            UnsupportedCallError: the positions are not ``[B or 1, T]``, the mask has not one column for each token, or
                was given in earlier steps and is missing now.
        """
        result = SideInputs()
        if attention_mask is not None and attention_mask.shape[1] != position + num_tokens:
            columns = attention_mask.shape[1]
            raise UnsupportedCallError(f"attention_mask must have {position + num_tokens} columns, got {columns}")
        if attention_mask is None and self.attention_mask is not None:
            raise UnsupportedCallError("attention_mask was given in earlier steps of this cache; give it in every step")
        result.attention_mask = attention_mask
        if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != num_tokens):
            got = list(position_ids.shape)
            raise UnsupportedCallError(f"position_ids must be [B, {num_tokens}] or [1, {num_tokens}], got {got}")
        if position_ids is None and self.position_ids is None:
            return result
        old = _positions(self.position_ids, 0, position)
        new = _positions(position_ids, position, num_tokens)
        rows = max(len(old), len(new))
        result.position_ids = torch.cat([old.expand(rows, -1), new.expand(rows, -1)], dim=1)
        return result

    def crop(self, length: int) -> None:
        if self.position_ids is not None:
            self.position_ids = self.position_ids[:, :length]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :length]
        if length == 0:
            self.position_ids = self.attention_mask = None

    def select(self, indices: torch.Tensor) -> None:
        if self.position_ids is not None and len(self.position_ids) > 1:
            self.position_ids = self.position_ids[indices]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[indices]

    def copy(self) -> SideInputs:
        copied = SideInputs()
        copied.position_ids, copied.attention_mask = self.position_ids, self.attention_mask
        return copied


def _positions(position_ids: torch.Tensor | None, start: int, num_tokens: int) -> torch.Tensor:
    if position_ids is not None:
        return position_ids
    return torch.arange(start, start + num_tokens, dtype=torch.int64).unsqueeze(0)
