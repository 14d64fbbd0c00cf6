"""What `benchmarks/adapters.py` compares: tiny models of some families, and a configuration of each method for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

__all__ = [
    "DEEP",
    "FAMILIES",
    "METHODS",
    "NUM_BLOCKS",
    "NUM_VIRTUAL",
    "VIRTUAL",
    "VOCABULARY",
    "method_config",
    "save_family",
]

NUM_BLOCKS, VOCABULARY = 4, 96
NUM_VIRTUAL = 4  # tokens of a prompt
DEEP = "deep prompts"
VIRTUAL = ("prompt tuning", "p-tuning", "prefix tuning", DEEP)  # virtual tokens; no parameter of peft in a block
_OTHERS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "LoHa": (LoHaConfig, {"r": 4, "alpha": 6}),
    "LoKr": (LoKrConfig, {"r": 2, "alpha": 3}),
    "OFT": (OFTConfig, {"r": 0, "oft_block_size": 8}),
}
_LORA: dict[str, dict[str, Any]] = {
    "LoRA q/v": {},
    "LoRA all-linear": {"target_modules": "all-linear"},
    "LoRA some layers": {"layers_to_transform": [1, 3]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA dropout": {"lora_dropout": 0.25},
}
_BESIDE = ("LoRA head, embeddings", "modules_to_save")  # adapters in the blocks, and of what is at the client
METHODS = (*_LORA, "LoRA experts", *_BESIDE, "IA3", *_OTHERS, *VIRTUAL)

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
        beside: head and embeddings.
    """

    config: Mapping[str, Any]
    query_value: tuple[str, ...] = ("q_proj", "v_proj")
    scaled: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)
    experts: tuple[str, ...] = ()
    beside: tuple[str, str] = ("lm_head", "embed_tokens")


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
    "gpt2": Family(
        _SHORT | _GPT2 | _NO_DROPOUT,
        ("c_attn",),
        ("c_attn", "mlp.c_proj"),
        ("mlp.c_proj",),
        beside=("lm_head", "wte"),
    ),
    "gpt_neox": Family(_NO_GROUPS, _QKV, _UP_DOWN, ("dense_4h_to_h",), beside=("embed_out", "embed_in")),
    "bloom": Family(_SHORT | _BLOOM, _QKV, _UP_DOWN, ("dense_4h_to_h",), beside=("lm_head", "word_embeddings")),
    "falcon": Family(_NO_GROUPS, _QKV, _UP_DOWN, ("dense_4h_to_h",), beside=("lm_head", "word_embeddings")),
}


def save_family(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random checkpoint of ``family`` into ``folder`` and return it."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family].config, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: else all alike
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def method_config(family: str, method: str) -> PeftConfig | None:
    """What to give `get_peft_model`; None where the method has nothing to adapt."""
    known = FAMILIES[family]
    kind: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    if method in VIRTUAL:
        options = {**kind, "num_virtual_tokens": NUM_VIRTUAL}
        if method in ("prompt tuning", DEEP):
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
    targets = list(known.query_value)
    if method in _OTHERS:
        make, options = _OTHERS[method]
        return make(**{**kind, **options, "target_modules": targets})
    if method == "modules_to_save":
        return LoraConfig(**kind, r=4, target_modules=targets, modules_to_save=list(known.beside))
    if method == "LoRA head, embeddings":
        return LoraConfig(**kind, r=4, target_modules=[*targets, *known.beside])
    return LoraConfig(**{**kind, "r": 4, "lora_alpha": 8, "target_modules": targets, **_LORA[method]})
