"""Adapter tensors are copied and hashed where the caller is, once for each content that they have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from remote_modules.client import adapter_snapshots, adapters
from remote_modules.client.adapter_snapshots import Snapshots
from remote_modules.client.adapters import AdapterWatch, note_change
from remote_modules.model import adapter_content
from remote_modules.model.adapter_content import part_digest
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import AdapterSet
from remote_modules.spans import Span


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what is hashed."""
    found: list[torch.Size] = []

    def digest(tensor: torch.Tensor) -> bytes:
        found.append(tensor.shape)
        return part_digest(tensor)

    monkeypatch.setattr(adapter_snapshots, "part_digest", digest)
    return found


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.zeros(8, 2))]


def test_unchanged_tensors_are_hashed_once(hashed: list[torch.Size]) -> None:
    snapshots, own = Snapshots(), parameters()
    first, again = snapshots.take(own), snapshots.take(own)
    assert len(hashed) == 2
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert [one.digest for one in first] == [part_digest(tensor) for tensor in own]


@torch.no_grad()
def change_in_place(tensor: nn.Parameter) -> None:
    tensor[0, 0] += 1e-6


def change_through_data(tensor: nn.Parameter) -> None:
    version = tensor._version
    tensor.data[0, 0] = -0.0
    assert tensor._version == version


def replace_data(tensor: nn.Parameter) -> None:
    tensor.data = torch.zeros(4, 4)


@pytest.mark.parametrize("change", [change_in_place, change_through_data, replace_data])
def test_every_change_is_seen_and_old_copies_stay(hashed: list[torch.Size], change) -> None:  # type: ignore[no-untyped-def]
    snapshots, own = Snapshots(), parameters()
    before = snapshots.take(own)
    change(own[1])
    after = snapshots.take(own)
    assert len(hashed) == 3
    assert after[0] is before[0]
    assert after[1].digest == part_digest(own[1]) != before[1].digest
    assert torch.equal(before[1].tensor, torch.zeros(8, 2))


def test_bits_are_compared(hashed: list[torch.Size]) -> None:
    own = [torch.full((3,), math.nan, dtype=torch.bfloat16), torch.tensor(1.0), torch.ones(4, 3).T]
    snapshots = Snapshots()
    snapshots.take(own)
    snapshots.take([*own[:2], torch.ones(3, 4)])
    assert len(hashed) == 3
    snapshots.take([own[0].half(), torch.ones(1), own[2]])
    assert len(hashed) == 5
    assert len(snapshots.take(own[:1])) == 1


def test_nothing_but_entries_is_hashed_for_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the event loop asks for was hashed when the caller's thread read the adapters."""
    own = parameters()
    found = AdapterSet((Lora(1, "proj", 0.5),), tuple(own))
    monkeypatch.setattr(adapters, "collect", lambda blocks: found)
    note_change()
    watch = AdapterWatch()
    call = watch.read(lambda: {1: nn.ModuleList([nn.Linear(1, 1)])})
    assert call is not None
    on_loop: list[torch.dtype] = []

    def digest(tensor: torch.Tensor) -> bytes:
        on_loop.append(tensor.dtype)
        return part_digest(tensor)

    monkeypatch.setattr(adapter_content, "part_digest", digest)
    own[0].data[0, 0] = 7.0
    for adapter in (call, call.taken(own)):
        assert adapter.part(Span(0, 2)) is not None
    assert on_loop == [torch.uint8, torch.uint8]
    part = call.taken(own).part(Span(0, 2))
    assert part is not None
    assert part.content is not None
    assert part.content.parts[1:] == tuple(map(part_digest, own))
