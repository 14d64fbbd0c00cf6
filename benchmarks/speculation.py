"""Speculative decoding over three peers at a round trip of 100 ms, against plain decoding.

    python benchmarks/speculation.py [--quick] [--rounds 5] [--tokens 64] [--draft FOLDER]  # root, gcc, netlab

The built-in model and its draft, greedy, each round with another text; the arms of a round run in random order, and
all must give the tokens of the local model. Seconds count from the first new token to the last, figures are medians
over rounds of plain seconds / speculative seconds.

* copy-like: a text that the model has begun to repeat (a greedy one of 256 tokens, and on from there), lookup alone;
* novel: beginnings of sentences, the draft model alone, and with lookup;
* misled: the same beginnings with a draft model that was never trained, alone: nothing may be lost by it. Once more
  with links that have no delay, where each guess costs time.

Prints one line of JSON; markdown and progress go to stderr.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _lab import LabSwarm, Link, Netlab, client_host
from _report import Bar, print_report, say, table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import Speculation, load
from remote_modules.model.checkpoint import built_in_draft_path, open_checkpoint

MODEL = "pydoc-2m"
SPANS = ("0:3", "3:6", "6:8")
RTT_MS, MBIT = 100.0, 100.0
REPEATING_AFTER = 256
BEGINNINGS = (
    "The server closes the connection when",
    "A parser for simple configuration files reads",
    "Each thread has its own copy of",
    "To sort the list in place, one may",
    "Messages are written to the log only if",
    "When the timer expires, the waiting",
    "An iterator over the lines of",
    "The second argument of the function tells whether",
    "Objects of this class hold the address and",
)


@dataclass
class Text:
    """One text to go on with, and what the local model says."""

    tokens: torch.Tensor
    expected: torch.Tensor


@dataclass
class Arm:
    """A way to decode; ``seconds`` by round."""

    name: str
    speculation: Speculation | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self, model: Any, text: Text) -> float:
        times: list[float] = []

        def note(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        output = model.generate(
            text.tokens,
            attention_mask=torch.ones_like(text.tokens),
            max_new_tokens=text.expected.shape[1] - text.tokens.shape[1],
            do_sample=False,
            eos_token_id=None,
            stopping_criteria=[note],
            **({} if self.speculation is None else {"custom_generate": self.speculation}),
        )
        if not torch.equal(output, text.expected):
            raise SystemExit(f"'{self.name}': tokens differ from the local model's")
        return times[-1] - times[0]


def texts(number: int, num_new: int) -> tuple[list[Text], list[Text]]:
    """Copy-like ones and novel ones."""
    folder = open_checkpoint(MODEL).folder
    local: Any = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    copied, novel = [], []
    for number_of in range(number):
        tokens = tokenizer(BEGINNINGS[number_of % len(BEGINNINGS)], return_tensors="pt").input_ids
        options = {"do_sample": False, "eos_token_id": None}
        whole = local.generate(tokens, max_new_tokens=REPEATING_AFTER + num_new, **options)
        copied.append(Text(whole[:, :-num_new], whole))
        novel.append(Text(tokens, whole[:, : tokens.shape[1] + num_new]))
    return copied, novel


def interleave(model: Any, kind: str, arms: Sequence[Arm], given: Sequence[Text], dice: Random) -> None:
    """All arms once with each text; the first text warms up."""
    for number, text in enumerate(given):
        for arm in dice.sample(arms, len(arms)):
            seconds = arm.run(model, text)
            if number:
                arm.seconds.append(seconds)
        if number:
            say(f"  {kind}: " + ", ".join(f"{arm.name} {arm.seconds[-1]:.2f} s" for arm in arms))


def ratio(plain: Arm, arm: Arm) -> float:
    return statistics.median(one / other for one, other in zip(plain.seconds, arm.seconds, strict=True))


def untrained(draft: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig.from_dict(draft.config.to_dict())).eval()


def measure(options: argparse.Namespace, rtt_ms: float, kinds: dict[str, tuple[list[Text], list[Arm]]]) -> None:
    hosts = dict.fromkeys(["client", "tracker", *(f"p{number}" for number in range(len(SPANS)))])
    with (
        Netlab(hosts, default=Link(delay_ms=rtt_ms / 2, mbit=MBIT)) as lab,
        LabSwarm(lab, MODEL, "tracker", dtype="float32") as swarm,
    ):
        for number, span in enumerate(SPANS):
            swarm.begin(f"p{number}", blocks=span)
        swarm.await_online()
        with client_host(lab, "client"):
            model: Any = load(MODEL, trackers=[swarm.url], mdns=False)
            try:
                for kind, (given, arms) in kinds.items():
                    interleave(model, kind, arms, given, Random(0))
            finally:
                model.model.layers.close()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speculative decoding over slow links")
    parser.add_argument("--draft", default=built_in_draft_path(), help="folder of another draft model")
    parser.add_argument("--quick", action="store_true", help="16 tokens, one round that counts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="that count, at most 8")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 16, 1
    return options


def main() -> int:
    options = parse_options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    draft: Any = LlamaForCausalLM.from_pretrained(options.draft).eval()
    copied, novel = texts(options.rounds + 1, options.tokens)
    arms = {
        "copy-like": (copied, [Arm("plain"), Arm("lookup", Speculation())]),
        "novel": (
            novel,
            [
                Arm("plain"),
                Arm("draft", Speculation(draft, lookup=False)),
                Arm("draft and lookup", Speculation(draft)),
                Arm("misled", Speculation(untrained(draft), lookup=False)),
            ],
        ),
    }
    near_arms = [
        Arm("plain"),
        Arm("draft", Speculation(draft)),
        Arm("misled", Speculation(untrained(draft), lookup=False)),
    ]
    near = {"novel, no delay": (novel, near_arms)}
    measure(options, RTT_MS, arms)
    measure(options, 0.0, near)
    rows, result = [], {}
    for kind, (_, of_kind) in {**arms, **near}.items():
        plain = of_kind[0]
        for arm in of_kind:
            stats = arm.speculation.stats if arm.speculation is not None else None
            result[f"{kind}, {arm.name}"] = {
                "seconds": [round(s, 3) for s in arm.seconds], "ratio": ratio(plain, arm),
                **({} if stats is None else asdict(stats)),
            }  # fmt: skip
            share = f"{stats.accepted} of {stats.guessed}" if stats is not None else "-"
            rows.append((kind, arm.name, f"{(options.tokens - 1) / statistics.median(arm.seconds):.2f}",
                         f"{ratio(plain, arm):.2f}", share))  # fmt: skip
    bars = [
        Bar("copy-like, lookup ÷ plain", result["copy-like, lookup"]["ratio"], ">=", 10.0),
        Bar("novel, draft ÷ plain", result["novel, draft"]["ratio"], ">=", 2.0),
        *(Bar(f"{name} ÷ plain, not below", figures["ratio"], ">=", 0.97) for name, figures in result.items()),
    ]
    markdown = table(["text", "decoding", "tokens/s", "÷ plain", "guesses accepted"], rows)
    status = print_report(
        {"rtt_ms": RTT_MS, "mbit": MBIT, **vars(options), "draft": str(options.draft), **result}, bars, markdown
    )
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
