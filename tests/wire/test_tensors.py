from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remote_modules.errors import LocalProtocolError, RemoteProtocolError
from remote_modules.wire import codecs
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import TensorMeta
from remote_modules.wire.tensors import (
    ALIGNMENT_BYTES,
    DTYPES,
    body_bytes,
    decode_tensors,
    decoded_bytes,
    encode_tensors,
)

SHAPES = [(), (0,), (1,), (3,), (2, 0, 4), (2, 3), (1, 5, 7), (2, 3, 4, 5), (1,) * 8]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, so that NaNs and infinities occur too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def join(buffers: list[Buffer]) -> bytearray:
    return bytearray(b"".join(buffers))


def bits_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return tensor.dtype, tuple(tensor.shape), bits


def address_of(buffer: Buffer) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


# -------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_comes_back_bit_by_bit(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape, DTYPES[dtype])
    metas, buffers = encode_tensors({"x": tensor})
    assert metas == (TensorMeta("x", dtype, shape),)
    assert bits_of(decode_tensors(metas, join(buffers))["x"]) == bits_of(tensor)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:, :1].expand(2, 6, 5),
        lambda x: x.permute(2, 0, 1)[..., -1],
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nn.Parameter(x.t() if x.dim() == 2 else x),
        lambda x: torch.complex(x, x).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "permuted", "requires-grad", "parameter", "negated-view"],
)
def test_tensor_of_any_layout_comes_back(change: Callable[[Tensor], Tensor]) -> None:
    tensor = change(torch.arange(60.0).reshape(2, 6, 5))
    metas, buffers = encode_tensors({"x": tensor})
    decoded = decode_tensors(metas, join(buffers))["x"]
    assert torch.equal(decoded, tensor)
    assert not decoded.requires_grad


def test_several_tensors_keep_their_names_order_and_alignment() -> None:
    tensors = {name: random_tensor((2, 3), DTYPES[name]) for name in DTYPES}
    tensors["empty"] = torch.empty(0)
    tensors["last"] = torch.arange(16.0)
    metas, buffers = encode_tensors(tensors)
    body = join(buffers)
    assert len(body) == len(tensors) * ALIGNMENT_BYTES - ALIGNMENT_BYTES  # one row each, but for the empty one
    decoded = decode_tensors(metas, body)
    assert list(decoded) == list(tensors)
    assert list(map(bits_of, decoded.values())) == list(map(bits_of, tensors.values()))


def test_last_tensor_may_have_no_padding() -> None:
    tensors = {"first": torch.arange(3.0), "last": torch.arange(5, dtype=torch.int16), "empty": torch.empty(0)}
    metas, buffers = encode_tensors(tensors, pad_end=False)
    body = join(buffers)
    assert len(body) == ALIGNMENT_BYTES + 10
    padded = join(encode_tensors(tensors)[1])
    assert padded == body + bytes(ALIGNMENT_BYTES - 10)
    for one in (body, padded):
        decoded = decode_tensors(metas, one)
        assert list(map(bits_of, decoded.values())) == list(map(bits_of, tensors.values()))


def test_no_tensors_are_an_empty_body() -> None:
    assert encode_tensors({}) == ((), [])
    assert decode_tensors((), bytearray()) == {}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.lists(st.integers(0, 4), max_size=5).map(tuple), st.sampled_from(sorted(DTYPES))),
        max_size=6,
    ),
    st.integers(0, 2**32),
)
def test_any_tensors_come_back_bit_by_bit(parts: dict[str, tuple[tuple[int, ...], str]], seed: int) -> None:
    tensors = {name: random_tensor(shape, DTYPES[dtype], seed) for name, (shape, dtype) in parts.items()}
    metas, buffers = encode_tensors(tensors)
    decoded = decode_tensors(metas, join(buffers))
    assert {name: bits_of(x) for name, x in decoded.items()} == {name: bits_of(x) for name, x in tensors.items()}


# -------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoded_buffer_is_the_memory_of_the_tensor(dtype: str) -> None:
    tensor = random_tensor((3, 5), DTYPES[dtype])
    _, buffers = encode_tensors({"x": tensor})
    assert address_of(buffers[0]) == tensor.data_ptr()
    tensor.zero_()
    assert bytes(buffers[0]) == bytes(tensor.nbytes)


