"""Tiny random checkpoints of real architectures, saved as a user would have them on disk.

Hidden size 32, four blocks, sliding windows of 5 tokens; weights wide enough (std 0.15) that a wrong mask, position or
block shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

__all__ = ["NUM_BLOCKS", "WORKING", "load_whole", "save_tiny", "tiny_config"]

NUM_BLOCKS = 4
VOCABULARY = 96
SHARD_SIZE = "40KB"  # about one block

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": NUM_BLOCKS,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
_OPT = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15}

# Of each kind of attention, mask, cache, position, expert and head that replay has to get right, at least one.
WORKING: Mapping[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": 5},
    "qwen2": _COMMON | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": _COMMON,
    "gemma": _COMMON,
    "gemma2": _COMMON | {"sliding_window": 5, "layer_types": _MIXED},
    "gemma3_text": _COMMON | {"sliding_window": 5, "layer_types": _MIXED},
    "phi": _COMMON,
    "phi3": _COMMON | {"sliding_window": 5},
    "olmo2": _COMMON,
    "granite": _COMMON | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "stablelm": _COMMON,
    "starcoder2": _COMMON | {"sliding_window": 5},
    "glm4": _COMMON,
    "cohere2": _COMMON | {"sliding_window": 5, "layer_types": _MIXED},
    "smollm3": _COMMON,
    "mixtral": _COMMON | _EXPERTS,
    "qwen3_moe": _COMMON | _EXPERTS,
    "gpt_oss": _COMMON
    | _EXPERTS
    | {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": {key: value for key, value in _COMMON.items() if key != "head_dim"}
    | _EXPERTS
    | _MLA
    | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "llama4_text": _COMMON
    | {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 6},
    "gpt_neox": _COMMON,
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "opt": _COMMON | _OPT,
    "ctrl": _GPT | {"dff": 48},  # scales its embeddings in place
    # Blocks that return tuples, states of linear attention, owners that take hidden states, inputs for each block.
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4},
    "falcon": {key: value for key, value in _COMMON.items() if key != "head_dim"},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": NUM_BLOCKS, "state_size": 4},
    "bert": _COMMON | {"is_decoder": True},
    "gemma3n_text": _COMMON
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    }
    | {"layer_types": _MIXED, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * NUM_BLOCKS}
    | {"intermediate_size": [48] * NUM_BLOCKS},
}


def tiny_config(family: str = "llama", **changes: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(family, **(WORKING[family] | changes))
    return config


def save_tiny(
    folder: Path, family: str = "llama", *, seed: int = 0, shard_size: str = SHARD_SIZE, **changes: Any
) -> Path:
    """Write a random checkpoint into ``folder`` and return it.

    Args:
        shard_size: as `save_pretrained` takes it; the default gives several files.
        changes: config fields.
    """
    transformers_logging.disable_progress_bar()
    config = tiny_config(family, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: else all alike
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def load_whole(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The whole model as stock transformers loads it: the oracle."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    model.eval()
    return model
