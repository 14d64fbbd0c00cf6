"""Every way to call a model with remote blocks, against the same call of the local model: families x modes.

    python benchmarks/modes.py [--family llama ...] [--mode "beam search" ...] [--jobs 2] [--output docs/modes.md]

Tiny random models in fp32, one torch thread, blocks on three simulated peers. Each mode is one function that is called
with the local model and with the remote one; what they return is compared: tokens, logits, scores, gradients. The exit
code is 1 if a difference is neither 0.0 nor explained here, if only the remote model fails, or if a peer still holds a
KV cache afterwards.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import math
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from _mode_calls import MODES, Results, Side, forked_by_prefill, greedy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.spans import Span
from remote_modules.testing.inline_swarm import InlineSwarm

__all__ = ["FAMILIES", "MODES", "Cell", "Row", "check", "document", "run_family"]

FAMILIES = (
    "llama mistral ministral qwen2 qwen3 qwen3_moe qwen3_next mixtral gemma2 gemma3_text gemma3n_text gpt2 gptj "
    "gpt_neo gpt_neox gpt_bigcode bloom falcon opt mpt phi phi3 gpt_oss deepseek_v3 deepseek_v4 minicpm3 cohere "
    "cohere2 olmo2 olmo3 stablelm granite starcoder2 glm4 glm_moe_dsa smollm3 llama4_text exaone4 nemotron mamba2 "
    "zamba2"
).split()
CHANGES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 4},  # its default has too few blocks for three peers
    "mpt": {"use_cache": True},
}

# What the remote model equals instead, and how that is called.
SAME_AS: dict[str, tuple[Callable[[Side], Results], str]] = {
    "static cache": (greedy, "the local run with a dynamic cache, which is what peers keep"),
    "forked cache": (forked_by_prefill, "a local run without the copy: peers compute its cache anew, in one prefill"),
}
# Where neither is so, and why.
ROUNDING = {
    ("mamba2", "forked cache"): "the copy's cache is computed anew, in one prefill; a mamba2 has no length, so that "
    "`generate` feeds it the whole text again in each turn, which no local run without a cache does",
    (
        "gemma3n_text",
        "forked cache",
    ): "the copy's cache is computed anew, in one prefill, from inputs of the blocks that "
    "the client had computed token by token",
}
MAX_ROUNDING = 1e-5
EXPLAINED = (
    "Tiny random models in fp32, blocks on three peers. Each call is compared with the same call of the local model: "
    "tokens, logits, scores, gradients, hidden states, whatever it returns. After each, no peer may hold a KV cache."
)
# Where the remote model refuses by name what the local one does.
REFUSALS = {("gemma3n_text", "hidden states"), ("zamba2", "hidden states")}
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, UnsupportedCallError)


@dataclass(frozen=True, slots=True)
class Cell:
    """One mode of one family.

    Attributes:
        difference: largest absolute one of anything returned; None if a side failed, or the mode does not apply.
        note: what is not as expected, or not as in the local model; empty if nothing is.
        is_wrong: whether that is a fault.
    """

    difference: float | None = None
    note: str = ""
    is_wrong: bool = False


@dataclass(slots=True)
class Row:
    family: str
    spans: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)
    seconds: float = 0.0


def difference(ours: Results, theirs: Results) -> float:
    """The largest absolute one; infinite where shapes or names differ. Gradients: of what the client has."""
    names = {name for name in theirs if not name.startswith("gradient.")}
    if names != {name for name in ours if not name.startswith("gradient.")} or ours.keys() - theirs.keys():
        return float("inf")
    return max(_difference(tensor, theirs[name]) for name, tensor in ours.items())


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if torch.equal(ours, theirs):
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return float(torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(float("inf")).max())


def attempt(mode: Callable[[Side], Results], side: Side) -> Results | Exception:
    torch.manual_seed(7)
    try:
        return mode(side)
    except FAILURES as exc:
        side.model.zero_grad()
        return exc.with_traceback(None)  # its frames would keep caches alive


def applies(name: str, model: PreTrainedModel) -> bool:
    return name != "router logits" or "output_router_logits" in inspect.signature(model.forward).parameters


def check(family: str, name: str, local: Side, remote: Side) -> Cell:
    """Run one mode on both sides."""
    assert remote.swarm is not None
    if not applies(name, local.model):
        return Cell()
    expected = attempt(MODES[name], local)
    got = attempt(MODES[name], remote)
    cell = _judged(family, name, local, expected, got)
    del expected, got
    gc.collect()
    left = remote.swarm.kv_bytes()
    return Cell(note=f"{left} bytes of KV cache are left on the peers", is_wrong=True) if left else cell


def _judged(family: str, name: str, local: Side, expected: Results | Exception, got: Results | Exception) -> Cell:
    if isinstance(expected, Exception):
        if isinstance(got, Exception):
            return Cell(note=f"the local model fails too: `{_text(expected)}`")
        return Cell(note=f"the local model fails, the remote one does not: `{_text(expected)}`")
    if isinstance(got, Exception):
        is_refusal = isinstance(got, UnsupportedCallError) and (family, name) in REFUSALS
        return Cell(
            note=f"refused: `{_text(got)}`" if is_refusal else f"fails: `{_text(got)}`", is_wrong=not is_refusal
        )
    off = difference(got, expected)
    if off and math.isfinite(off) and name in SAME_AS:
        other, called = SAME_AS[name]
        instead = attempt(other, local)
        if not isinstance(instead, Exception) and difference(got, instead) == 0.0:
            bound = f"1e{math.ceil(math.log10(off))}"  # rounded up, so that families share a note
            return Cell(off, f"differs by up to {bound} from the same local call, by 0.0 from {called}")
    if 0.0 < off <= MAX_ROUNDING and (family, name) in ROUNDING:
        return Cell(off, f"differs by {off:.1e}: {ROUNDING[family, name]}")
    return Cell(off, f"differs by {off:.1e}" if off else "", is_wrong=off != 0.0)


def _text(exc: Exception) -> str:
    text = re.sub(r"\w+ForCausalLM", "this one", first_line(exc)).replace("`", "'")  # families share a note
    return f"{type(exc).__name__}: {text}"


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """A draft model: ``model`` with noise, so that some of its guesses are right."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.05)
    return draft


