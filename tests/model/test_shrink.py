"""Tiny models keep the structure of the config that they come from, build, and run."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from remote_modules.errors import CheckpointError
from remote_modules.model.shrink import shrunk, tiny_config, tiny_model

# What the oldest supported releases do not have, or cannot run themselves.
IS_RECENT = "kimi_linear" in CONFIG_MAPPING
RECENT = ("qwen4_exp", "deepseek_v4", "kimi_linear", "granitemoehybrid", "dbrx", "zamba", "nemotron_h", "dots3_note")
FAMILIES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "mixtral"),
    *("gemma", "gemma2", "gemma3", "gemma3n_text", "gemma4", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe", "longcat_flash", "llama4_text", "minimax", "phi", "phi3"),
    *("falcon", "falcon_h1", "bloom", "mpt", "opt", "gpt2", "gptj", "gpt_neo", "gpt_neox", "bert", "bart", "ctrl"),
    *("mamba", "mamba2", "jamba", "bamba", "zamba2", "lfm2_moe", "rwkv", "xlstm"),
    *(RECENT if IS_RECENT else ()),
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * index for index in range(48)],
    "long_factor": [1.0 + index for index in range(48)],
}
ZAMBA2_HYBRID = [6, 11, *range(17, 78, 6)]


def sizes(hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# Published sizes; what is left out is the default of the type.
BIG: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-405B": (
        "llama",
        sizes(16384, 53248, 126, 128, 8)
        | {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_parameters": LLAMA3}
        | {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        sizes(7168, 18432, 61, 128, 128)
        | {"vocab_size": 129280, "max_position_embeddings": 163840, "rope_parameters": YARN}
        | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    "Mixtral-8x22B": ("mixtral", sizes(6144, 16384, 56, 48, 8) | {"vocab_size": 32768, "sliding_window": None}),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        sizes(4096, 12288, 94, 64, 4) | {"head_dim": 128, "num_experts": 128, "moe_intermediate_size": 1536},
    ),
    "Qwen3-Next-80B-A3B": ("qwen3_next", sizes(2048, 5120, 48, 16, 2) | {"head_dim": 256, "num_experts": 512}),
    "Gemma-3-27B": (
        "gemma3",
        {
            "text_config": sizes(5376, 21504, 62, 32, 16) | {"sliding_window": 1024, "query_pre_attn_scalar": 168},
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14},
        },
    ),
    "Gemma-3n-E4B": (
        "gemma3n_text",
        sizes(2048, 16384, 35, 8, 2)
        | {"num_kv_shared_layers": 15, "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25},
    ),
    "gpt-oss-120b": ("gpt_oss", sizes(2880, 2880, 36, 64, 8) | {"quantization_config": {"quant_method": "mxfp4"}}),
    "Falcon-180B": (
        "falcon",
        {"hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232, "num_kv_heads": 8}
        | {"new_decoder_architecture": True, "bias": False},
    ),
    "BLOOM-176B": ("bloom", {"vocab_size": 250880, "hidden_size": 14336, "n_layer": 70, "n_head": 112}),
    "Phi-3-mini-128k": (
        "phi3",
        sizes(3072, 8192, 32, 32, 32)
        | {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_parameters": LONG_ROPE},
    ),
    "Kimi-Linear-48B-A3B": ("kimi_linear", {"num_hidden_layers": 27}),
    "Jamba-1.5-Mini": ("jamba", sizes(4096, 14336, 32, 32, 8)),
    "Zamba2-7B": (
        "zamba2",
        sizes(3584, 14336, 81, 32, 32)
        | {"hybrid_layer_ids": ZAMBA2_HYBRID, "num_mem_blocks": 2, "mamba_ngroups": 2}
        | {"layers_block_type": ["hybrid" if index in ZAMBA2_HYBRID else "mamba" for index in range(81)]},
    ),
    "Mamba2-2.7B": ("mamba2", {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "n_groups": 1}),
}
for recent in () if IS_RECENT else ("Kimi-Linear-48B-A3B", "Zamba2-7B"):
    del BIG[recent]
PROMPT = torch.tensor([[0, 0, 3, 9, 17, 5, 44], [6, 7, 8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
STRUCTURE = ("layer_types", "layers_block_type", "mlp_layer_types", "tie_word_embeddings", "num_kv_shared_layers")


def big_config(name: str) -> PreTrainedConfig:
    model_type, fields = BIG[name]
    return AutoConfig.for_model(model_type, **fields)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=PROMPT, attention_mask=MASK).logits
    return logits


def num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def decoder_of(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tiny_model_of_a_family_runs(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    assert num_parameters(model) < 1_000_000
    logits = logits_of(model)
    assert logits.shape == (2, 7, 128)
    assert torch.isfinite(logits[1]).all()
    assert logits[1].std(dim=-1).min() > 1e-3  # positions and tokens can be told apart


@pytest.mark.parametrize("name", BIG)
def test_big_model_keeps_its_structure_and_runs(name: str) -> None:
    config = big_config(name)
    before = config.to_dict()
    started = time.perf_counter()
    small = shrunk(config)
    model = tiny_model(small)
    logits = logits_of(model)
    elapsed_s = time.perf_counter() - started
    assert config.to_dict() == before
    for field in ("num_hidden_layers", *STRUCTURE):
        assert getattr(decoder_of(small), field, None) == getattr(decoder_of(config), field, None), field
    assert torch.isfinite(logits[1]).all()
    assert num_parameters(model) < 6_000_000
    assert elapsed_s < 10  # about 0.5 on an idle core; the probe pays it at every start of a client


def test_sizes_keep_their_relations() -> None:
    llama, deepseek, falcon = (shrunk(big_config(name)) for name in ("Llama-3.1-405B", "DeepSeek-V3", "Falcon-180B"))
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim, llama.hidden_size) == (4, 2, 16, 64)
    assert (deepseek.num_attention_heads, deepseek.num_key_value_heads, deepseek.head_dim) == (4, 4, 8)
    assert (deepseek.n_routed_experts, deepseek.n_group, deepseek.topk_group, deepseek.num_experts_per_tok) == (
        *(4, 2, 1, 2),
    )
    assert deepseek.first_k_dense_replace == 3
    assert not hasattr(deepseek, "quantization_config")
    assert (falcon.num_attention_heads, falcon.num_kv_heads, falcon.new_decoder_architecture) == (4, 2, True)


def test_rope_keeps_its_type_and_factors() -> None:
    llama = shrunk(big_config("Llama-3.1-405B"))
    assert llama.rope_parameters == LLAMA3 | {"original_max_position_embeddings": 64}
    assert llama.max_position_embeddings == 128
    phi3 = shrunk(big_config("Phi-3-mini-128k"))
    assert phi3.rope_parameters["long_factor"] == [1.0 + index for index in range(0, 48, 6)]
    assert len(phi3.rope_parameters["short_factor"]) == 8
    assert tiny_config("qwen2_vl").text_config.rope_parameters["mrope_section"] == [2, 3, 3]


def test_equal_tokens_stay_equal_and_enter_the_vocabulary() -> None:
    config = big_config("Llama-3.1-405B")
    config.pad_token_id = 128001
    small = shrunk(config)
    assert small.bos_token_id not in small.eos_token_id
    assert small.pad_token_id == small.eos_token_id[0]
    assert len({small.bos_token_id, *small.eos_token_id}) == 4
    assert all(64 <= token < 128 for token in (small.bos_token_id, *small.eos_token_id))


def test_fewer_blocks_keep_all_kinds() -> None:
    small = shrunk(big_config("Gemma-3n-E4B"), num_blocks=6)
    assert small.num_hidden_layers == 6
    assert small.num_kv_shared_layers == 2
    assert small.layer_types == ["sliding_attention", "full_attention"] * 3
    assert small.activation_sparsity_pattern == [0.95, 0.95, 0.0, 0.0, 0.0, 0.0]
    assert small.intermediate_size == [96] * 6
    deepseek = shrunk(big_config("DeepSeek-V3"), num_blocks=4)
    assert 0 < deepseek.first_k_dense_replace < 4
    assert logits_of(tiny_model(small)).shape == (2, 7, 128)


def test_more_blocks_repeat_the_old() -> None:
    small = shrunk(tiny_config("gemma2"), num_blocks=7)
    assert small.layer_types == [*["sliding_attention", "full_attention"] * 3, "sliding_attention"]
    assert logits_of(tiny_model(small)).shape == (2, 7, 128)


def test_towers_become_shallow_and_the_decoder_stays_deep() -> None:
    small = shrunk(big_config("Gemma-3-27B"))
    assert small.vision_config.num_hidden_layers == 2
    assert small.text_config.num_hidden_layers == 62


def test_shrinking_again_changes_nothing() -> None:
    for name in BIG:
        small = shrunk(big_config(name))
        assert shrunk(small).to_dict() == small.to_dict(), name


def test_weights_depend_on_the_seed_alone() -> None:
    config = tiny_config("qwen2")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = tiny_model(config, seed=1), tiny_model(config, seed=1), tiny_model(config, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name
        assert parameter.dtype == torch.float32
        assert parameter.std() > 0.05, name  # norms and biases too


@pytest.mark.parametrize("model_type", ["llama", "bert", "qwen3", "gpt2", "t5"])
@pytest.mark.parametrize(
    "auto_class",
    [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering],
    ids=["sequence", "token", "answer"],
)
def test_other_heads_build(model_type: str, auto_class: Any) -> None:
    config = tiny_config(model_type)
    cls = auto_class._model_mapping[type(config)]
    assert type(tiny_model(config, cls=cls)) is cls


def test_changes_are_fields_of_the_small_config() -> None:
    config = tiny_config("mistral", sliding_window=3, num_key_value_heads=1)
    assert (config.sliding_window, config.num_key_value_heads, config.num_hidden_layers) == (3, 1, 4)


def test_unknown_type_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="expected a model type of transformers, got 'nothing'"):
        tiny_config("nothing")


def test_sizes_that_a_type_refuses_are_an_error() -> None:
    with pytest.raises(
        CheckpointError, match=r"LlamaConfig does not take .*: The hidden size \(64\) is not a multiple"
    ):
        tiny_config("llama", num_attention_heads=5)
