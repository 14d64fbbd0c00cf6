"""What routing takes a request to weigh."""

from __future__ import annotations

import pytest
import torch

from remote_modules.client.call import CallArguments, demand_of
from remote_modules.client.coding import Coding
from remote_modules.wire.tensors import encode_tensors

NAMES = frozenset({"hidden_states"})
TENSORS = {
    "hidden_states": torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0)),
    "position_ids": torch.zeros(2, 3, dtype=torch.int64),
}


@pytest.mark.parametrize(("codec", "per_token"), [("", 328), ("int8", 91)])
def test_demand_is_of_the_bytes_that_travel(codec: str, per_token: int) -> None:
    coding = Coding(codec, NAMES)
    _, body = encode_tensors(TENSORS, codec, NAMES)
    padding = sum(memoryview(part).nbytes for part in body) - coding.num_bytes(TENSORS)
    assert 0 <= padding < 64 * len(TENSORS)
    demand = demand_of(coding.num_bytes(TENSORS), CallArguments(rows=2, num_tokens=3), kv_tokens=0)
    assert demand.bytes_per_token == per_token


def test_short_vectors_travel_plainly() -> None:
    short = {"hidden_states": TENSORS["hidden_states"][..., :8].contiguous()}
    assert Coding("int8", NAMES).num_bytes(short) == short["hidden_states"].nbytes
