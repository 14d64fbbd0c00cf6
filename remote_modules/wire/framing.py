"""Frames: one checksummed header and one checksummed body.

::

    offset  size  field
    0       2     magic, b"RM"
    2       1     frame format, 1
    3       1     reserved, 0
    4       4     header bytes, 1..65,536
    8       8     body bytes, 0..the negotiated cap
    16      4     CRC-32 of the first 16 bytes and the header
    20      4     CRC-32 of the body
    24      ...   header (msgpack), then body (tensors, see tensors.py)

All integers are little-endian. Lengths are checked before anything is allocated. `FrameReader` hands out the memory
that the next bytes belong in (`get_buffer`), so that a transport can receive a tensor straight into the place where it
is used.

TLS rejects flipped bits on the wire; the checksum is for memory, a relay's buffers and plain loopback.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from remote_modules.errors import LocalProtocolError, RemoteProtocolError
from remote_modules.wire.checksum import crc32

__all__ = ["ByteSink", "Frame", "FrameReader", "encode_frame", "feed"]

MAGIC = b"RM"
FRAME_FORMAT = 1
MAX_HEADER_BYTES = 65_536
PREFIX_BYTES = 24
STAGING_BYTES = 2 * (PREFIX_BYTES + MAX_HEADER_BYTES)  # always room for a whole prefix and header after compaction

_LENGTHS = struct.Struct("<2sBBIQ")
_CHECKSUMS = struct.Struct("<II")

Buffer = bytes | bytearray | memoryview
Body = bytearray | memoryview  # may be written to, so that tensors can lie in it


class Frame(NamedTuple):
    """One frame as it arrived; ``body`` is its own for as long as something refers to it."""

    header: bytes
    body: Body


def encode_frame(header: bytes, body: Sequence[Buffer] = ()) -> list[Buffer]:
    """The buffers to send, in order; ``body`` is not copied.

    Raises:
        LocalProtocolError: the header is empty or too long.
    """
    if not 0 < len(header) <= MAX_HEADER_BYTES:
        raise LocalProtocolError(f"header of {len(header)} bytes is outside 1..{MAX_HEADER_BYTES}")
    body_bytes = 0
    body_crc = 0
    for buffer in body:
        body_bytes += len(buffer)
        body_crc = crc32(buffer, body_crc)
    lengths = _LENGTHS.pack(MAGIC, FRAME_FORMAT, 0, len(header), body_bytes)
    header_crc = crc32(header, crc32(lengths))
    return [lengths + _CHECKSUMS.pack(header_crc, body_crc) + header, *body]


class ByteSink(Protocol):
    """Takes bytes in the memory that it hands out."""

    def get_buffer(self) -> memoryview: ...

    def buffer_updated(self, num_bytes: int) -> None: ...


def feed(sink: ByteSink, data: Buffer) -> None:
    """Copy bytes that lie elsewhere into ``sink``. Raises what its `buffer_updated` raises."""
    view = memoryview(data)
    while view:
        buffer = sink.get_buffer()
        num_bytes = min(len(buffer), len(view))
        buffer[:num_bytes] = view[:num_bytes]
        view = view[num_bytes:]
        sink.buffer_updated(num_bytes)


class FrameReader:
    """Bytes in, frames out.

    Fill `get_buffer()` and call `buffer_updated`, or call `receive_data`; then take frames from `next_frame` until it
    returns None. After a `RemoteProtocolError` the reader is of no more use.

    Args:
        max_body_bytes: larger frames are refused before their body is allocated.
        new_body: gives the memory of a body of so many bytes.
    """

    def __init__(self, *, max_body_bytes: int, new_body: Callable[[int], Body] = bytearray) -> None:
        self.max_body_bytes = max_body_bytes
        self._new_body = new_body
        self._staging = bytearray(STAGING_BYTES)
        self._view = memoryview(self._staging)
        self._start = 0
        self._end = 0
        self._header: bytes | None = None  # set while a body is awaited
        self._body: Body = bytearray()
        self._body_crc = 0  # that it must have
        self._crc = 0  # of what came of it
        self._filled = 0
        self._frames: deque[Frame] = deque()

    @property
    def is_mid_frame(self) -> bool:
        """Whether some, but not all, bytes of a frame have come."""
        return self._header is not None or self._start != self._end

    def get_buffer(self) -> memoryview:
        """Memory for the next bytes; never empty."""
        if self._header is not None:
            return memoryview(self._body)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end > STAGING_BYTES // 2:
            remaining = self._end - self._start
            self._view[:remaining] = self._view[self._start : self._end]
            self._start, self._end = 0, remaining
        return self._view[self._end :]

    def buffer_updated(self, num_bytes: int) -> None:
        """Say that the first ``num_bytes`` of the last `get_buffer` are filled.

        Raises:
            RemoteProtocolError: the bytes are no frame, too large, or fail their checksum.
        """
        if self._header is not None:
            end = self._filled + num_bytes
            self._crc = crc32(memoryview(self._body)[self._filled : end], self._crc)  # while it is in the cache
            self._filled = end
            if end < len(self._body):
                return
            self._finish_frame()
        else:
            self._end += num_bytes
        while self._read_prefix():
            pass

    def receive_data(self, data: Buffer) -> None:
        """`buffer_updated` for bytes that lie elsewhere; copies them."""
        feed(self, data)

    def next_frame(self) -> Frame | None:
        return self._frames.popleft() if self._frames else None

    def _read_prefix(self) -> bool:
        """Take one prefix and header from the staging area; whether a whole frame was read and more may follow."""
        available = self._end - self._start
        if available < PREFIX_BYTES:
            return False
        magic, frame_format, reserved, header_bytes, body_bytes = _LENGTHS.unpack_from(self._staging, self._start)
        self._check_prefix(magic, frame_format, reserved, header_bytes, body_bytes)
        if available < PREFIX_BYTES + header_bytes:
            return False
        header_crc, body_crc = _CHECKSUMS.unpack_from(self._staging, self._start + _LENGTHS.size)
        header_start = self._start + PREFIX_BYTES
        header = bytes(self._view[header_start : header_start + header_bytes])
        lengths = self._view[self._start : self._start + _LENGTHS.size]
        if crc32(header, crc32(lengths)) != header_crc:
            raise RemoteProtocolError("checksum of a frame header does not match its bytes")
        self._start = header_start + header_bytes
        self._header, self._body, self._body_crc = header, self._new_body(body_bytes), body_crc
        self._filled = min(body_bytes, self._end - self._start)
        staged = self._view[self._start : self._start + self._filled]
        self._body[: self._filled] = staged
        self._crc = crc32(staged)
        self._start += self._filled
        if self._filled < body_bytes:
            return False
        self._finish_frame()
        return self._start != self._end

    def _check_prefix(self, magic: bytes, frame_format: int, reserved: int, header_bytes: int, body_bytes: int) -> None:
        if magic != MAGIC or frame_format != FRAME_FORMAT or reserved != 0:
            raise RemoteProtocolError(f"expected a frame, got bytes that start with {magic + bytes([frame_format])!r}")
        if not 0 < header_bytes <= MAX_HEADER_BYTES:
            raise RemoteProtocolError(f"frame header of {header_bytes} bytes is outside 1..{MAX_HEADER_BYTES}")
        if body_bytes > self.max_body_bytes:
            raise RemoteProtocolError(f"frame of {body_bytes} bytes exceeds limit of {self.max_body_bytes} bytes")

    def _finish_frame(self) -> None:
        if self._crc != self._body_crc:
            raise RemoteProtocolError(f"checksum of a frame body of {len(self._body)} bytes does not match its bytes")
        assert self._header is not None
        self._frames.append(Frame(self._header, self._body))
        self._header, self._body, self._filled = None, bytearray(), 0
