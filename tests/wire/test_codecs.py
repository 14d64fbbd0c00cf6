"""The int8 codec: what comes back, that it comes back again, and that no claim from outside is believed."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remote_modules.errors import RemoteProtocolError
from remote_modules.wire import codecs
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import TensorMeta
from remote_modules.wire.tensors import ALIGNMENT_BYTES, decode_tensors, encode_tensors

DTYPES = pytest.mark.parametrize("dtype", codecs.INT8_DTYPES, ids=str)
SHAPES = [(32,), (33,), (64,), (95,), (1, 32), (3, 40), (2, 5, 64), (2, 3, 4, 33)]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, each vector of its own size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-12, 6, (*shape[:-1], 1), generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), sizes).to(dtype)


def finite_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any finite bits: subnormal ones and the largest, too."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape).nan_to_num(0.0)


def sent(tensor: Tensor) -> tuple[tuple[TensorMeta, ...], bytearray]:
    metas, buffers = encode_tensors({"x": tensor}, "int8", {"x"})
    return metas, join(buffers)


def join(buffers: list[Buffer]) -> bytearray:
    return bytearray(b"".join(buffers))


# -------------------------------------------------------------------------------- round trip


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_come_back_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = values(shape, dtype)
    metas, body = sent(tensor)
    assert metas == (TensorMeta("x", str(dtype).removeprefix("torch."), shape, "int8"),)
    num_bytes = math.prod(shape) + math.prod(shape[:-1]) * math.ceil(shape[-1] / 32)
    assert len(body) == num_bytes + -num_bytes % ALIGNMENT_BYTES
    decoded = decode_tensors(metas, body)["x"]
    assert (decoded.shape, decoded.dtype, decoded.is_contiguous()) == (tensor.shape, dtype, True)
    for ours, theirs in zip(decoded.split(32, -1), tensor.split(32, -1), strict=True):
        step = theirs.float().abs().amax(-1, keepdim=True) / 63.5  # the largest is at least half of the range
        assert ((ours.float() - theirs.float()).abs() <= step / 2).all()


@DTYPES
@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32), st.booleans())
def test_what_was_decoded_is_coded_exactly(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, is_any_bits: bool
) -> None:
    tensor = finite_bits(shape, dtype, seed) if is_any_bits else values(shape, dtype, seed)
    metas, body = sent(tensor)
    decoded = decode_tensors(metas, body)["x"]
    assert torch.isfinite(decoded).all()
    assert sent(decoded) == (metas, body)
    assert torch.equal(codecs.rounded(tensor), decoded)


@DTYPES
@pytest.mark.parametrize("share", [1.0, 255 / 256, 127.5 / 128, 127 / 128, 126.6 / 128, 0.5, 0.0], ids=str)
def test_values_at_both_ends_of_the_range_stay_finite_and_exact(dtype: torch.dtype, share: float) -> None:
    info = torch.finfo(dtype)
    for size in (info.max, info.tiny, info.smallest_normal / 8, 1.0):
        tensor = torch.full((2, 40), size * share).to(dtype)
        tensor[1] = -tensor[1]
        once = codecs.rounded(tensor)
        assert torch.isfinite(once).all()
        assert torch.equal(codecs.rounded(once), once)


def test_gradients_far_below_the_range_of_float16_survive() -> None:
    tensor = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-12
    assert ((codecs.rounded(tensor) - tensor).norm() / tensor.norm()).item() < 0.01


def test_parts_are_coded_like_the_whole() -> None:
    tensor = values((3, 7, 40), torch.bfloat16)
    whole = codecs.rounded(tensor)
    for start, end in ((0, 1), (2, 6), (6, 7)):
        assert torch.equal(codecs.rounded(tensor[:, start:end]), whole[:, start:end])
        assert torch.equal(codecs.rounded(tensor[1:, start:end].transpose(0, 1)), whole[1:, start:end].transpose(0, 1))


def test_large_tensor_is_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = values((3, 7, 40), torch.float32)
    metas, whole = sent(tensor)
    for chunk in (1, 40, 100, 280):
        monkeypatch.setattr(codecs, "CHUNK", chunk)
        assert sent(tensor) == (metas, whole)
        assert torch.equal(decode_tensors(metas, whole)["x"], codecs.rounded(tensor))
    tensor[2, 6, 39] = math.nan
    assert codecs.encode(tensor) is None


def test_bytes_are_those_of_the_document() -> None:
    tensor = torch.zeros(33)
    tensor[0], tensor[1], tensor[2], tensor[32] = 127.0, -126.5, 0.5, 1.0  # halves go to the even neighbour
    _, body = sent(tensor)
    expected = bytes([127, 256 - 126, 0, *[0] * 29, 64, 127, 127 - 6])
    assert bytes(body) == expected + bytes(ALIGNMENT_BYTES - len(expected))


def test_block_of_zeros_is_zero() -> None:
    assert torch.equal(codecs.rounded(torch.zeros(2, 64)), torch.zeros(2, 64))


# -------------------------------------------------------------------------------- what travels plainly


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 31),
        torch.randn(()),
        torch.randn(0, 64),
        torch.randn(64, dtype=torch.float64),
        torch.arange(64),
        torch.full((2, 64), math.nan),
        torch.tensor([[0.0] * 63 + [math.inf]]),
        torch.tensor([[0.0] * 63 + [-math.inf]], dtype=torch.float16),
    ],
    ids=["short", "scalar", "empty", "float64", "int64", "nan", "inf", "minus-inf"],
)
def test_other_tensors_travel_bit_by_bit(tensor: Tensor) -> None:
    metas, body = sent(tensor)
    assert metas[0].codec == ""
    assert (metas, body) == ((plain := encode_tensors({"x": tensor}))[0], join(plain[1]))
    assert torch.equal(decode_tensors(metas, body)["x"].nan_to_num(7), tensor.nan_to_num(7))
    assert codecs.rounded(tensor) is tensor


def test_only_what_is_named_is_coded() -> None:
    tensors = {"x": values((2, 64), torch.float32), "adapter.0": values((2, 64), torch.float32, 1)}
    metas, buffers = encode_tensors(tensors, "int8", {"x"})
    assert [meta.codec for meta in metas] == ["int8", ""]
    decoded = decode_tensors(metas, join(buffers))
    assert torch.equal(decoded["adapter.0"], tensors["adapter.0"])
    assert torch.equal(decoded["x"], codecs.rounded(tensors["x"]))


# -------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize("codec", ["zstd", "int4", "INT8", "int8 "])
def test_unknown_codec_is_refused(codec: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"tensor 'x' claims unknown codec '{codec}'"):
        decode_tensors([TensorMeta("x", "float32", (64,), codec)], bytearray(128))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("int64", (64,)), ("float64", (64,)), ("bool", (64,)), ("float32", ()), ("float32", (31,)), ("float32", (64, 0))],
    ids=str,
)
def test_codec_of_another_dtype_or_shape_is_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match=rf"tensor 'x' claims {dtype} \[.*\] in codec 'int8', which is for"):
        decode_tensors([TensorMeta("x", dtype, shape, "int8")], bytearray(128))


@pytest.mark.parametrize("num_bytes", [0, 1, 64, 66, 127, 192, 256, 1 << 20])
def test_body_of_another_size_than_claimed_is_refused(num_bytes: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"tensors claim 128 bytes, the body has {num_bytes} bytes"):
        decode_tensors([TensorMeta("x", "float32", (1, 64), "int8")], bytearray(num_bytes))


@pytest.mark.parametrize("shape", [(2**39, 2**13), (2**45, 32), (1, 2**52)], ids=str)
def test_claim_of_more_than_the_memory_is_refused_by_its_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match=r"tensors claim \d+ bytes, the body has 64 bytes"):
        decode_tensors([TensorMeta("x", "bfloat16", shape, "int8")], bytearray(64))


@pytest.mark.parametrize("shape", [(0, 64), (2**40, 0, 32)], ids=str)
def test_nothing_in_a_codec_is_nothing(shape: tuple[int, ...]) -> None:
    assert decode_tensors([TensorMeta("x", "float16", shape, "int8")], bytearray())["x"].shape == shape


@DTYPES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32))
def test_any_bytes_decode_to_a_tensor_of_the_shape(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = codecs.num_bytes(shape)
    data = torch.randint(256, (size + -size % ALIGNMENT_BYTES,), dtype=torch.uint8, generator=generator)
    body = bytearray(data.numpy().tobytes())
    decoded = decode_tensors([TensorMeta("x", str(dtype).removeprefix("torch."), shape, "int8")], body)["x"]
    assert (decoded.shape, decoded.dtype) == (torch.Size(shape), dtype)
    assert not torch.isinf(decoded).any()


def test_exponent_255_is_not_a_number() -> None:
    body = bytearray(b"\1" * 32 + b"\xff" + bytes(31))
    assert torch.isnan(decode_tensors([TensorMeta("x", "float32", (32,), "int8")], body)["x"]).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2**41), max_size=8).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float16", "float64", "int8"]),
    st.sampled_from(["int8", "", "int4"]),
    st.integers(0, 4096),
)
def test_malformed_claims_are_refused_or_fit(shape: tuple[int, ...], dtype: str, codec: str, num_bytes: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decoded = decode_tensors([TensorMeta("x", dtype, shape, codec)], bytearray(num_bytes))["x"]
        assert tuple(decoded.shape) == shape
