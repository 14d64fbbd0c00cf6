"""What tensors travel as, and what routing takes a request to weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remote_modules.client.call import CallArguments, demand_of
from remote_modules.client.coding import Coding
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import (
    THIN_WIRE_SINCE_MINOR,
    BackwardRequest,
    CallMeta,
    ForwardRequest,
    Output,
    Request,
    StepRequest,
    encode_message,
)
from remote_modules.wire.tensors import decode_tensors, encode_tensors

NAMES = frozenset({"hidden_states"})
TENSORS = {
    "hidden_states": torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0)),
    "position_ids": torch.zeros(2, 3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("wire", "codec", "per_token"), [("compute", "", 328), ("int8", "int8o", 108), ("int4", "int4o", 76)]
)
def test_demand_is_of_the_bytes_that_travel(wire: str, codec: str, per_token: int) -> None:
    coding = Coding(wire, NAMES)
    _, body = encode_tensors(TENSORS, dict.fromkeys(NAMES, codec))
    padding = sum(memoryview(part).nbytes for part in body) - coding.num_bytes(TENSORS)
    assert 0 <= padding < 64 * len(TENSORS)
    demand = demand_of(coding.num_bytes(TENSORS), CallArguments(rows=2, num_tokens=3), kv_tokens=0)
    assert demand.bytes_per_token == per_token


def test_short_vectors_travel_plainly() -> None:
    short = {"hidden_states": TENSORS["hidden_states"][..., :8].contiguous()}
    assert Coding("int8", NAMES).num_bytes(short) == short["hidden_states"].nbytes


# -------------------------------------------------------------------------------- which codec


def request(kind: str, num_tokens: int = 1, **changes: Any) -> Request:
    call = CallMeta(rows=2, num_tokens=num_tokens)
    if kind == "step":
        return StepRequest(7, "s" * 16, 3, 0, 2, 40, (), (), 1.0, call, **changes)
    return (ForwardRequest if kind == "forward" else BackwardRequest)(7, 0, 2, (), 1.0, call)


class Peer:
    """Of a version."""

    def __init__(self, minor: int) -> None:
        self.knows_thin_wire = minor >= THIN_WIRE_SINCE_MINOR


NEW: Any = Peer(5)
OLD: Any = Peer(4)
BOTH = frozenset({"hidden_states", "grad.hidden_states"})


@pytest.mark.parametrize(
    ("kind", "num_tokens", "changes", "inputs", "reply"),
    [
        ("step", 1, {}, "int8o", "int8o"),
        ("step", 15, {}, "int8o", "int8o"),
        ("step", 16, {}, "int4o", "int4o"),
        ("step", 16, {"num_outputs": 1}, "int4o", "int8o"),
        ("forward", 1, {}, "int4o", "int4o"),
        ("backward", 1, {}, "int4o", "int8o"),
    ],
    ids=str,
)
def test_four_bits_are_for_prefill_and_forward(
    kind: str, num_tokens: int, changes: dict[str, Any], inputs: str, reply: str
) -> None:
    tensors = {"hidden_states": torch.randn(2, num_tokens, 64), "grad.hidden_states": torch.randn(2, num_tokens, 64)}
    message, _ = Coding("int4", BOTH).encode(request(kind, num_tokens, **changes), tensors, NEW)
    assert [meta.codec for meta in message.tensors] == [inputs, "int8o"]
    assert message.call.reply_codec == reply
    message, _ = Coding("int8", BOTH).encode(request(kind, num_tokens, **changes), tensors, NEW)
    assert {*(meta.codec for meta in message.tensors), message.call.reply_codec} == {"int8o"}


def test_tokens_of_several_steps_at_once_travel_in_eight_bits() -> None:
    tensors = {"hidden_states": torch.randn(2, 40, 64)}
    message, _ = Coding("int4", BOTH).encode(request("step", 40), tensors, NEW, is_merged=True)
    assert (message.tensors[0].codec, message.call.reply_codec) == ("int8o", "int8o")


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_peer_that_knows_no_outliers_sees_the_same_values(wire: str) -> None:
    coding, tensors = Coding(wire, BOTH), {"hidden_states": torch.randn(2, 20, 64)}
    received = []
    for peer in (NEW, OLD):
        message, body = coding.encode(request("step", 20), tensors, peer)
        received.append(decode_tensors(message.tensors, bytearray(b"".join(body)))["hidden_states"])
    assert (message.tensors[0].codec, message.call.reply_codec) == ("", "")
    assert torch.equal(received[0], received[1])
    plain = Output(7, message.tensors, 0.0, 0.0)
    assert torch.equal(coding.settle(message, plain, tensors)["hidden_states"], received[0])


# -------------------------------------------------------------------------------- thin headers


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_that_follow_the_cache_are_left_out(rows: int) -> None:
    positions = torch.arange(40, 43).expand(rows, -1).contiguous()
    tensors = {"hidden_states": TENSORS["hidden_states"], "position_ids": positions}
    message, _ = Coding("compute", NAMES).encode(request("step", 3), tensors, NEW)
    assert [meta.name for meta in message.tensors] == ["hidden_states"]
    assert message.call.position_rows == rows
    message, _ = Coding("compute", NAMES).encode(request("step", 3), tensors, OLD)
    assert [meta.name for meta in message.tensors] == ["hidden_states", "position_ids"]
    assert message.call.position_rows == 0


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("step", torch.arange(41, 44)[None]),
        ("step", torch.tensor([[40, 41, 42], [0, 40, 41]])),
        ("step", torch.arange(40, 43, dtype=torch.int32)[None]),
        ("step", torch.arange(40, 43).expand(3, 1, 3).contiguous()),
        ("forward", torch.arange(40, 43)[None]),
    ],
    ids=["others", "padded", "int32", "of-several-kinds", "forward"],
)
def test_other_positions_travel(kind: str, positions: torch.Tensor) -> None:
    tensors = {"hidden_states": TENSORS["hidden_states"], "position_ids": positions}
    message, _ = Coding("compute", NAMES).encode(request(kind, 3), tensors, NEW)
    assert [meta.name for meta in message.tensors] == ["hidden_states", "position_ids"]
    assert message.call.position_rows == 0


def test_one_token_of_a_wide_model_takes_half_of_sixteen_bits() -> None:
    """Headers included, both ways."""
    hidden = torch.randn(1, 1, 8192, dtype=torch.bfloat16)
    long = CallMeta(rows=1, num_tokens=1)
    step = StepRequest(2**20, "s" * 22, 2**16, 127, 255, 2**16 - 1, (), (), 30, long)
    tensors = {"hidden_states": hidden, "position_ids": torch.tensor([[2**16 - 1]])}
    message, body = Coding("int8", NAMES).encode(step, tensors, NEW)
    assert sum(map(len, encode_frame(encode_message(message), body))) <= 0.52 * hidden.nbytes
    metas, body = encode_tensors({"hidden_states": hidden}, {"hidden_states": "int8o"}, pad_end=False)
    output = Output(2**20, metas, 0.001, 0.001, 3, 2**20)
    assert sum(map(len, encode_frame(encode_message(output), body))) <= 0.52 * hidden.nbytes
