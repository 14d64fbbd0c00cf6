"""What peft and `DeepPrompts` do on remote blocks, against the same on a local model: families x methods.

    python benchmarks/adapters.py [--family llama ...] [--method LoRA ...] [--output docs/adapters.md]

Each cell trains one adapter for three AdamW steps on a tiny random model in fp32, once with local blocks and once
with blocks on peers (several spans, one process), and compares losses, the gradients of the first step, the keys of
the adapter's state, the logits after `save_pretrained` into the other model (both ways), and generated tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _adapter_cases import DEEP, FAMILIES, METHODS, NUM_BLOCKS, VIRTUAL, VOCABULARY, method_config, save_family
from _adapter_oracles import add_deep_prompts, deep_prompts, same_dropout
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from remote_modules.errors import RemoteModulesError, first_line
from remote_modules.testing.inline_swarm import InlineSwarm

__all__ = [
    "FAMILIES",
    "METHODS",
    "VIRTUAL",
    "Row",
    "add_deep_prompts",
    "compare",
    "same_dropout",
    "save_family",
    "table",
]

SPANS = ("0:1", "1:3", "3:4")
MAX_DIFFERENCE = 1e-6
MAX_RELATIVE = 1e-2  # in bfloat16
LOW_PRECISION = ("llama", "mixtral", "gpt2")
NUM_STEPS = 3


@dataclass(slots=True)
class Row:
    """One cell of the table.

    Attributes:
        losses: of the steps, local and remote.
        gradient: largest difference in the first step.
        relative: largest norm of the difference in one tensor, relative to the tensor's.
        logits: largest difference after the adapter was saved by one model and loaded by the other: remote to local,
            local to remote.
        local_error: why the method does not work on the local model, with the installed peft.
    """

    losses: tuple[list[float], list[float]] = ([], [])
    gradient: float = 0.0
    relative: float = 0.0
    are_keys_equal: bool = False
    logits: tuple[float, float] = (0.0, 0.0)
    is_greedy_equal: bool = False
    is_beam_equal: bool = False
    local_error: str = ""
    remote_error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether remote blocks do what local ones do; a method that fails locally fails remotely, too."""
        if self.local_error:
            return bool(self.remote_error)
        local, remote = self.losses
        is_exact = local == remote and self.gradient <= MAX_DIFFERENCE and max(self.logits) == 0.0
        return (
            is_exact and self.are_keys_equal and self.is_greedy_equal and self.is_beam_equal and not self.remote_error
        )


Rows = Mapping[tuple[str, str], Row | None]


@dataclass(slots=True)
class _Trained:
    model: PeftModel
    losses: list[float]
    gradients: dict[str, torch.Tensor]


def compare(folder: Path, swarm: InlineSwarm, family: str, method: str, scratch: Path) -> Row | None:
    """Train on the checkpoint in ``folder``, locally and on ``swarm``; None where the method has nothing to adapt."""
    config = method_config(family, method)
    if config is None:
        return None
    row = Row()
    is_deep = method == DEEP
    try:
        local = _trained(_local(folder), config, is_deep)
    except (RuntimeError, ValueError, TypeError) as exc:
        row.local_error = first_line(exc)
    try:
        remote = _trained(swarm.load(), config, is_deep)
    except (RuntimeError, ValueError, TypeError, RemoteModulesError) as exc:
        row.remote_error = first_line(exc)
    if row.local_error or row.remote_error:
        return row
    row.losses = (local.losses, remote.losses)
    pairs = [(grad, remote.gradients[name]) for name, grad in local.gradients.items()]
    row.gradient = max(_difference(*pair) for pair in pairs)
    row.relative = max(float((one - other).norm() / one.norm().clamp(min=1e-30)) for one, other in pairs)
    states = get_peft_model_state_dict(local.model), get_peft_model_state_dict(remote.model)
    row.are_keys_equal = list(states[0]) == list(states[1]) and local.gradients.keys() == remote.gradients.keys()
    logits = _logits(local.model), _logits(remote.model)
    there = _reloaded(remote.model, _local(folder), scratch / "remote")
    back = _reloaded(local.model, swarm.load(), scratch / "local")
    row.logits = (_difference(there, logits[1]), _difference(back, logits[0]))
    row.is_greedy_equal = torch.equal(generated(local.model), generated(remote.model))
    row.is_beam_equal = torch.equal(generated(local.model, num_beams=3), generated(remote.model, num_beams=3))
    return row


def _local(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    return model


def _trained(model: PreTrainedModel, config: PeftConfig, is_deep: bool) -> _Trained:
    """Three AdamW steps from random adapters."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, copy.deepcopy(config))
    if is_deep:
        add_deep_prompts(model)
    with torch.no_grad():
        for parameter in trainable(peft_model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # one matrix of LoRA begins with zeros
    optimizer = torch.optim.AdamW(trainable(peft_model).values(), lr=1e-2)
    trained = _Trained(peft_model, [], {})
    tokens = prompt()
    peft_model.train()
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        with same_dropout(peft_model, seed=step):
            loss = peft_model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        trained.losses.append(loss.item())
        if step == 0:
            trained.gradients = {name: parameter.grad.clone() for name, parameter in trainable(peft_model).items()}
        optimizer.step()
    peft_model.eval()
    return trained


def trainable(model: nn.Module) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prompt(rows: int = 2, num_tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, num_tokens), generator=torch.Generator().manual_seed(3))


def _reloaded(trained: PeftModel, other: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Logits of ``other`` with the adapter that ``trained`` saved."""
    trained.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(other, folder).eval()
    if deep_prompts(trained):
        add_deep_prompts(other)
        with torch.no_grad():
            for own, given in zip(deep_prompts(loaded), deep_prompts(trained), strict=True):
                own.copy_(given)
    return _logits(loaded)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=prompt(num_tokens=7)).logits
    return logits


