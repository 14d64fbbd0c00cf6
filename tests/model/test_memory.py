"""A peer needs memory for its span, not for the model: measured in processes of their own by benchmarks/memory.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import load_benchmark

MIB = 2**20
# Measured (x86-64, torch 2.13, transformers 5.24): 1.15 x 98 MiB for the span once it has run, of which 14 MiB do not
# depend on its size (code paged in, math library); 9 MiB right after loading, as weights stay mapped until used.
FACTOR = 1.3
CONSTANT_BYTES = 16 * MIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 blocks in eight files, embeddings and head in a ninth."""
    folder = tmp_path_factory.mktemp("large")
    load_benchmark("memory").write_checkpoint(folder)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) == 9
    assert sum(sizes) > 400 * MIB
    return folder


def tensor_bytes(folder: Path, *parts: str) -> int:
    """Bytes on disk of the tensors whose names contain one of ``parts``."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if any(part in name for part in parts):
                start, end = entry["data_offsets"]
                total += end - start
    return total


def check_part(result: dict[str, Any], expected_bytes: int) -> None:
    assert result["part_bytes"] == expected_bytes
    assert result["peak_increase_bytes"] > expected_bytes, "the weights were not in memory, so nothing was measured"
    assert result["peak_increase_bytes"] < FACTOR * expected_bytes + CONSTANT_BYTES
    assert result["load_peak_increase_bytes"] < CONSTANT_BYTES


def test_span_takes_memory_for_its_own_blocks_and_opens_only_their_files(checkpoint: Path) -> None:
    result = load_benchmark("memory").run_part(str(checkpoint), "4:8", "auto")
    check_part(result, tensor_bytes(checkpoint, *(f"layers.{block}." for block in range(4, 8))))
    assert result["files_opened"] == ["model-00003-of-00009.safetensors", "model-00004-of-00009.safetensors"]


def test_client_takes_memory_for_embeddings_and_head_and_opens_only_their_file(checkpoint: Path) -> None:
    result = load_benchmark("memory").run_part(str(checkpoint), "client", "auto")
    check_part(result, tensor_bytes(checkpoint, "embed_tokens", "lm_head", "model.norm"))
    assert result["files_opened"] == ["model-00009-of-00009.safetensors"]
