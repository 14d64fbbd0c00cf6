"""What peft does on models with remote blocks, against the same on a local model: families x methods.

    python benchmarks/adapters.py [--family llama ...] [--method LoRA ...] [--output docs/adapters.md]

Each cell trains one adapter for three AdamW steps on a tiny random model in fp32, once with local blocks and once
with blocks on peers (several spans, one process), and compares losses, the gradients of the first step, the keys of
the adapter's state, the logits after `save_pretrained` into the other model (both ways), and generated tokens.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from remote_modules.errors import RemoteModulesError, first_line
from remote_modules.testing.inline_swarm import InlineSwarm

__all__ = ["FAMILIES", "METHODS", "Row", "compare", "save_family", "table"]

NUM_BLOCKS, VOCABULARY = 4, 96
SPANS = ("0:1", "1:3", "3:4")
MAX_DIFFERENCE = 1e-6
NUM_STEPS = 3
VIRTUAL = ("prompt tuning", "p-tuning", "prefix tuning")  # virtual tokens; no parameter in a block
_LORA: dict[str, dict[str, Any]] = {
    "LoRA q/v": {},
    "LoRA all-linear": {"target_modules": "all-linear"},
    "LoRA some layers": {"layers_to_transform": [1, 3]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA dropout": {"lora_dropout": 0.25},
}
METHODS = (*_LORA, "LoRA experts", "IA3", *VIRTUAL)

_SHORT: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1}
_SHORT |= {"eos_token_id": None}  # else a generation ends when it likes
_NO_GROUPS = _SHORT | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_BLOCKS}
_NO_GROUPS |= {"num_attention_heads": 4, "max_position_embeddings": 128}
_COMMON = _NO_GROUPS | {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        config: of the tiny model.
        query_value: layers that LoRA adapts.
        scaled, feedforward: layers that IA3 scales, and those of them whose input it scales.
        experts: fused parameters of experts.
    """

    config: Mapping[str, Any]
    query_value: tuple[str, ...] = ("q_proj", "v_proj")
    scaled: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)
    experts: tuple[str, ...] = ()