def test_decoded_tensor_is_the_memory_of_the_body() -> None:
    tensors = {name: random_tensor((3, 5), dtype) for name, dtype in DTYPES.items() if name != "bool"}
    metas, buffers = encode_tensors(tensors)
    body = join(buffers)
    start = address_of(body)
    offset = 0
    for tensor in decode_tensors(metas, body).values():
        assert tensor.data_ptr() == start + offset
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT_BYTES


def test_padding_is_ignored() -> None:
    body = bytearray(b"\xff" * ALIGNMENT_BYTES)
    body[:4] = bytes(4)
    assert torch.equal(decode_tensors([TensorMeta("x", "int32", (1,))], body)["x"], torch.zeros(1, dtype=torch.int32))


def test_bool_bytes_other_than_0_and_1_are_read_as_true() -> None:
    body = bytearray(ALIGNMENT_BYTES)
    body[:6] = bytes((0, 1, 2, 127, 128, 255))
    decoded = decode_tensors([TensorMeta("mask", "bool", (2, 3))], body)["mask"]
    assert bits_of(decoded) == (torch.bool, (2, 3), [0, 1, 1, 1, 1, 1])


# -------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_dtype_that_is_not_carried_is_not_encoded(dtype: torch.dtype) -> None:
    with pytest.raises(LocalProtocolError, match=f"tensor 'x' has dtype {dtype}, expected one of float64, float32"):
        encode_tensors({"x": torch.empty(2, dtype=dtype)})


@pytest.mark.parametrize(
    "shape",
    [
        (-1,),
        (-1, -16),
        (2, -8, -1),
        (2**53,),
        (2**31, 2**31),
        (2**32, 2**32),
        (2**63 - 1, 2**63 - 1, 2),
        (0, -1),
        (0, 2**39, 2**39),
        (2**39, 2**39, 0),
        (1,) * 9,
        (0,) * 9,
    ],
    ids=str,
)
def test_shape_that_cannot_be_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match=r"tensor 'x' claims shape \["):
        decode_tensors([TensorMeta("x", "float32", shape)], bytearray(ALIGNMENT_BYTES))


@pytest.mark.parametrize("dtype", ["", "float", "Float32", "torch.float32", "complex64", "object", "float8_e4m3fn"])
def test_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"tensor 'x' claims unknown dtype '{dtype}'"):
        decode_tensors([TensorMeta("x", dtype, (1,))], bytearray(ALIGNMENT_BYTES))


def test_tensor_given_twice_is_refused() -> None:
    meta = TensorMeta("x", "float32", (1,))
    with pytest.raises(RemoteProtocolError, match="tensor 'x' is given twice"):
        decode_tensors([meta, meta], bytearray(2 * ALIGNMENT_BYTES))


@pytest.mark.parametrize("num_bytes", [0, 1, 23, 25, 63, 65, 128, 1 << 20])
def test_body_of_another_size_than_claimed_is_refused(num_bytes: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"tensors claim 64 bytes, the body has {num_bytes} bytes"):
        decode_tensors([TensorMeta("x", "float32", (2, 3))], bytearray(num_bytes))


def test_body_without_tensors_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="tensors claim 0 bytes, the body has 64 bytes"):
        decode_tensors([], bytearray(64))


def test_claim_of_more_than_the_memory_is_refused_by_its_size() -> None:
    with pytest.raises(RemoteProtocolError, match=f"tensors claim {8 * (2**53 - 64)} bytes, the body has 64 bytes"):
        decode_tensors([TensorMeta("x", "float64", (2**53 - 64,))], bytearray(64))


@pytest.mark.parametrize("codec", ["", "int8", "int8o"])
def test_bytes_of_a_body_follow_from_its_tensors(codec: str) -> None:
    tensors = {"hidden_states": torch.randn(2, 3, 64), "position_ids": torch.zeros(2, 3, dtype=torch.int64)}
    metas, body = encode_tensors(tensors, {"hidden_states": codec} if codec else None)
    plain = codecs.num_bytes(codec, (2, 3, 64)) if codec else 2 * 3 * 64 * 4
    assert body_bytes(metas) == plain + 2 * 3 * 8
    assert 0 <= sum(map(len, body)) - body_bytes(metas) < len(metas) * ALIGNMENT_BYTES


def test_decoded_bytes_are_those_in_memory_however_they_travel() -> None:
    metas, _ = encode_tensors({"hidden_states": torch.ones(1, 2, 64)}, {"hidden_states": "int8o"})
    assert decoded_bytes(metas) == 512
    assert decoded_bytes([TensorMeta("x", "complex64", (4,))]) == 0
