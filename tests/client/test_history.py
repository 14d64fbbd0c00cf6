from __future__ import annotations

import itertools
from random import Random

import pytest
import torch

from remote_modules.client.history import SEAL_TOKENS, History
from remote_modules.client.history_store import HistoryStore
from remote_modules.model.tensors import TensorSpec

WIDTH = 3


def hidden(rows: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def history_of(*chunks: torch.Tensor, memory_bytes: int = 2**40) -> History:
    store = HistoryStore(memory_bytes=memory_bytes)
    history = History({"hidden_states": TensorSpec(("B", "T", "1H"))}, store)
    for chunk in chunks:
        add(history, chunk)
    return history


def add(history: History, chunk: torch.Tensor) -> None:
    history.append({"hidden_states": chunk}, chunk.shape[1])


def read(history: History) -> torch.Tensor:
    return history.read()["hidden_states"]


def indices(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def test_new_history_is_empty() -> None:
    assert len(history_of()) == 0


def test_appended_steps_are_read_in_order() -> None:
    history = history_of(hidden(2, 3, seed=1))
    add(history, hidden(2, 1, seed=2))
    assert len(history) == 4
    assert torch.equal(read(history), torch.cat([hidden(2, 3, seed=1), hidden(2, 1, seed=2)], dim=1))
    assert torch.equal(read(history), read(history))


def test_history_of_one_chunk_is_read_without_a_copy() -> None:
    chunk = hidden(2, 3)
    assert read(history_of(chunk)) is chunk


@pytest.mark.parametrize("length", range(8))
def test_crop_keeps_the_first_tokens(length: int) -> None:
    chunks = [hidden(2, 3, seed=1), hidden(2, 1, seed=2), hidden(2, 2, seed=3)]
    history = history_of(*chunks)
    history.crop(length)
    assert len(history) == min(length, 6)
    if length:
        assert torch.equal(read(history), torch.cat(chunks, dim=1)[:, :length])


def test_history_cropped_to_nothing_takes_another_batch_size() -> None:
    history = history_of(hidden(2, 3))
    history.select(indices(1, 0))
    history.crop(0)
    assert len(history) == 0
    add(history, hidden(1, 2))
    assert torch.equal(read(history), hidden(1, 2))


@pytest.mark.parametrize("rows", [(1, 0), (0, 0), (1,), (0, 0, 1, 1)], ids=["reorder", "repeat-one", "drop", "repeat"])
def test_select_changes_the_rows_of_what_came_before_only(rows: tuple[int, ...]) -> None:
    history = history_of(hidden(2, 3, seed=1))
    history.select(indices(*rows))
    add(history, hidden(len(rows), 1, seed=2))
    assert torch.equal(
        read(history), torch.cat([hidden(2, 3, seed=1)[list(rows)], hidden(len(rows), 1, seed=2)], dim=1)
    )


def test_select_of_an_empty_history_changes_nothing() -> None:
    history = history_of()
    history.select(indices(5))
    add(history, hidden(2, 1))
    assert torch.equal(read(history), hidden(2, 1))


def test_copy_goes_its_own_way() -> None:
    history = history_of(hidden(2, 3))
    copy = history.copy()
    copy.select(indices(1, 0))
    add(copy, hidden(2, 1, seed=1))
    history.crop(2)
    assert torch.equal(read(history), hidden(2, 3)[:, :2])
    assert torch.equal(read(copy), torch.cat([hidden(2, 3)[[1, 0]], hidden(2, 1, seed=1)], dim=1))


def test_rows_are_those_of_now() -> None:
    history = history_of(hidden(2, 3))
    assert history.num_rows("hidden_states") == 2
    history.select(indices(1, 0, 1))
    assert history.num_rows("hidden_states") == 3
    add(history, hidden(3, 1))
    assert history.num_rows("hidden_states") == 3


def test_tokens_are_sealed_in_order_and_a_range_reads_no_more_than_it_needs() -> None:
    """Beam search over many chunks: the rows of each are those that all later selections come to."""
    steps = 5 * SEAL_TOKENS // 2
    history = history_of(memory_bytes=1)
    twin = torch.empty(2, 0, WIDTH)
    for number in range(steps):
        new = hidden(2, 1, seed=number)
        add(history, new)
        rows = [number % 2, (number // 3) % 2]
        history.select(indices(*rows))
        twin = torch.cat([twin, new], dim=1)[rows]
    assert torch.equal(read(history), twin)
    for start, end in itertools.pairwise([0, 1, SEAL_TOKENS - 1, SEAL_TOKENS + 1, 2 * SEAL_TOKENS, steps]):
        assert torch.equal(history.slice(start, end)["hidden_states"], twin[:, start:end])


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("memory_bytes", [1, 2**40], ids=["on-disk", "in-memory"])
def test_random_operations_agree_with_a_plain_tensor(seed: int, memory_bytes: int) -> None:
    rng = Random(seed)
    history = history_of(memory_bytes=memory_bytes)
    twin = torch.empty(2, 0, WIDTH)
    for number in range(40):
        match rng.choice(["append", "append", "crop", "select", "read", "copy"]):
            case "append":
                new = hidden(len(twin), rng.choice([1, 2, 3, 70]), seed=number)
                add(history, new)
                twin = torch.cat([twin, new], dim=1)
            case "crop":
                length = rng.randint(0, twin.shape[1] + 1)
                history.crop(length)
                twin = twin[:, :length]
            case "select" if twin.shape[1]:
                rows = [rng.randrange(len(twin)) for _ in range(rng.randint(1, 4))]
                history.select(indices(*rows))
                twin = twin[rows]
            case "copy":
                history = history.copy()
        assert len(history) == twin.shape[1]
        if rng.random() < 0.3 and len(history):
            assert torch.equal(read(history), twin)
    if len(history):
        assert torch.equal(read(history), twin)
