"""Remote blocks on an accelerator: exactness, and decode speed against the same model run locally on it.

    python benchmarks/device.py [--device cuda] [--dtype bfloat16]

Two peer threads hold the halves of a random llama on the device; the client keeps embeddings and head there too.
cuDNN's attention is off in the local model, as it is in steps of peers: it plans anew for each length of the cache, and
rounds in another way.
Prints one line of
JSON: largest differences of logits and gradients against the local model, whether greedy tokens agree before and
after a kill, and medians of interleaved decode bursts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.testing import LocalSwarm

NUM_NEW = 48


def build(folder: Path, hidden_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        pad_token_id=0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder, max_shard_size="50MB")


def tokens_per_s(model: Any, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    began_s = time.perf_counter()
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NUM_NEW, do_sample=False)
    torch.cuda.synchronize() if tokens.is_cuda else None
    return NUM_NEW / (time.perf_counter() - began_s), output


def gradient(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=inputs, labels=tokens).loss.backward()
    grad: torch.Tensor = inputs.grad
    return grad


def measure(device: str, dtype_name: str, hidden_size: int, rounds: int) -> dict[str, object]:
    dtype: torch.dtype = getattr(torch, dtype_name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, hidden_size, dtype)
        local: Any = LlamaForCausalLM.from_pretrained(folder)
        local = local.to(device).eval()
        with LocalSwarm(folder, spans=["0:4", "4:8", "4:8"], device=device) as swarm:
            remote: Any = load(folder, trackers=swarm.trackers, mdns=False)
            remote = remote.to(device)
            tokens = torch.randint(1, 2048, (1, 64), generator=torch.Generator().manual_seed(1)).to(device)
            with torch.no_grad():
                logit_difference = (local(tokens).logits - remote(tokens).logits).abs().max().item()
            grad_difference = (gradient(local, tokens) - gradient(remote, tokens)).abs().max().item()
            pairs = []
            for _ in range(rounds + 1):
                local_rate, expected = tokens_per_s(local, tokens)
                remote_rate, output = tokens_per_s(remote, tokens)
                pairs.append((local_rate, remote_rate))
            is_equal = torch.equal(expected, output)
            last = remote.model.layers.stats().route[-1].peer_id
            next(peer for peer in swarm.peers if peer.peer_id == last).kill()
            _, survived = tokens_per_s(remote, tokens)
            stats = remote.model.layers.stats()
            remote.model.layers.close()
    rates = pairs[1:]
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype_name,
        "hidden": hidden_size,
        "logit_difference": logit_difference,
        "gradient_difference": grad_difference,
        "tokens_equal": is_equal,
        "tokens_equal_after_kill": torch.equal(expected, survived),
        "failovers": stats.failovers,
        "local_tokens_per_s": round(statistics.median(rate[0] for rate in rates), 1),
        "remote_tokens_per_s": round(statistics.median(rate[1] for rate in rates), 1),
        "ratio": round(statistics.median(rate[1] / rate[0] for rate in rates), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="remote blocks on an accelerator")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for dtype_name in options.dtype:
        print(json.dumps(measure(options.device, dtype_name, options.hidden, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
