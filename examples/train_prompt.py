"""Prompt tuning and deep prompt tuning through a swarm, in plain PyTorch, on licence texts.

    python examples/train_prompt.py [--steps N] [--local]

The built-in model writes documentation. No weight of it is changed: all that is trained are vectors in front of the
text, and then, in a second run from the beginning, also vectors that each remote block adds at the places of those. Of
both it prints the loss of each tenth step, and the perplexity on licences that were held out, before and after.
``--local`` does the same on the whole model in this process, and prints the same numbers. The texts: see
`licence_texts.py`.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from licence_texts import licence_texts, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from remote_modules import ClientConfig, DeepPrompts, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers
NUM_PROMPT_TOKENS = 16
NUM_TOKENS = 64  # of a window
BATCH = 8  # windows


class InputPrompt(torch.nn.Module):
    """A model with trained vectors ``[P, D]`` in front of every text."""

    def __init__(self, model: Any, start: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.prompt = torch.nn.Parameter(start)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss on ``ids`` ``[B, T]`` but the first of each, which a text without a prompt cannot predict."""
        prompt = self.prompt.expand(len(ids), -1, -1)
        inputs = torch.cat([prompt, self.model.get_input_embeddings()(ids)], dim=1)
        labels = torch.nn.functional.pad(ids[:, 1:], (prompt.shape[1] + 1, 0), value=-100)  # -100: no loss
        loss: torch.Tensor = self.model(inputs_embeds=inputs, labels=labels, use_cache=False).loss
        return loss


class LocalDeepPrompts(torch.nn.Module):
    """What `DeepPrompts` has the peers do, on blocks in this process."""

    def __init__(self, blocks: Any, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.prompts = torch.nn.ParameterList([torch.zeros(num_tokens, hidden_size) for _ in blocks])
        for block, prompt in zip(blocks, self.prompts, strict=True):
            block.register_forward_pre_hook(lambda _, args, prompt=prompt: (self._add(args[0], prompt), *args[1:]))

    def _add(self, hidden: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, : len(prompt)] + prompt, hidden[:, len(prompt) :]], dim=1)


@contextlib.contextmanager
def model_of(is_local: bool) -> Iterator[Any]:
    """The built-in model, with its blocks here or on two peers."""
    if is_local:
        yield AutoModelForCausalLM.from_pretrained(built_in_path())
        return
    with LocalSwarm(built_in_path(), spans=["0:4", "4:8"], num_threads=1) as swarm:
        model: Any = load(built_in_path(), trackers=swarm.trackers, mdns=False, config=ALONE)
        yield model
        model.model.layers.close()


@torch.no_grad()
def perplexity(prompted: InputPrompt, rows: torch.Tensor) -> float:
    """Of all tokens of ``rows`` ``[N, T]`` but the first of each."""
    losses = [prompted(batch).item() * len(batch) for batch in rows.split(BATCH)]
    return math.exp(sum(losses) / len(rows))


def train(prompted: InputPrompt, rows: torch.Tensor, num_steps: int, rate: float) -> None:
    """``num_steps`` steps of AdamW on batches of ``rows`` in an order that a seed decides; the rate falls to zero."""
    optimizer = torch.optim.AdamW([p for p in prompted.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps + 1, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    for step in range(1, num_steps + 1):
        loss = prompted(rows[torch.randint(len(rows), (BATCH,), generator=order)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step in (1, num_steps):
            print(f"step {step}: loss {loss.item():.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="prompt and deep prompt tuning through a swarm, on licence texts")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--validation", type=int, default=96, help="windows for the perplexity")
    parser.add_argument("--local", action="store_true", help="all blocks in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as at the peers: numbers are equal to the last bit
    tokenizer = AutoTokenizer.from_pretrained(built_in_path(), model_max_length=1 << 30)
    texts = licence_texts()
    rows = windows(tokenizer, texts.training, NUM_TOKENS)
    held_out = windows(tokenizer, texts.validation, NUM_TOKENS)
    held_out = held_out[:: max(1, len(held_out) // options.validation)][: options.validation]
    print(f"{len(texts.training)} documents, {rows.numel()} tokens to train on; {held_out.numel()} tokens held out")

    with model_of(options.local) as model:
        model.requires_grad_(False)  # peers train nothing, and here only the prompts are trained
        embeddings, layers = model.get_input_embeddings().weight, model.model.layers
        with torch.no_grad():
            without = perplexity(InputPrompt(model, embeddings[:0]), held_out)
        print(f"no prompt: perplexity {without:.4f}")
        for kind in ("prompt", "deep prompt"):
            # the vectors begin as embeddings of text, which trains better than noise
            prompted = InputPrompt(model, embeddings[rows[0, :NUM_PROMPT_TOKENS]].clone())
            if kind == "deep prompt" and options.local:
                prompted.deep = LocalDeepPrompts(layers, NUM_PROMPT_TOKENS, embeddings.shape[1])
            elif kind == "deep prompt":
                prompted.deep = DeepPrompts(layers, NUM_PROMPT_TOKENS)
            size = sum(parameter.numel() for parameter in prompted.parameters() if parameter.requires_grad)
            before = perplexity(prompted, held_out)
            train(prompted, rows, options.steps, options.rate)
            after = perplexity(prompted, held_out)
            print(f"{kind}, {size} parameters: perplexity {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
