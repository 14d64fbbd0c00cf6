from __future__ import annotations

import hashlib

import pytest
import torch

from remote_modules.errors import RemoteProtocolError
from remote_modules.model.adapter_content import assemble, content_name, content_of, part_digest
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import Adapter, AdapterSet, encode_entries

ENTRIES = (Lora(1, "a", 0.5), Lora(1, "b", 0.5), Lora(3, "a", 0.5))


def tensors(count: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8), (4, 2)] * count
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_parts_are_the_entries_of_each_block_and_their_tensors() -> None:
    own = tensors()
    content = content_of(AdapterSet(ENTRIES, own))
    kinds = [part.dtype for part in content.tensors]
    assert kinds == [torch.uint8, *[torch.float32] * 4, torch.uint8, *[torch.float32] * 2]
    assert content.tensors[0].numpy().tobytes() == encode_entries(ENTRIES[:2])
    assert all(map(torch.equal, content.tensors[6:], own[4:]))
    assert content.parts == tuple(map(part_digest, content.tensors))
    assert content.name == content_name(content.parts) == hashlib.sha256(b"".join(content.parts)).hexdigest()


def test_content_comes_back_as_the_adapter() -> None:
    adapter = Adapter.of(ENTRIES, tensors())
    again = assemble(content_of(adapter).tensors)
    assert again.entries == ENTRIES
    assert all(map(torch.equal, again.tensors, adapter.tensors))


def test_spans_of_one_adapter_share_their_parts() -> None:
    whole = AdapterSet(ENTRIES, tensors())
    part = whole.within(1, 2)
    assert part is not None
    assert set(content_of(part).parts) < set(content_of(whole).parts)


def test_digest_is_as_the_protocol_says() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    text = b"torch.bfloat16 [2, 3] " + tensor.view(torch.uint8).numpy().tobytes()
    assert part_digest(tensor) == hashlib.sha256(text).digest()[:16]
    assert part_digest(torch.ones(2, 3).T) == part_digest(torch.ones(3, 2)) != part_digest(torch.ones(2, 3))


def test_known_digests_are_not_computed_again() -> None:
    own = tensors(1)
    known = {id(own[0]): b"k" * 16}
    content = content_of(AdapterSet(ENTRIES[:1], own), known)
    assert content.parts[1:] == (b"k" * 16, part_digest(own[1]))
    assert known.keys() == set(map(id, own))


@pytest.mark.parametrize("first", [torch.ones(4), torch.ones(2, 2, dtype=torch.uint8)])
def test_parts_that_begin_with_no_entries_are_refused(first: torch.Tensor) -> None:
    with pytest.raises(RemoteProtocolError, match="part 0 of the adapter must be entries as uint8"):
        assemble([first, *tensors()])


def test_parts_that_end_too_early_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="adapter has 5 tensors, its 3 entries need 6"):
        assemble(content_of(AdapterSet(ENTRIES, tensors())).tensors[:-1])
