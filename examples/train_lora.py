"""LoRA through a swarm: the built-in model, which writes documentation, learns to write licences.

    python examples/train_lora.py [--steps N] [--local] [--save FOLDER]

The adapter and the optimizer live here, peft is unmodified, and the peers hold the frozen blocks. It prints the loss of
each tenth step, the perplexity on licences that were held out, before and after, and what the model writes. ``--local``
does the same on the whole model in this process, and prints the same numbers. The texts: see `licence_texts.py`.
"""

import argparse
import contextlib
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from licence_texts import licence_texts, windows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from remote_modules import ClientConfig, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers
NUM_TOKENS = 128  # of a window
BATCH = 8  # windows
PROMPTS = ("Redistribution and use in", "You may not")
SPANS = ["0:3", "3:6", "6:8"]


@contextlib.contextmanager
def model_of(options: argparse.Namespace) -> Iterator[PreTrainedModel]:
    """The built-in model, with its blocks here or on three peers."""
    if options.local:
        yield AutoModelForCausalLM.from_pretrained(built_in_path())
        return
    with LocalSwarm(built_in_path(), spans=SPANS, mode=options.peers, num_threads=1) as swarm:
        model = load(built_in_path(), trackers=swarm.trackers, mdns=False, config=ALONE)
        yield model
        print(f"swarm: {model.model.layers.stats()}")
        model.model.layers.close()


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of all tokens of ``rows`` ``[N, T]`` but the first of each."""
    model.eval()
    batches = rows.split(BATCH)
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch) for batch in batches]
    return math.exp(sum(losses) / len(rows))


def train(model: Any, rows: torch.Tensor, num_steps: int, rate: float) -> None:
    """``num_steps`` steps of AdamW on batches of ``rows`` in an order that a seed decides; the rate falls to zero."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps + 1, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    for step in range(1, num_steps + 1):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=order)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step in (1, num_steps):
            print(f"step {step}: loss {loss.item():.6f}")


def show(model: Any, tokenizer: Any, when: str) -> None:
    """Print what the model writes after each prompt; a seed decides the draws."""
    for prompt in PROMPTS:
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=True, temperature=0.6, pad_token_id=0)
        print(f"{when}: {' '.join(tokenizer.decode(ids[0]).split())}")


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA through a swarm, on licence texts")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--validation", type=int, default=96, help="windows for perplexity")
    parser.add_argument("--local", action="store_true", help="all blocks in this process")
    parser.add_argument("--peers", choices=("process", "thread"), default="process")
    parser.add_argument("--save", type=Path, help="folder for the adapter")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(built_in_path(), model_max_length=1 << 30)
    texts = licence_texts()
    rows = windows(tokenizer, texts.training, NUM_TOKENS)
    held_out = windows(tokenizer, texts.validation, NUM_TOKENS)
    held_out = held_out[:: max(1, len(held_out) // options.validation)][: options.validation]
    print(f"{len(texts.training)} documents, {rows.numel()} tokens to train on; {held_out.numel()} tokens held out")

    with model_of(options) as model:
        torch.manual_seed(0)
        adapted: Any = get_peft_model(
            model, LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear")
        )
        before = perplexity(adapted, held_out)
        show(adapted, tokenizer, "before")
        started_s = time.monotonic()
        train(adapted, rows, options.steps, options.rate)
        took_s = time.monotonic() - started_s
        after = perplexity(adapted, held_out)
        show(adapted, tokenizer, "after")
        if options.save is not None:
            adapted.save_pretrained(options.save)
    print(f"validation perplexity: {before:.4f} before, {after:.4f} after, {1 - after / before:.1%} better")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor_s = sum(usage.ru_utime + usage.ru_stime for usage in used)
    load_average = os.getloadavg()[0]
    print(
        f"{options.steps} steps in {took_s:.0f} s; processor time in all {processor_s:.0f} s, load {load_average:.1f}"
    )


if __name__ == "__main__":
    main()
