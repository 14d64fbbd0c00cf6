"""What went into one block boundary, so that a lost KV cache can be built again.

A history follows the cache's operations, so that rollback, beam reorder and repeat apply to it as to the peers' caches.
The position of a session is the length of its history: it is kept nowhere else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from remote_modules.client.call import Named
from remote_modules.client.history_store import HistoryStore, StoredTensors
from remote_modules.model.tensors import TensorSpec, concat_all, select_rows, slice_tokens

__all__ = ["History"]

SEAL_TOKENS = 64  # of the newest chunks: then they are joined, and may leave memory


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of one or several steps, as they were when they came.

    Attributes:
        mark: batch selections of the history that were made before.
    """

    tensors: Named | StoredTensors
    num_tokens: int
    mark: int

    def read(self) -> Named:
        return self.tensors.read() if isinstance(self.tensors, StoredTensors) else self.tensors


class History:
    """Named tensors that have one entry for each token, as a list of chunks.

    A batch selection (beam reorder) is only noted: it costs one index vector, and is done when the tokens are read.

    Args:
        specs: of each tensor.
        store: keeps the chunks that are sealed.
        start: tokens that came before the first, of which only keys and values are known.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], store: HistoryStore, start: int = 0) -> None:
        self.specs = dict(specs)
        self.start = start
        self._store = store
        self._sealed: list[_Chunk] = []
        self._newest: list[_Chunk] = []
        self._selections: list[torch.Tensor] = []
        self._length = 0
        self._num_newest = 0  # tokens

    def __len__(self) -> int:
        return self.start + self._length

    def append(self, tensors: Named, num_tokens: int) -> None:
        """Add what a step brought."""
        if num_tokens:
            self._newest.append(_Chunk(dict(tensors), num_tokens, len(self._selections)))
            self._length += num_tokens
            self._num_newest += num_tokens
            if self._num_newest >= SEAL_TOKENS:
                self._seal()

    def _seal(self) -> None:
        num_tokens = self._num_newest
        whole = self._join(self._newest, 0, num_tokens)
        self._newest, self._num_newest = [], 0
        self._merge_selections()
        self._sealed.append(_Chunk(self._store.keep(whole), num_tokens, len(self._selections)))

    def _merge_selections(self) -> None:
        """Make one of those between two chunks."""
        marks = sorted({chunk.mark for chunk in self._sealed})
        merged: list[torch.Tensor] = []
        moved = {}
        for begin, end in itertools.pairwise([*marks, len(self._selections)]):
            moved[begin] = len(merged)
            if begin < end:
                merged.append(functools.reduce(torch.Tensor.__getitem__, self._selections[begin:end]))
        self._sealed = [replace(chunk, mark=moved[chunk.mark]) for chunk in self._sealed]
        self._selections = merged

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.start = min(self.start, length)
        length -= self.start
        while self._length > length:
            last = (self._newest or self._sealed).pop()
            self._length -= last.num_tokens
            if self._length < length:
                kept = length - self._length
                tensors = {name: slice_tokens(t, self.specs[name], 0, kept) for name, t in last.read().items()}
                self._newest.append(_Chunk(tensors, kept, last.mark))
                self._length = length
        self._num_newest = sum(chunk.num_tokens for chunk in self._newest)
        if self._length == 0:
            self._selections.clear()

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``."""
        if self._length:
            self._selections.append(indices)

    def read(self) -> Named:
        """All of it; must not be empty."""
        return self.slice(self.start, len(self))

    def slice(self, start: int, end: int) -> Named:
        """Tokens ``[start, end)``; must not be empty."""
        return self._join((*self._sealed, *self._newest), start - self.start, end - self.start)

    def num_rows(self, name: str) -> int:
        """Batch rows of the tensor ``name`` now; there must be tokens."""
        if self._selections and (self._newest or self._sealed)[-1].mark < len(self._selections):
            return len(self._selections[-1])
        batch = self.specs[name].batch
        assert batch is not None
        return (self._newest or self._sealed)[-1].read()[name].shape[batch]

    def copy(self) -> History:
        """Shares the chunks, which never change."""
        copied = History(self.specs, self._store, self.start)
        copied._sealed, copied._newest = list(self._sealed), list(self._newest)
        copied._selections, copied._length = list(self._selections), self._length
        copied._num_newest = self._num_newest
        return copied

    def _join(self, chunks: Sequence[_Chunk], start: int, end: int) -> Named:
        """Tokens ``[start, end)`` of ``chunks``, with the rows as they are now."""
        if not self.specs:
            return {}
        rows = list(itertools.accumulate(reversed(self._selections), lambda later, earlier: earlier[later]))[::-1]
        parts = []
        for chunk in chunks:
            first, last = max(start, 0), min(end, chunk.num_tokens)
            if first < last:
                tensors = chunk.read()
                if (first, last) != (0, chunk.num_tokens):
                    tensors = {n: slice_tokens(t, self.specs[n], first, last) for n, t in tensors.items()}
                if chunk.mark < len(rows):
                    tensors = {n: select_rows(t, self.specs[n], rows[chunk.mark]) for n, t in tensors.items()}
                parts.append(tensors)
            start, end = start - chunk.num_tokens, end - chunk.num_tokens
        return concat_all(parts, self.specs)
