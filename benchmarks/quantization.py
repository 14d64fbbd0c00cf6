"""Quantized spans: bytes of a block, output error, speed, and seconds of a cold start against a warm one.

    python benchmarks/quantization.py [--device cuda] [--hidden 1024] [--rounds 5]

For a random bf16 llama and a random bf16 mixtral of four blocks, weights with std 0.02. A cold start reads the
checkpoint, quantizes it and writes the cache; a warm one reads the cache. Starts and passes of all quantizations are
interleaved; medians. Files are in the page cache. Prints one line of JSON for each model and quantization.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import model_class
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.quantization import block_state, compute_dtype
from remote_modules.model.quantized_cache import QuantizedCache
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.spans import Span

NUM_BLOCKS = 4
SPAN = Span(0, NUM_BLOCKS)
NUM_TOKENS = 64
QUANTIZATIONS = ("none", "int8", "nf4")


def build(folder: Path, family: str, hidden_size: int) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4 if family == "llama" else hidden_size,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        num_local_experts=8,
        num_experts_per_tok=2,
        dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")


class Loader:
    """Spans of one checkpoint."""

    def __init__(self, folder: Path, device: str) -> None:
        self._checkpoint = open_checkpoint(str(folder))
        self._cls, self._config = model_class(read_config(self._checkpoint))
        self._device = device

    def load(self, quantization: str, cache: QuantizedCache | None = None) -> tuple[SpanModel, int]:
        """The span, and the mean bytes of a block."""
        model, stack = load_span(
            self._checkpoint,
            self._config,
            self._cls,
            SPAN,
            device=self._device,
            quantization=quantization,
            quantized_cache=cache,
        )
        states = [block_state(stack.blocks(model)[index]) for index in SPAN]
        span_model = SpanModel(model, stack, SPAN)
        span_model.dtype = compute_dtype(model)
        return span_model, sum(tensor.nbytes for state in states for tensor in state.values()) // NUM_BLOCKS

    def run(self, model: SpanModel, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            arguments = OwnerArguments(rows=inputs.shape[0], num_tokens=inputs.shape[1])
            output = model.run({"hidden_states": inputs}, SPAN, arguments)["hidden_states"]
        if output.is_cuda:
            torch.cuda.synchronize()
        return output


def seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def measure(family: str, device: str, hidden_size: int, rounds: int) -> list[dict[str, object]]:
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        build(Path(name) / "checkpoint", family, hidden_size)
        loader = Loader(Path(name) / "checkpoint", device)
        held = {quantization: loader.load(quantization) for quantization in QUANTIZATIONS}
        inputs = torch.randn(1, NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
        outputs = {key: loader.run(model, inputs).float().cpu() for key, (model, _) in held.items()}
        for number in range(rounds):
            for quantization, (model, _) in held.items():
                times[quantization, "decode"].append(seconds(lambda: loader.run(model, inputs[:, :1])))  # noqa: B023
                times[quantization, "prefill"].append(seconds(lambda: loader.run(model, inputs)))  # noqa: B023
                for start in ("cold", "warm"):
                    cache = QuantizedCache(str(number), Path(name))
                    times[quantization, start].append(
                        seconds(lambda: loader.load(quantization, cache))  # noqa: B023
                    )
                for block in SPAN:
                    cache.path(block).unlink(missing_ok=True)
    medians = {key: statistics.median(values) for key, values in times.items()}
    update = (outputs["none"] - inputs.float()).norm()
    return [
        {
            "family": family,
            "quantization": quantization,
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
            "hidden": hidden_size,
            "block_mib": round(num_bytes / 2**20, 2),
            "of_bf16": round(num_bytes / held["none"][1], 4),
            "error": round(((outputs[quantization] - outputs["none"]).norm() / update).item(), 4),
            "cold_start_s": round(medians[quantization, "cold"], 3),
            "warm_start_s": round(medians[quantization, "warm"], 3),
            "one_token_ms": round(1000 * medians[quantization, "decode"], 2),
            f"{NUM_TOKENS}_tokens_ms": round(1000 * medians[quantization, "prefill"], 2),
        }
        for quantization, (_, num_bytes) in held.items()
    ]


def main() -> None:
    parser: Any = argparse.ArgumentParser(description="bytes, error and start of quantized spans")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--families", nargs="+", default=["llama", "mixtral"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for family in options.families:
        for line in measure(family, options.device, options.hidden, options.rounds):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