def generated(model: Any, **options: Any) -> torch.Tensor:
    tokens = prompt(num_tokens=5)
    output: torch.Tensor = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, **options
    )
    return output


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def run(families: Sequence[str], methods: Sequence[str], dtype: torch.dtype) -> Rows:
    """All cells, and a line for each on the way."""
    rows: dict[tuple[str, str], Row | None] = {}
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            folder = save_family(Path(name) / "model", family, dtype)
            with InlineSwarm(folder, SPANS) as swarm:
                for method in methods:
                    row = rows[family, method] = compare(folder, swarm, family, method, Path(name) / method)
                    print(f"{family:10} {method:22} {_name(dtype):9} {_cell(row, dtype)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    whole = run(options.family, options.method, torch.float32)
    half = run([name for name in LOW_PRECISION if name in options.family], options.method, torch.bfloat16)
    print(f"{time.perf_counter() - began_s:.0f} s")
    if options.output is not None:
        options.output.write_text(table(whole, half))


_HEAD = """# Adapters on remote blocks

Written by `python benchmarks/adapters.py --output docs/adapters.md`; `tests/peft_models` runs part of it.

Each cell trains one adapter with peft for {steps} AdamW steps on a tiny random model (fp32, {blocks} blocks), once with
all blocks in this process and once with the blocks on {peers} peers (`{spans}`), and compares:

| what | how |
|---|---|
| losses | of all steps, equal to the last bit |
| gradients | of all adapter parameters in the first step: largest difference ≤ {limit:g} |
| keys | of `get_peft_model_state_dict`, and the names of all trained parameters |
| round trip | `save_pretrained` of the remote model, `from_pretrained` on a local one: equal logits; and the reverse |
| generation | greedy, and three beams: equal tokens |

**exact**: all of it, with a gradient difference of 0.0. **–**: the method has nothing to adapt there. "LoRA dropout"
gives the local model the masks that a peer draws from the request's seed. "LoRA head, embeddings" and "modules_to_save"
train head and embeddings at the client beside LoRA in the blocks. "deep prompts" are `DeepPrompts` in all blocks
together with prompt tuning, against hooks on local blocks. The linear layers of gpt2 are transposed, which peft adapts
with some methods only; Falcon's blocks share one key head, for which peft makes too many. Versions: torch {torch},
transformers {transformers}, peft {peft}.
"""


_HALF = """## bfloat16

The same with weights and hidden states in bfloat16, and adapters of the dtype that peft gives them. A cell is the
largest norm of the difference of one tensor's gradient in the first step, relative to that of the gradient; **exact**
is a difference of 0.0.
"""


def table(whole: Rows, half: Rows) -> str:
    """As Markdown."""
    notes: list[str] = []
    lines = [_HEAD.format(**_facts()), *_lines(whole, torch.float32, notes)]
    found = [row for row in whole.values() if row is not None]
    num_right = sum(row.is_right and not row.local_error for row in found)
    largest = max(row.gradient for row in found)
    lines += ["", f"{num_right} of {len(found)} cells are right; the largest gradient difference is {largest:g}.", ""]
    if half:
        lines += [_HALF, *_lines(half, torch.bfloat16, notes), ""]
    numbered = [f"{number}. {text}" for number, text in enumerate(notes, 1)]
    return "\n".join([*lines, *numbered]).rstrip() + "\n"


def _lines(rows: Rows, dtype: torch.dtype, notes: list[str]) -> list[str]:
    families = list(dict.fromkeys(family for family, _ in rows))
    methods = list(dict.fromkeys(method for _, method in rows))
    lines = [f"| | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for family in families:
        cells = []
        for method in methods:
            row = rows[family, method]
            if row is not None and (row.local_error or row.remote_error):
                text = f"{family}, {method}: {_cell(row, dtype)}"
                if text not in notes:
                    notes.append(text)
                cells.append(f"{'fails locally' if row.is_right else 'WRONG'} ({notes.index(text) + 1})")
            else:
                cells.append(_cell(row, dtype))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _facts() -> dict[str, Any]:
    facts = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    spans = "`, `".join(SPANS)
    return {
        "steps": NUM_STEPS,
        "blocks": NUM_BLOCKS,
        "peers": len(SPANS),
        "spans": spans,
        "limit": MAX_DIFFERENCE,
        **facts,
    }


def _cell(row: Row | None, dtype: torch.dtype) -> str:
    if row is None:
        return "–"
    if row.local_error and row.remote_error:
        remotely = "the same" if row.remote_error == row.local_error else row.remote_error
        return f"fails locally: {row.local_error} (remotely: {remotely})"
    if row.remote_error or row.local_error:
        return f"WRONG: local '{row.local_error}' remote '{row.remote_error}'"
    if dtype != torch.float32:
        text = "exact" if row.relative == 0.0 else f"{row.relative:.1e}"
        return text if row.relative <= MAX_RELATIVE else f"WRONG {text}"
    return "exact" if row.is_right and row.gradient == 0.0 else ("right" if row.is_right else f"WRONG {row}")


if __name__ == "__main__":
    main()
