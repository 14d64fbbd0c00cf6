"""Build a draft model for speculative decoding: a few blocks of the built-in model, taught to guess what it says.

The draft has the tokenizer, the embeddings and the norm of its teacher and some of its blocks, and learns the teacher's
distribution on the text of `train_small_model.py`. What counts is how often it agrees with the first choice of it on
text that was held out.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch.nn import functional
from train_small_model import load_corpus, split, token_stream
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CARD = """# {name}

A draft model for [{teacher}](../{teacher}/README.md), for speculative decoding: {parameters:,} parameters,
{layers} blocks, the tokenizer of its teacher. It began as blocks {blocks} of that and learned its distribution
on the same text:

    {command}

{steps} steps of {batch} windows of {context} tokens. On {judged:,} tokens that were held out it has the same first
choice at {same:.1%} of positions; if both sample, {overlap:.1%} of its tokens are accepted. Text and licence are those
of its teacher.
"""
TEACHER = Path(__file__).parents[1] / "remote_modules/assets/pydoc-2m"


def make_draft(teacher: LlamaForCausalLM, blocks: list[int]) -> LlamaForCausalLM:
    """The teacher with only these blocks, by their indices in it."""
    config = LlamaConfig.from_dict({**teacher.config.to_dict(), "num_hidden_layers": len(blocks)})
    draft = LlamaForCausalLM(config)
    draft.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(teacher.model.norm.state_dict())
    for block, index in zip(draft.model.layers, blocks, strict=True):
        block.load_state_dict(teacher.model.layers[index].state_dict())
    return draft


def agreement(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: torch.Tensor) -> tuple[float, float]:
    """Shares of held-out positions: the same first choice; and accepted if both sample (the overlap)."""
    same, overlap = [], []
    with torch.no_grad():
        for window in windows:
            guess, truth = draft(input_ids=window[None]).logits, teacher(input_ids=window[None]).logits
            same.append((guess.argmax(-1) == truth.argmax(-1)).float().mean())
            overlap.append(torch.minimum(guess.softmax(-1), truth.softmax(-1)).sum(-1).mean())
    return float(torch.stack(same).mean()), float(torch.stack(overlap).mean())


def train(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: torch.Tensor, options: Namespace) -> int:
    """Cross entropy with the teacher's distribution, on random windows; the number of steps."""
    optimizer = torch.optim.AdamW(draft.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dice = torch.Generator().manual_seed(options.seed)
    began_s, recent = time.perf_counter(), list[float]()
    for step in range(options.steps):
        done = max(step / options.steps, (time.perf_counter() - began_s) / (60 * options.minutes))
        if done >= 1:
            return step
        warm_up = (step + 1) / min(50, options.steps)
        optimizer.param_groups[0]["lr"] = options.rate * min(warm_up, 0.52 + 0.48 * math.cos(math.pi * done))
        batch = windows[torch.randint(len(windows), (options.batch,), generator=dice)]
        with torch.no_grad():
            wanted = teacher(input_ids=batch).logits.softmax(-1)
        loss = functional.cross_entropy(draft(input_ids=batch).logits.flatten(0, 1), wanted.flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % options.report_every == 0:
            print(f"step {step + 1:5d}  cross entropy {sum(recent) / len(recent):.3f}", flush=True)
            recent.clear()
    return int(options.steps)


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("output", type=Path, help="folder of the draft model")
    add("--teacher", type=Path, default=TEACHER, help="a llama with its tokenizer")
    add("--blocks", type=int, nargs="+", default=[0, 4, 7], help="of the teacher, that the draft begins as")
    add("--steps", type=int, default=1500)
    add("--minutes", type=float, default=math.inf, help="end the run by then")
    add("--corpus", type=Path, default=Path(".corpus.txt"), help="read; if missing, built")
    add("--batch", type=int, default=16, help="windows a step")
    add("--context", type=int, default=256, help="tokens a window")
    add("--rate", type=float, default=2e-3, help="peak learning rate")
    add("--report-every", type=int, default=50)
    add("--seed", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    """Read the teacher, train the draft and write its folder."""
    options = parse_options()
    torch.manual_seed(options.seed)
    teacher = LlamaForCausalLM.from_pretrained(options.teacher).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.teacher)
    training, held_out = (token_stream(tokenizer, texts) for texts in split(load_corpus(options.corpus)))
    draft = make_draft(teacher, options.blocks)
    judged = held_out.unfold(0, options.context, options.context)
    steps = train(draft, teacher, training.unfold(0, options.context, 1), options)
    same, overlap = agreement(draft, teacher, judged)
    print(
        f"{draft.num_parameters()} parameters; on held-out text the same first choice {same:.3f}, overlap {overlap:.3f}"
    )
    draft.save_pretrained(options.output, max_shard_size="2300KB")
    tokenizer.save_pretrained(options.output)
    card = CARD.format(
        name=options.output.name,
        teacher=options.teacher.name,
        parameters=draft.num_parameters(),
        layers=len(options.blocks),
        command=shlex.join(["python", *sys.argv]),
        judged=judged.numel(),
        same=same,
        overlap=overlap,
        **{name: getattr(options, name) for name in ("blocks", "batch", "context")},
        steps=steps,
    )
    (options.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
