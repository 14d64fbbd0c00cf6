from __future__ import annotations

import errno
import gc
import logging
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from remote_modules.client.history_store import HistoryStore, StoredTensors
from remote_modules.errors import SessionError

KIB = 1024


def tensors(seed: int, num_tokens: int = 64, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, num_tokens, 16, generator=rng).to(dtype),
        "side.ids": torch.randint(0, 99, (2, num_tokens), generator=rng),
        "side.flags": torch.randint(0, 2, (2, 3), generator=rng).bool(),
    }


def same(stored: StoredTensors, expected: dict[str, torch.Tensor]) -> bool:
    found = stored.read()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_within_the_budget_nothing_is_copied() -> None:
    store = HistoryStore(memory_bytes=100 * KIB)
    kept = tensors(1)
    assert store.keep(kept).read()["hidden_states"] is kept["hidden_states"]
    assert store.bytes_on_disk == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_oldest_leave_memory_and_come_back_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    store = HistoryStore(memory_bytes=20 * KIB, folder=tmp_path)
    stored = [store.keep(tensors(seed, dtype=dtype)) for seed in range(8)]
    assert store.bytes_in_memory <= 20 * KIB
    assert store.bytes_in_memory + store.bytes_on_disk == sum(item.num_bytes for item in stored)
    assert store.bytes_on_disk > 0
    assert all(same(item, tensors(seed, dtype=dtype)) for seed, item in enumerate(stored))
    assert list(tmp_path.iterdir()) == [], "the file has no name: it is gone with the process"


def test_what_nobody_has_any_more_is_given_back() -> None:
    store = HistoryStore(memory_bytes=20 * KIB)
    stored = [store.keep(tensors(seed)) for seed in range(8)]
    del stored
    gc.collect()
    assert (store.bytes_in_memory, store.bytes_on_disk) == (0, 0)


def test_room_on_disk_is_used_again(tmp_path: Path) -> None:
    store = HistoryStore(memory_bytes=1, folder=tmp_path)
    rng = Random(3)
    held: dict[int, StoredTensors] = {}
    most = 0
    for seed in range(200):
        held[seed] = store.keep(tensors(seed, rng.randint(1, 64)))
        sizes = rng.sample(sorted(held), k=min(len(held), rng.randint(0, 2)))
        for key in sizes:
            del held[key]
        most = max(most, store.bytes_on_disk)
    assert store._file is not None
    assert os.fstat(store._file.fileno()).st_size <= 2 * most
    held.clear()
    assert store.keep(tensors(0)).num_bytes == store.bytes_on_disk + store.bytes_in_memory


def test_int8_keeps_a_quarter_and_is_near(caplog: pytest.LogCaptureFixture) -> None:
    store = HistoryStore(memory_bytes=1, dtype="int8")
    expected = tensors(1)
    stored = store.keep(expected)
    assert stored.num_bytes <= 0.27 * expected["hidden_states"].nbytes + expected["side.ids"].nbytes + 6
    found = stored.read()
    assert torch.equal(found["side.ids"], expected["side.ids"])
    blocks = expected["hidden_states"].flatten().view(-1, 64)
    error = (found["hidden_states"] - expected["hidden_states"]).abs().flatten().view(-1, 64)
    assert bool((error.amax(1) <= blocks.abs().amax(1) / 127 * 0.5001).all())
    assert float(error.max()) > 0


def test_int8_of_zeros_is_zero() -> None:
    store = HistoryStore(memory_bytes=KIB, dtype="int8")
    zeros = torch.zeros(2, 64, 16)
    assert torch.equal(store.keep({"hidden_states": zeros}).read()["hidden_states"], zeros)


def test_a_full_disk_keeps_histories_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = HistoryStore(memory_bytes=1)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with caplog.at_level(logging.WARNING, "remote_modules"):
        stored = [store.keep(tensors(seed)) for seed in range(3)]
    assert all(same(item, tensors(seed)) for seed, item in enumerate(stored))
    assert store.bytes_on_disk == 0
    (record,) = caplog.records
    assert record.message.startswith("histories stay in memory beyond history_memory_bytes, the disk takes no more: ")


def test_damage_on_disk_is_noticed() -> None:
    store = HistoryStore(memory_bytes=1)
    stored = store.keep(tensors(1))
    assert store._file is not None
    store._file.seek(100)
    store._file.write(b"\xff\x00")
    with pytest.raises(SessionError, match="damaged: start a new session"):
        stored.read()


def test_closed_store_says_so() -> None:
    store = HistoryStore(memory_bytes=1)
    stored = store.keep(tensors(1))
    store.close()
    store.close()
    with pytest.raises(SessionError, match="closed"):
        stored.read()