_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 128}
_QKV = ("query_key_value",)
_BLOOM = {"hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4}
_UP_DOWN = ("query_key_value", "dense_4h_to_h")

FAMILIES: dict[str, Family] = {
    "llama": Family(_COMMON),
    "qwen3": Family(_COMMON),
    "gemma2": Family(
        _COMMON | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)}
    ),
    "phi3": Family(_COMMON, ("qkv_proj",), ("qkv_proj", "down_proj")),
    "mixtral": Family(_COMMON | _EXPERTS, scaled=("k_proj", "v_proj"), feedforward=(), experts=_FUSED),
    "qwen3_moe": Family(_COMMON | _EXPERTS, scaled=("k_proj", "v_proj"), feedforward=(), experts=_FUSED),
    "gpt2": Family(_SHORT | _GPT2 | _NO_DROPOUT, ("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_neox": Family(_NO_GROUPS, _QKV, _UP_DOWN, ("dense_4h_to_h",)),
    "bloom": Family(_SHORT | _BLOOM, _QKV, _UP_DOWN, ("dense_4h_to_h",)),
    "falcon": Family(_NO_GROUPS, _QKV, _UP_DOWN, ("dense_4h_to_h",)),
}


def save_family(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random checkpoint of ``family`` into ``folder`` and return it."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family].config, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: else all alike
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def method_config(family: str, method: str) -> PeftConfig | None:
    """What to give `get_peft_model`; None where the method has nothing to adapt."""
    known = FAMILIES[family]
    kind: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    if method in VIRTUAL:
        options = {**kind, "num_virtual_tokens": 4}
        if method == "prompt tuning":
            return PromptTuningConfig(**options)
        if method == "p-tuning":
            return PromptEncoderConfig(**options, encoder_hidden_size=16)
        return PrefixTuningConfig(**options)
    if method == "IA3":
        return IA3Config(**kind, target_modules=list(known.scaled), feedforward_modules=list(known.feedforward))
    if method == "LoRA experts":
        if not known.experts:
            return None
        return LoraConfig(**kind, r=2, target_modules=[], target_parameters=list(known.experts))
    return LoraConfig(**{**kind, "r": 4, "lora_alpha": 8, "target_modules": list(known.query_value), **_LORA[method]})


@dataclass(slots=True)
class Row:
    """One cell of the table.

    Attributes:
        losses: of the steps, local and remote.
        gradient: largest difference in the first step.
        logits: largest difference after the adapter was saved by one model and loaded by the other: remote to local,
            local to remote.
        local_error: why the method does not work on the local model, with the installed peft.
    """

    losses: tuple[list[float], list[float]] = ([], [])
    gradient: float = 0.0
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
    try:
        local = _trained(_local(folder), config)
    except RuntimeError as exc:
        row.local_error = first_line(exc)
    try:
        remote = _trained(swarm.load(), config)
    except (RuntimeError, RemoteModulesError) as exc:
        row.remote_error = first_line(exc)
    if row.local_error or row.remote_error:
        return row
    row.losses = (local.losses, remote.losses)
    row.gradient = max(_difference(grad, remote.gradients[name]) for name, grad in local.gradients.items())
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


def _trained(model: PreTrainedModel, config: PeftConfig) -> _Trained:
    """Three AdamW steps from random adapters."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, copy.deepcopy(config))
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


class _SameDropout(nn.Dropout):
    """Draws the mask that a peer draws for the same layer."""

    def __init__(self, p: float, path: str, seed: int) -> None:
        super().__init__(p)
        digest = hashlib.sha256(f"{seed} {path} 0".encode()).digest()
        self.generator_seed = int.from_bytes(digest[:7], "little")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(self.generator_seed)) >= self.p
        return x * keep / (1.0 - self.p)


_BLOCK_PATH = re.compile(r"\.(\d+)\.(.+)")  # the first number in a name is the block's


@contextmanager
def same_dropout(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Inside, the dropouts of local LoRA layers draw the masks that peers draw."""
    kept: list[tuple[nn.ModuleDict, str, nn.Module]] = []
    for path, layer in model.named_modules():
        for name, dropout in dict(getattr(layer, "lora_dropout", {})).items():
            match = _BLOCK_PATH.search(path)
            if isinstance(dropout, nn.Dropout) and dropout.training and match is not None:
                kept.append((layer.lora_dropout, name, dropout))
                layer.lora_dropout[name] = _SameDropout(dropout.p, f"{match[1]} {match[2]}", seed)
    with patch("remote_modules.client.adapters.secrets.randbits", return_value=seed):
        yield
    for place, name, dropout in kept:
        place[name] = dropout


def _reloaded(trained: PeftModel, other: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Logits of ``other`` with the adapter that ``trained`` saved."""
    trained.save_pretrained(str(folder))
    return _logits(PeftModel.from_pretrained(other, folder).eval())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], Row | None] = {}
    began_s = time.perf_counter()
    for family in options.family:
        with tempfile.TemporaryDirectory() as name:
            folder = save_family(Path(name) / "model", family)
            with InlineSwarm(folder, SPANS) as swarm:
                for method in options.method:
                    row = rows[family, method] = compare(folder, swarm, family, method, Path(name) / method)
                    print(f"{family:10} {method:16} {_cell(row)}", flush=True)
    print(f"{time.perf_counter() - began_s:.0f} s")
    if options.output is not None:
        options.output.write_text(table(rows))


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
gives the local model the masks that a peer draws from the request's seed. Falcon's blocks share one key head, for which
peft makes too many. Versions: torch {torch}, transformers {transformers}, peft {peft}.
"""


def table(rows: Mapping[tuple[str, str], Row | None]) -> str:
    """As Markdown."""
    families = list(dict.fromkeys(family for family, _ in rows))
    methods = list(dict.fromkeys(method for _, method in rows))
    notes: list[str] = []
    lines = [_HEAD.format(**_facts()), f"| | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for family in families:
        cells = []
        for method in methods:
            row = rows[family, method]
            if row is not None and (row.local_error or row.remote_error):
                notes.append(f"{len(notes) + 1}. {family}, {method}: {_cell(row)}")
                cells.append(f"{'fails locally' if row.is_right else 'WRONG'} ({len(notes)})")
            else:
                cells.append(_cell(row))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    found = [row for row in rows.values() if row is not None]
    num_right = sum(row.is_right and not row.local_error for row in found)
    largest = max(row.gradient for row in found)
    lines += ["", f"{num_right} of {len(found)} cells are right; the largest gradient difference is {largest:g}.", ""]
    return "\n".join([*lines, *notes]).rstrip() + "\n"


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


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.local_error and row.remote_error:
        return f"fails locally: {row.local_error} (remotely: {row.remote_error})"
    if row.remote_error or row.local_error:
        return f"WRONG: local '{row.local_error}' remote '{row.remote_error}'"
    return "exact" if row.is_right and row.gradient == 0.0 else ("right" if row.is_right else f"WRONG {row}")


if __name__ == "__main__":
    main()
