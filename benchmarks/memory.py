"""What loading a part of a checkpoint costs: files opened and peak memory, as one JSON line.

    python benchmarks/memory.py [--folder DIR] [--dtype float32]

By default a random bf16 llama of 16 blocks, about 420 MiB in nine files, is written to a temporary folder. Each part is
loaded in a process of its own and then run once, so that memory-mapped weights are really in memory. Peaks are those of
resident memory (VmHWM) over what the process had after its imports; Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

NUM_BLOCKS = 16
BLOCKS_PER_FILE = 2
SPAN = "4:8"
NUM_TOKENS = 8
CHECKPOINT_MODULE = "remote_modules.model.checkpoint"
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=NUM_BLOCKS,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    dtype=torch.bfloat16,
    architectures=["LlamaForCausalLM"],
)


def write_checkpoint(folder: Path) -> None:
    """A llama of `CONFIG`, file by file; its blocks are copies of one, so that writing it takes seconds."""
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    random = {
        name: torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
        for name, parameter in model.model.layers[0].named_parameters()
    }
    rest = [(name, parameter) for name, parameter in model.named_parameters() if ".layers." not in name]
    num_files = NUM_BLOCKS // BLOCKS_PER_FILE + 1
    weight_map = {}
    for number in range(num_files):  # one at a time in memory
        blocks = range(number * BLOCKS_PER_FILE, min((number + 1) * BLOCKS_PER_FILE, NUM_BLOCKS))
        tensors = {f"model.layers.{block}.{name}": random[name].clone() for block in blocks for name in random}
        if not blocks:
            tensors = {name: torch.ones(parameter.shape, dtype=torch.bfloat16) for name, parameter in rest}
        file_name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8"
    )
    CONFIG.save_pretrained(folder)


def measure_part(folder: str, part: str, dtype: str) -> dict[str, Any]:
    """Load ``part`` (a span, or "client") in this process, run it once, and say what it took."""
    from remote_modules.model.checkpoint import open_checkpoint
    from remote_modules.model.classes import model_class
    from remote_modules.model.loading import load_client_part, load_span, read_config
    from remote_modules.model.replay import OwnerArguments, SpanModel
    from remote_modules.spans import Span

    torch.set_num_threads(1)
    torch.randn(64, 64, dtype=torch.bfloat16) @ torch.randn(64, 64, dtype=torch.bfloat16)  # loads the math library
    with opened_files() as files:
        before = memory_bytes("VmRSS")
        checkpoint = open_checkpoint(folder)
        cls, config = model_class(read_config(checkpoint))
        if part == "client":
            model, _ = load_client_part(checkpoint, config, cls, dtype=dtype)
        else:
            model, stack = load_span(checkpoint, config, cls, Span.parse(part), dtype=dtype)
        load_peak = memory_bytes("VmHWM") - before
        with torch.inference_mode():
            if part == "client":
                model(input_ids=torch.arange(NUM_TOKENS)[None], use_cache=False)
                for parameter in model.parameters():
                    parameter.sum()  # rows of the embedding that the tokens did not touch
            else:
                runner = SpanModel(model, stack, Span.parse(part))
                inputs = torch.zeros(1, NUM_TOKENS, runner.hidden_size)
                arguments = OwnerArguments(rows=1, num_tokens=NUM_TOKENS, use_cache=False)
                runner.run({"hidden_states": inputs}, runner.span, arguments)
    part_bytes = parameter_bytes(model)
    peak = memory_bytes("VmHWM") - before
    return {
        "part": part,
        "dtype": str(next(model.parameters()).dtype),
        "part_bytes": part_bytes,
        "files_opened": sorted(files),
        "load_peak_increase_bytes": load_peak,
        "peak_increase_bytes": peak,
        "ratio": round(peak / part_bytes, 3),
    }


@contextmanager
def opened_files() -> Iterator[set[str]]:
    """Names of the weight files that transformers, or this package, opens."""
    modules: list[Any] = [importlib.import_module(name) for name in ("transformers.modeling_utils", CHECKPOINT_MODULE)]
    names: set[str] = set()
    real = modules[0].safe_open

    def counting(path: str, *args: Any, **kwargs: Any) -> Any:
        names.add(Path(path).resolve().name)
        return real(path, *args, **kwargs)

    for module in modules:
        module.safe_open = counting
    try:
        yield names
    finally:
        for module in modules:
            module.safe_open = real


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def memory_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {name}; Linux does")


def run_part(folder: str, part: str, dtype: str) -> Any:
    command = [sys.executable, __file__, "--folder", folder, "--part", part, "--dtype", dtype]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what loading a part of a checkpoint costs.")
    parser.add_argument("--folder", help="an existing checkpoint; default: a random one, written for the purpose")
    parser.add_argument("--dtype", default="auto", help="as from_pretrained takes it")
    parser.add_argument("--part", help='measure one part in this process: a span such as 4:8, or "client"')
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(measure_part(options.folder, options.part, options.dtype)))
        return
    with tempfile.TemporaryDirectory(prefix="memory-benchmark-") as name:
        if options.folder is None:
            write_checkpoint(Path(name))
        folder = options.folder or name
        files = list(Path(folder).glob("*.safetensors"))
        result = {
            "checkpoint_bytes": sum(path.stat().st_size for path in files),
            "num_files": len(files),
            "parts": [run_part(folder, part, options.dtype) for part in (SPAN, "client")],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