def three_spans(cuts: frozenset[int]) -> list[Span]:
    """The first legal span, the last, and what is between them."""
    legal = sorted(cuts)
    ends = [legal[0], legal[1], legal[-2], legal[-1]]
    return [Span(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def run_family(family: str, modes: list[str] | None = None) -> Row:
    """All modes of one family."""
    began_s = time.perf_counter()
    row = Row(family)
    config = tiny_config(family, **CHANGES.get(family, {}))
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        draft = perturbed(model)
        with InlineSwarm(folder, [Span(0, config.get_text_config(decoder=True).num_hidden_layers)]) as whole:
            spans = three_spans(whole.stack.cuts)
        with InlineSwarm(folder, spans) as swarm:
            local, remote = Side(model, draft), Side(swarm.load(), draft, swarm)
            for name in modes or MODES:
                row.cells[name] = check(family, name, local, remote)
    row.spans = ", ".join(map(str, spans))
    row.seconds = time.perf_counter() - began_s
    return row


def set_up() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    gc.freeze()  # what is loaded stays: collections after each mode are cheap


def document(rows: list[Row], command: str) -> str:
    """The table, and a note for each exception."""
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            if cell.note:
                notes.setdefault((name, cell.note), []).append(row.family)
    numbers = {key: number for number, key in enumerate(notes, start=1)}
    names = list(rows[0].cells)
    lines = [
        "# Ways to call a model",
        "",
        summary(rows),
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: {_versions()}. " + EXPLAINED,
        "",
        "`0`: largest absolute difference 0.0, all tokens equal. `-`: the model has no such argument. `[n]`: a note.",
        "",
        *(f"{number}. {name}" for number, name in enumerate(names, start=1)),
        "",
        f"| family | spans | {' | '.join(str(number) for number in range(1, len(names) + 1))} |",
        "|---|---|" + ":-:|" * len(names),
    ]
    for row in rows:
        shown = [_shown(cell, numbers.get((name, cell.note))) for name, cell in row.cells.items()]
        lines.append(f"| {row.family} | {row.spans} | {' | '.join(shown)} |")
    lines += ["", "## Notes", ""]
    lines += [f"{numbers[key]}. {key[0]} ({', '.join(families)}): {key[1]}" for key, families in notes.items()]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def summary(rows: list[Row]) -> str:
    cells = [cell for row in rows for cell in row.cells.values() if cell.difference is not None or cell.note]
    exact = sum(cell.difference == 0.0 and not cell.is_wrong for cell in cells)
    wrong = sum(cell.is_wrong for cell in cells)
    return (
        f"{len(rows)} families, {len(rows[0].cells)} modes, {len(cells)} calls: {exact} are exact, {wrong} are wrong, "
        f"{len(cells) - exact - wrong} are exceptions with a note."
    )


def _shown(cell: Cell, number: int | None) -> str:
    if cell.note:
        return f"**wrong [{number}]**" if cell.is_wrong else f"[{number}]"
    return "-" if cell.difference is None else "0"


def main() -> None:
    parser: Any = argparse.ArgumentParser(description="all modes of generation, remote against local")
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES, metavar="TYPE")
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "modes.md")
    options = parser.parse_args()
    began_s = time.perf_counter()
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), set_up) as pool:
        rows = list(pool.map(run_family, options.family, [options.mode] * len(options.family)))
    for row in rows:
        for name, cell in row.cells.items():
            if cell.is_wrong:
                print(f"{row.family}, {name}: {cell.note}")
    options.output.write_text(document(rows, " ".join(["python", "benchmarks/modes.py", *sys.argv[1:]])), "utf-8")
    print(f"{summary(rows)} {options.output} in {time.perf_counter() - began_s:.0f} s")
    sys.exit(any(cell.is_wrong for row in rows for cell in row.cells.values()))


if __name__ == "__main__":
    main()
