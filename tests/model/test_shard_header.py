from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remote_modules.errors import CheckpointError
from remote_modules.model.shard_header import LENGTH_BYTES, ShardHeader, parse_header, parse_length, tensor_names

TENSORS = {
    "wide": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "odd": torch.arange(5, dtype=torch.int8),
    "half": torch.arange(6, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "long": torch.tensor([7], dtype=torch.int64),
    "tiny": torch.ones(3).to(torch.float8_e4m3fn),
}


def header_of(path: Path) -> ShardHeader:
    data = path.read_bytes()
    length = parse_length(data[:LENGTH_BYTES], len(data))
    return parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "all.safetensors", metadata={"format": "pt", "é": "ü"})
    return tmp_path / "all.safetensors"


def entry(start: int, end: int, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def parse(entries: object, data_bytes: int) -> ShardHeader:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return parse_header(text, LENGTH_BYTES + len(text) + data_bytes)


def test_header_names_every_tensor_and_its_bytes(file: Path) -> None:
    header = header_of(file)
    assert set(header.tensors) == set(TENSORS) == set(tensor_names(file))
    assert header.metadata == {"format": "pt", "é": "ü"}
    data = file.read_bytes()
    for name, tensor in TENSORS.items():
        stored = header.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert data[stored.start : stored.end] == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("keys", [["wide"], ["odd", "wide"], ["tiny", "scalar", "empty"], ["empty"], list(TENSORS)])
def test_part_is_a_file_of_just_these_tensors(file: Path, keys: list[str], tmp_path: Path) -> None:
    layout = header_of(file).part(keys)
    data = file.read_bytes()
    part = tmp_path / "part.safetensors"
    part.write_bytes(layout.header + b"".join(data[start:end] for start, end in layout.ranges))
    loaded = load_file(part)
    assert set(loaded) == set(keys)
    for key in keys:
        assert loaded[key].dtype == TENSORS[key].dtype
        assert torch.equal(loaded[key].float(), TENSORS[key].float())
    assert header_of(part).metadata == {"format": "pt", "é": "ü"}
    assert layout.data_bytes == sum(tensor.nbytes for key, tensor in TENSORS.items() if key in keys)
    assert len(layout.header) % 8 == 0


def test_neighbours_are_one_range_and_the_whole_is_one(file: Path) -> None:
    header = header_of(file)
    (whole,) = header.part(TENSORS).ranges
    assert whole[1] == file.stat().st_size
    assert len(header.part(["long", "odd"]).ranges) == 2


def test_part_is_named_by_its_content(file: Path, tmp_path: Path) -> None:
    header = header_of(file)
    assert header.part(["wide", "odd"]).name == header.part(["odd", "wide"]).name
    assert header.part(["wide"]).name != header.part(["odd"]).name
    save_file(TENSORS | {"more": torch.ones(1, dtype=torch.int64)}, tmp_path / "other.safetensors")
    assert header_of(tmp_path / "other.safetensors").part(["odd"]).name != header.part(["odd"]).name


def test_unknown_tensor_is_a_key_error(file: Path) -> None:
    with pytest.raises(KeyError):
        header_of(file).part(["none"])


@pytest.mark.parametrize("length", [0, 1, 93, 2**32, 2**63, 2**64 - 1])
def test_length_that_cannot_be_is_refused(length: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^not a safetensors file: a header of {length} bytes in a file of 100 b"
    ):
        parse_length(length.to_bytes(8, "little"), 100)


def test_length_above_what_safetensors_takes_is_refused() -> None:
    assert parse_length((100_000_000).to_bytes(8, "little"), 2**40) == 100_000_000
    with pytest.raises(CheckpointError):
        parse_length((100_000_001).to_bytes(8, "little"), 2**40)


def test_length_cut_short_is_refused() -> None:
    with pytest.raises(CheckpointError):
        parse_length(b"\x02", 100)


@pytest.mark.parametrize(
    ("entries", "data_bytes", "match"),
    [
        ({"a": entry(0, 4)}, 3, r"its tensors end at byte \d+ of \d+$"),
        ({"a": entry(0, 4)}, 5, r"its tensors end at byte \d+ of \d+$"),
        ({}, 5, r"its tensors end at byte \d+ of \d+$"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "tensor 'b' has bytes "),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "tensor 'b' has bytes "),
        ({"a": entry(0, 4), "b": entry(6, 8)}, 8, "tensor 'b' has bytes "),
        ({"a": entry(1, 4)}, 4, "tensor 'a' has bytes "),
        ({"a": entry(0, 4), "b": entry(4, 2)}, 4, "tensor 'b' has bytes "),
        ({"a": entry(0, 2**62)}, 4, r"its tensors end at byte \d+ of \d+$"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fill_the_file_are_refused(entries: object, data_bytes: int, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        parse(entries, data_bytes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[]",
        b"3",
        b"null",
        b'{"a": 3}',
        b'{"__metadata__": 3, "a": {}}',
        b'{"__metadata__": {"format": 3}}',
        b'{"__metadata__": ["x"]}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e3]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 5000),
        {"a": entry(-4, 0)},
        {"a": entry(0, 2**64)},
        {"a": entry(0, 4, shape=(True,))},
        {"a": entry(0, 4, shape=(-1,))},
        {"a": entry(0, 4, shape=(2**70,))},
        {"a": entry(0, 4, shape=(1,) * 65)},
        {"a": entry(0, 4, dtype=3)},
        {"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}},
        {"a": entry(0, 4) | {"data_offsets": "04"}},
    ],
    ids=lambda entries: repr(entries)[:60],
)
def test_header_of_garbage_is_refused_in_one_line(entries: object) -> None:
    with pytest.raises(CheckpointError, match=r"^not a safetensors file: its header is not readable: ") as caught:
        parse(entries, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x" * 100])
def test_names_of_garbage_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^weights .*x.safetensors are not readable: "):
        tensor_names(tmp_path / "x.safetensors")
