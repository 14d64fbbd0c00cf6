"""Codecs: what comes back, that it comes back again, and that no claim from outside is believed."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remote_modules.errors import RemoteProtocolError
from remote_modules.wire import codecs, mxint8, outliers
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import TensorMeta
from remote_modules.wire.tensors import ALIGNMENT_BYTES, decode_tensors, encode_tensors

DTYPES = pytest.mark.parametrize("dtype", codecs.CODED_DTYPES, ids=str)
CODECS = pytest.mark.parametrize("codec", codecs.CODECS)
SHAPES = [(32,), (33,), (64,), (95,), (1, 32), (3, 40), (2, 5, 64), (2, 3, 4, 33), (2, 1500)]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, each vector of its own size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-12, 6, (*shape[:-1], 1), generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), sizes).to(dtype)


def finite_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any finite bits, subnormal ones too."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    most = outliers.LIMIT[dtype] * 0.9  # those above may be rounded to what travels plainly
    return data.view(dtype).reshape(shape).nan_to_num(0.0).clamp(-most, most)


def sent(tensor: Tensor, codec: str = "int8") -> tuple[tuple[TensorMeta, ...], bytearray]:
    metas, buffers = encode_tensors({"x": tensor}, {"x": codec})
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


@CODECS
@DTYPES
@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32), st.booleans())
def test_what_was_decoded_is_coded_exactly(
    codec: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int, is_any_bits: bool
) -> None:
    tensor = finite_bits(shape, dtype, seed) if is_any_bits else values(shape, dtype, seed)
    metas, body = sent(tensor, codec)
    decoded = decode_tensors(metas, body)["x"]
    assert torch.isfinite(decoded).all()
    assert sent(decoded, codec) == (metas, body)
    assert torch.equal(codecs.rounded(codec, tensor), decoded)


@CODECS
@DTYPES
@pytest.mark.parametrize("kind", ["equal", "few-values", "near-ties", "sparse", "steps"])
def test_what_was_decoded_is_coded_exactly_among_ties(codec: str, dtype: torch.dtype, kind: str) -> None:
    """Where outliers are hard to tell from other values."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((64, 160), generator=generator)
    tensor = {
        "equal": torch.full((64, 160), 3.3),
        "few-values": noise.mul(2).round(),
        "near-ties": 1 + noise / 300,
        "sparse": noise * (noise > 2),
        "steps": torch.exp2(torch.arange(64 * 160).reshape(64, 160) / 1000),
    }[kind].to(dtype)
    once = codecs.rounded(codec, tensor)
    assert torch.equal(codecs.rounded(codec, once), once)


@CODECS
@DTYPES
@pytest.mark.parametrize("share", [1.0, 255 / 256, 127.5 / 128, 127 / 128, 126.6 / 128, 0.5, 0.0], ids=str)
def test_values_at_both_ends_of_the_range_stay_finite_and_exact(codec: str, dtype: torch.dtype, share: float) -> None:
    info = torch.finfo(dtype)
    for size in (info.max, outliers.LIMIT[dtype], info.tiny, info.smallest_normal / 8, 1.0):
        tensor = torch.full((2, 40), size * share).to(dtype)
        tensor[1] = -tensor[1]
        once = codecs.rounded(codec, tensor)
        assert torch.isfinite(once).all()
        assert torch.equal(codecs.rounded(codec, once), once)


@pytest.mark.parametrize(("codec", "error"), [("int8", 0.01), ("int8o", 0.01), ("int4o", 0.1)])
def test_gradients_far_below_the_range_of_float16_survive(codec: str, error: float) -> None:
    tensor = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-12
    assert ((codecs.rounded(codec, tensor) - tensor).norm() / tensor.norm()).item() < error


@CODECS
def test_parts_are_coded_like_the_whole(codec: str) -> None:
    tensor = values((3, 7, 40), torch.bfloat16)
    whole = codecs.rounded(codec, tensor)
    for start, end in ((0, 1), (2, 6), (6, 7)):
        assert torch.equal(codecs.rounded(codec, tensor[:, start:end]), whole[:, start:end])
        part = tensor[1:, start:end].transpose(0, 1)
        assert torch.equal(codecs.rounded(codec, part), whole[1:, start:end].transpose(0, 1))


