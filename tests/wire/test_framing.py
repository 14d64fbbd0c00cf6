from __future__ import annotations

import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_modules.errors import LocalProtocolError, RemoteProtocolError
from remote_modules.wire.framing import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    Buffer,
    Frame,
    FrameReader,
    encode_frame,
)

from .helpers import SLICERS, Slicer, one_byte, random_slices, slicer_name, whole

MAX_BODY_BYTES = 300_000
SMALL = b"".join(encode_frame(b"header", [b"body"]))


def read(data: bytes, slicer: Slicer = whole) -> list[Frame]:
    """The frames in ``data``, which must end with a whole one."""
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    for piece in slicer(data):
        reader.receive_data(piece)
    assert not reader.is_mid_frame
    return list(iter(reader.next_frame, None))


def read_until_error(data: bytes) -> list[Frame]:
    """The frames in ``data`` before its first error, if there is any."""
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    frames: list[Frame] = []
    try:
        for piece in one_byte(data):
            reader.receive_data(piece)
            frames += iter(reader.next_frame, None)
    except RemoteProtocolError:
        pass
    return frames


def prefix(*, header_bytes: int = 6, body_bytes: int = 0, start: bytes = b"RM\x01\x00") -> bytes:
    return start + struct.pack("<IQII", header_bytes, body_bytes, 0, 0)


def flip(data: bytes, *bits: int) -> bytes:
    flipped = bytearray(data)
    for bit in bits:
        flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def random_frames(seed: int, num_frames: int) -> list[Frame]:
    rng = random.Random(seed)
    header_sizes, body_sizes = (1, 40, 5000, MAX_HEADER_BYTES), (0, 1, 64, 200_000)
    return [
        Frame(rng.randbytes(rng.choice(header_sizes)), bytearray(rng.randbytes(rng.choice(body_sizes))))
        for _ in range(num_frames)
    ]


def encode(frames: list[Frame]) -> bytes:
    return b"".join(b"".join(encode_frame(frame.header, [frame.body])) for frame in frames)


# -------------------------------------------------------------------------------- whole frames


def test_frame_is_encoded_in_the_documented_layout() -> None:
    lengths = b"RM\x01\x00" + (6).to_bytes(4, "little") + (4).to_bytes(8, "little")
    header_crc = zlib.crc32(lengths + b"header").to_bytes(4, "little")
    body_crc = zlib.crc32(b"body").to_bytes(4, "little")
    assert SMALL == lengths + header_crc + body_crc + b"header" + b"body"
    assert len(lengths + header_crc + body_crc) == PREFIX_BYTES


def test_body_of_several_buffers_is_not_copied() -> None:
    body: list[Buffer] = [memoryview(b"first"), bytearray(b"second"), b"third"]
    buffers = encode_frame(b"header", body)
    assert all(sent is given for sent, given in zip(buffers[1:], body, strict=True))
    assert read(b"".join(buffers)) == [Frame(b"header", bytearray(b"firstsecondthird"))]


@pytest.mark.parametrize("slicer", SLICERS, ids=slicer_name)
def test_frames_in_any_slices_are_read(slicer: Slicer) -> None:
    frames = [Frame(b"a", bytearray()), Frame(b"bb" * 100, bytearray(b"c")), Frame(b"d", bytearray(300))]
    assert read(encode(frames), slicer) == frames


@pytest.mark.parametrize("seed", range(8))
def test_frames_of_random_sizes_in_random_slices_are_read(seed: int) -> None:
    frames = random_frames(seed, 6)
    assert read(encode(frames), random_slices(seed)) == frames


def test_many_frames_in_one_chunk_are_read() -> None:
    frames = [Frame(b"%d" % index, bytearray(index % 3)) for index in range(10_000)]
    assert read(encode(frames)) == frames


