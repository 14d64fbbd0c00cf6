from __future__ import annotations

import zlib

import pytest

from remote_modules.wire.checksum import crc32


@pytest.mark.parametrize("num_bytes", [0, 1, 15, 16, 4096, 1_000_003])
def test_checksum_is_that_of_zlib_whatever_computes_it(num_bytes: int) -> None:
    data = bytes(number * 31 % 251 for number in range(num_bytes))
    assert crc32(data) == zlib.crc32(data)
    assert crc32(memoryview(data), 7) == zlib.crc32(data, 7)
