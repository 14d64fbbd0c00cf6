"""Cost of remoteness: decode through one peer on loopback against the same model run locally.

    python benchmarks/overhead.py [--hidden 256 1024] [--tokens 64] [--rounds 9]

One peer process holds all blocks; client and peer use one torch thread each. Local and remote bursts of greedy
decoding are interleaved; the ratio is the median over rounds of local seconds / remote seconds of the same round
(1.0: remoteness is free). The hop cost is the median difference per token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.testing import LocalSwarm

PROMPT_TOKENS = 16
NUM_BLOCKS = 8


def build_checkpoint(folder: Path, hidden_size: int) -> None:
    """A random llama of 8 blocks in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def burst(model: Any, tokens: torch.Tensor, num_new: int) -> tuple[float, torch.Tensor]:
    """Seconds per decoded token, prefill apart, and the tokens."""
    seconds = []
    began_s = time.perf_counter()

    def note(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        seconds.append(time.perf_counter() - began_s)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_new,
        do_sample=False,
        stopping_criteria=[note],
    )
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1), output


def measure(hidden_size: int, num_new: int, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_checkpoint(folder, hidden_size)
        local: Any = LlamaForCausalLM.from_pretrained(folder).eval()
        with LocalSwarm(folder, spans=[f"0:{NUM_BLOCKS}"], mode="process", num_threads=1) as swarm:
            remote: Any = load(folder, trackers=swarm.trackers, mdns=False)
            tokens = torch.randint(1, 1024, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
            for model in (local, remote):
                burst(model, tokens, num_new)
            pairs = []
            for _ in range(rounds):
                local_s, expected = burst(local, tokens, num_new)
                remote_s, output = burst(remote, tokens, num_new)
                if not torch.equal(expected, output):
                    raise SystemExit("remote tokens differ from local tokens")
                pairs.append((local_s, remote_s))
            waterfall = remote.model.layers.stats().waterfall[-1][0]
            remote.model.layers.close()
    return {
        "hidden": hidden_size,
        "blocks": NUM_BLOCKS,
        "rounds": rounds,
        "local_ms_per_token": round(1e3 * statistics.median(pair[0] for pair in pairs), 3),
        "remote_ms_per_token": round(1e3 * statistics.median(pair[1] for pair in pairs), 3),
        "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 3),
        "hop_us": round(1e6 * statistics.median(pair[1] - pair[0] for pair in pairs)),
        "last_step_us": {
            "total": round(1e6 * waterfall.total_s),
            "queue": round(1e6 * waterfall.queue_s),
            "compute": round(1e6 * waterfall.compute_s),
            "wire": round(1e6 * waterfall.wire_s),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of remoteness on loopback")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for hidden_size in options.hidden:
        print(json.dumps(measure(hidden_size, options.tokens, options.rounds)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