def test_largest_header_behind_a_partial_frame_has_room() -> None:
    frames = [Frame(bytes([65 + index]) * (MAX_HEADER_BYTES - 9 * index), bytearray()) for index in range(6)]
    assert read(encode(frames)) == frames


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=80), st.binary(max_size=200)), max_size=5),
    st.lists(st.integers(0, 1500), max_size=8),
)
def test_any_frames_cut_anywhere_are_read(parts: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    frames = [Frame(header, bytearray(body)) for header, body in parts]
    ends = [0, *sorted(cuts), 2000]
    assert read(encode(frames), lambda data: [data[a:b] for a, b in zip(ends, ends[1:], strict=False)]) == frames


def test_large_body_is_received_into_the_memory_of_the_frame() -> None:
    body = random.Random(0).randbytes(MAX_BODY_BYTES)
    start = encode_frame(b"header", [body])[0]
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    reader.receive_data(start)
    assert reader.is_mid_frame
    buffer = reader.get_buffer()
    assert len(buffer) == len(body)
    buffer[:1000] = body[:1000]
    reader.buffer_updated(1000)
    assert reader.next_frame() is None
    rest = reader.get_buffer()
    assert len(rest) == len(body) - 1000
    rest[:] = body[1000:]
    reader.buffer_updated(len(rest))
    frame = reader.next_frame()
    assert frame == Frame(b"header", bytearray(body))
    assert frame.body is buffer.obj is rest.obj


# -------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("num_bytes", [0, MAX_HEADER_BYTES + 1])
def test_header_of_wrong_size_is_not_encoded(num_bytes: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"header of {num_bytes} bytes"):
        encode_frame(bytes(num_bytes))


@pytest.mark.parametrize("num_bytes", [0, MAX_HEADER_BYTES + 1, 2**32 - 1])
def test_header_of_wrong_size_is_refused_at_its_prefix(num_bytes: int) -> None:
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    with pytest.raises(RemoteProtocolError, match=f"frame header of {num_bytes} bytes is outside 1..65536"):
        reader.receive_data(prefix(header_bytes=num_bytes))


def test_body_at_the_limit_is_read() -> None:
    assert read(b"".join(encode_frame(b"h", [bytes(MAX_BODY_BYTES)])))[0].body == bytearray(MAX_BODY_BYTES)


@pytest.mark.parametrize("num_bytes", [MAX_BODY_BYTES + 1, 2**40, 2**64 - 1])
def test_oversized_body_is_refused_before_it_is_allocated(num_bytes: int) -> None:
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    data = prefix(body_bytes=num_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"frame of {num_bytes} bytes exceeds limit of 300000 bytes"):
            reader.receive_data(data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < MAX_BODY_BYTES // 3


def test_unfinished_frames_take_bounded_memory() -> None:
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    tracemalloc.start()
    try:
        for piece in one_byte(prefix(header_bytes=MAX_HEADER_BYTES) + bytes(3000)):
            reader.receive_data(piece)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20_000


# -------------------------------------------------------------------------------- broken streams


def test_stream_cut_anywhere_is_mid_frame() -> None:
    for num_bytes in range(len(SMALL) + 1):
        reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
        reader.receive_data(SMALL[:num_bytes])
        assert reader.is_mid_frame is (0 < num_bytes < len(SMALL))
        assert (reader.next_frame() is None) is (num_bytes < len(SMALL))


def test_any_bit_of_a_small_frame_flipped_is_never_read_as_a_frame() -> None:
    for bit in range(8 * len(SMALL)):
        assert read_until_error(flip(SMALL, bit)) == []
        assert read_until_error(flip(SMALL, bit) + SMALL) == []


def test_any_two_bits_of_the_prefix_flipped_are_never_read_as_a_frame() -> None:
    for first in range(8 * PREFIX_BYTES):
        second = (first * 7 + 13) % (8 * len(SMALL))
        assert first == second or read_until_error(flip(SMALL, first, second)) == []


@pytest.mark.parametrize("seed", range(4))
def test_random_bits_of_a_large_frame_flipped_are_never_read_as_a_frame(seed: int) -> None:
    rng = random.Random(seed)
    good = b"".join(encode_frame(rng.randbytes(500), [rng.randbytes(20_000)]))
    for _ in range(50):
        bits = rng.sample(range(8 * len(good)), rng.randint(1, 4))
        reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
        try:
            reader.receive_data(flip(good, *bits))
        except RemoteProtocolError:
            continue
        assert reader.next_frame() is None
        assert reader.is_mid_frame


@pytest.mark.parametrize(
    "start", [b"GET ", b"\x00" * 4, b"\xff" * 4, b"MR\x01\x00", b"RM\x02\x00", b"RM\x01\x01"], ids=repr
)
def test_bytes_that_start_no_frame_are_refused(start: bytes) -> None:
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    with pytest.raises(RemoteProtocolError, match="expected a frame, got bytes that start with"):
        reader.receive_data(prefix(start=start))


@pytest.mark.parametrize("seed", range(20))
def test_garbage_is_never_read_as_a_frame(seed: int) -> None:
    garbage = random.Random(seed).randbytes(2000)
    assert read_until_error(garbage) == []
    assert read_until_error(b"RM\x01\x00" + struct.pack("<IQ", 100, 100) + garbage) == []


def test_wrong_body_checksum_says_so() -> None:
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    with pytest.raises(RemoteProtocolError, match="checksum of a frame body of 4 bytes"):
        reader.receive_data(SMALL[:-1] + b"Y")


def test_wrong_header_checksum_says_so() -> None:
    reader = FrameReader(max_body_bytes=MAX_BODY_BYTES)
    with pytest.raises(RemoteProtocolError, match="checksum of a frame header"):
        reader.receive_data(SMALL.replace(b"header", b"Header"))