@CODECS
def test_large_tensor_is_worked_on_in_parts(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = values((3, 7, 40), torch.float32)
    metas, whole = sent(tensor, codec)
    for chunk in (1, 40, 100, 280):
        monkeypatch.setattr(mxint8, "CHUNK", chunk)
        monkeypatch.setattr(outliers, "CHUNK", chunk)
        assert sent(tensor, codec) == (metas, whole)
        assert torch.equal(decode_tensors(metas, whole)["x"], codecs.rounded(codec, tensor))
    tensor[2, 6, 39] = math.nan
    assert codecs.encode(codec, tensor) is None


def test_bytes_are_those_of_the_document() -> None:
    tensor = torch.zeros(33)
    tensor[0], tensor[1], tensor[2], tensor[32] = 127.0, -126.5, 0.5, 1.0  # halves go to the even neighbour
    _, body = sent(tensor)
    expected = bytes([127, 256 - 126, 0, *[0] * 29, 64, 127, 127 - 6])
    assert bytes(body) == expected + bytes(ALIGNMENT_BYTES - len(expected))


@CODECS
def test_block_of_zeros_is_zero(codec: str) -> None:
    assert torch.equal(codecs.rounded(codec, torch.zeros(2, 64)), torch.zeros(2, 64))


# -------------------------------------------------------------------------------- outliers


def with_outliers(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Hidden states as language models have them: channels of different size, two far beyond; which are ordinary."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 8192, generator=generator) * torch.exp(0.5 * torch.randn(8192, generator=generator))
    tensor[:, 1234], tensor[:, 4321] = 60 + tensor[:, 0], -45 + tensor[:, 0]
    tensor[0, 1234] = 900
    is_ordinary = torch.ones(8192, dtype=torch.bool)
    is_ordinary[[1234, 4321]] = False
    return tensor.to(dtype), is_ordinary


@DTYPES
@pytest.mark.parametrize(("codec", "most"), [("int8o", 0.01), ("int4o", 0.125)])
def test_outliers_leave_ordinary_channels_their_bits(codec: str, most: float, dtype: torch.dtype) -> None:
    tensor, is_ordinary = with_outliers(dtype)
    errors = (codecs.rounded(codec, tensor) - tensor).float()
    wanted = tensor.float()
    assert (errors[:, is_ordinary].norm() / wanted[:, is_ordinary].norm()).item() <= most
    assert (errors[:, ~is_ordinary].abs() <= wanted[:, ~is_ordinary].abs() / 256).all()  # as bfloat16


def test_bytes_of_one_vector_follow_from_its_length() -> None:
    assert codecs.num_bytes("int8o", (1, 8192)) == 8192 + 2 + 128 + 13 * 4
    assert codecs.num_bytes("int4o", (1, 8192)) == 4096 + 2 + 1024 + 13 * 4
    assert codecs.num_bytes("int8o", (2, 3, 160)) == 6 * (160 + 2 + 3 + 4 * 4)
    assert codecs.num_bytes("int4o", (33,)) == 17 + 2 + 5 + 4 * 4
    assert outliers.num_outliers(3000) == 5


def test_bytes_with_outliers_are_those_of_the_document() -> None:
    tensor = torch.zeros(65)
    tensor[[0, 1, 2, 3]] = torch.tensor([900.0, -800.0, 700.0, 600.0])
    tensor[4], tensor[5], tensor[64] = 126.0, -62.5, 1.0
    metas, body = sent(tensor, "int8o")
    codes = bytes([0, 0, 0, 0, 126, 256 - 62, *[0] * 58, 117])  # 1 is 117 steps of 2**(-55/8)
    parts = [
        codes,
        bytes([0, 0]),
        bytes([0, 55]),
        bytes.fromhex("6144 48c4 2f44 1644"),
        bytes([0, 0, 1, 0, 2, 0, 3, 0]),
    ]
    expected = b"".join(parts)
    assert bytes(body) == expected + bytes(-len(expected) % ALIGNMENT_BYTES)
    tensor = tensor[:33]
    tensor[4], tensor[5], tensor[6], tensor[16], tensor[32] = 1.0, -0.5, 0.25, -0.25, 0.125
    metas, body = sent(tensor, "int4o")
    codes = bytes([0x77, 0x77, 0xC0, 0x75, *[0x77] * 4, 0x70, *[0x77] * 7, 0])  # -0.5 is 68 of -128, 0.25 is -33
    expected = b"".join([codes, bytes([0, 0]), bytes([128, 127, 16, 127, 128 + 24]), *parts[3:]])
    assert bytes(body) == expected + bytes(-len(expected) % ALIGNMENT_BYTES)


@pytest.mark.parametrize("dtype", codecs.CODED_DTYPES, ids=str)
def test_outlier_that_would_not_be_the_largest_is_made_so(dtype: torch.dtype) -> None:
    """A value of 116.6 steps goes to 117, beyond an outlier of 116.7."""
    tensor = torch.full((1, 64), 116.6)
    tensor[0, :4] = 116.7
    decoded = codecs.rounded("int8o", tensor.to(dtype)).float()
    assert (decoded[0, :4] > decoded[0, 4:].max()).all()
    assert (decoded[0, 4:] == decoded[0, 4]).all()


def test_outlier_beyond_its_vector_is_refused() -> None:
    metas, body = sent(torch.randn(2, 40), "int8o")
    body[-(len(body) - codecs.num_bytes("int8o", (2, 40))) - 2] = 40  # the last index, lower byte
    with pytest.raises(RemoteProtocolError, match="outlier has index 40, in a vector of 40 values"):
        decode_tensors(metas, body)


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
@CODECS
def test_other_tensors_travel_bit_by_bit(codec: str, tensor: Tensor) -> None:
    metas, body = sent(tensor, codec)
    assert metas[0].codec == ""
    assert (metas, body) == ((plain := encode_tensors({"x": tensor}))[0], join(plain[1]))
    assert torch.equal(decode_tensors(metas, body)["x"].nan_to_num(7), tensor.nan_to_num(7))
    assert codecs.rounded(codec, tensor) is tensor


@pytest.mark.parametrize("codec", codecs.THIN_CODECS)
def test_what_has_no_room_for_outliers_travels_plainly(codec: str) -> None:
    for tensor in (torch.full((2, 64), 2.0**120), torch.full((2, 64), 57_344.0, dtype=torch.float16)):
        assert sent(tensor, codec)[0][0].codec == ""
    assert codecs.encode(codec, torch.ones(1, 2**16 + 1)) is None


def test_only_what_is_named_is_coded() -> None:
    tensors = {"x": values((2, 64), torch.float32), "adapter.0": values((2, 64), torch.float32, 1)}
    metas, buffers = encode_tensors(tensors, {"x": "int8"})
    assert [meta.codec for meta in metas] == ["int8", ""]
    decoded = decode_tensors(metas, join(buffers))
    assert torch.equal(decoded["adapter.0"], tensors["adapter.0"])
    assert torch.equal(decoded["x"], codecs.rounded("int8", tensors["x"]))


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


@pytest.mark.parametrize("num_bytes", [0, 1, 64, 65, 67, 127, 192, 256, 1 << 20])
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


@CODECS
@DTYPES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32))
def test_any_bytes_decode_to_a_tensor_of_the_shape(
    codec: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = codecs.num_bytes(codec, shape)
    data = torch.randint(256, (size + -size % ALIGNMENT_BYTES,), dtype=torch.uint8, generator=generator)
    if codec != "int8":  # indices come last
        indices = data[size - 2 * math.prod(shape[:-1]) * outliers.num_outliers(shape[-1]) : size].view(-1, 2)
        indices[:, 0], indices[:, 1] = indices[:, 0] % 32, 0
    body = bytearray(data.numpy().tobytes())
    decoded = decode_tensors([TensorMeta("x", str(dtype).removeprefix("torch."), shape, codec)], body)["x"]
    assert (decoded.shape, decoded.dtype) == (torch.Size(shape), dtype)
    assert not torch.isinf(decoded).any()


def test_exponent_255_is_not_a_number() -> None:
    body = bytearray(b"\1" * 32 + b"\xff" + bytes(31))
    assert torch.isnan(decode_tensors([TensorMeta("x", "float32", (32,), "int8")], body)["x"]).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2**41), max_size=8).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float16", "float64", "int8"]),
    st.sampled_from(["int8", "int8o", "int4o", "", "int4"]),
    st.integers(0, 4096),
)
def test_malformed_claims_are_refused_or_fit(shape: tuple[int, ...], dtype: str, codec: str, num_bytes: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decoded = decode_tensors([TensorMeta("x", dtype, shape, codec)], bytearray(num_bytes))["x"]
        assert tuple(decoded.shape) == shape
