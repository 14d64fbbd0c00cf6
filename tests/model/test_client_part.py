"""`load` reads what stays at the client from a checkpoint, and nothing else: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

MIB = 2**20
NUM_BLOCKS = 16
# As in test_memory.py: what does not depend on the size of the part, here with an event loop and the self-test of the
# architecture on top.
CONSTANT_BYTES = 40 * MIB  # 31 MiB were measured
LAYOUTS = {"16 files": "13MB", "one file": "1GB"}
NAMES = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}

SCRIPT = """
import json, pathlib, sys
import torch
import transformers.modeling_utils as target
from remote_modules import load
from remote_modules.model import checkpoint

class Slice:
    def __init__(self, name, inner):
        self.name, self.inner = name, inner
    def __getattr__(self, attribute):
        return getattr(self.inner, attribute)
    def __getitem__(self, index):
        tensor = self.inner[index]
        read[self.name] = tensor.numel() * tensor.itemsize
        return tensor

class Weights:
    def __init__(self, path, *args, **kwargs):
        files.add(pathlib.Path(path).resolve().name)
        self.inner = real(path, *args, **kwargs)
    def __getattr__(self, attribute):
        return getattr(self.inner, attribute)
    def __enter__(self):
        self.inner.__enter__()
        return self
    def __exit__(self, *exc):
        return self.inner.__exit__(*exc)
    def get_slice(self, name):
        return Slice(name, self.inner.get_slice(name))
    def get_tensor(self, name):
        return Slice(name, self.inner.get_slice(name))[...]

def memory_bytes(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
files, read, real = set(), {}, target.safe_open
target.safe_open = checkpoint.safe_open = Weights
before = memory_bytes("VmRSS")
model = load(sys.argv[1], peers=["127.0.0.1:9"], mdns=False)
for parameter in model.parameters():
    parameter.sum().item()
peak = memory_bytes("VmHWM") - before
names = [name for name, _ in model.named_parameters()]
model.model.layers.close()
print(json.dumps({"files": sorted(files), "read": read, "peak_bytes": peak, "parameters": names}))
"""


def save(folder: Path, shard_size: str) -> None:
    """A llama of 240 MB, of which 33 MB stay at the client; its tensors are not random, which is faster."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    transformers_logging.disable_progress_bar()
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size)


def headers(folder: Path) -> dict[str, dict[str, int]]:
    """The bytes of each tensor in each file."""
    found: dict[str, dict[str, int]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sizes = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        found[path.name] = {name: end - start for name, (start, end) in sizes.items()}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_reads_embeddings_norm_and_head_alone(layout: str, tmp_path: Path) -> None:
    save(tmp_path, LAYOUTS[layout])
    by_file = headers(tmp_path)
    assert (len(by_file) == 1) == (layout == "one file")
    sizes = {name: size for tensors in by_file.values() for name, size in tensors.items()}
    client_bytes = sum(sizes[name] for name in NAMES)
    assert sum(sizes.values()) > 6 * client_bytes

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, timeout=120, check=True
    )

    result = json.loads(done.stdout)
    assert result["read"] == {name: sizes[name] for name in NAMES}
    assert set(result["parameters"]) == NAMES
    assert result["files"] == sorted(name for name, tensors in by_file.items() if NAMES & tensors.keys())
    assert client_bytes < result["peak_bytes"] < client_bytes + CONSTANT_BYTES
