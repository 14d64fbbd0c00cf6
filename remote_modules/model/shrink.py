"""Tiny random models of any architecture of transformers, for tests and for the self-test of an architecture.

A config is rewritten as its JSON would be: sizes become small by the name of the field (`model.sizes`), and whatever
decides the structure stays: number and types of blocks, sharing, ties, flags, scales, rope types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from remote_modules.errors import CheckpointError, first_line
from remote_modules.model.building import building
from remote_modules.model.classes import model_class
from remote_modules.model.sizes import PLAIN, Old, is_token, small_rope, small_value

__all__ = ["shrunk", "tiny_config", "tiny_model"]

TOWER_BLOCKS = 2  # of vision and audio towers: the decoder alone keeps its depth
TINY_BLOCKS = range(4, 7)
SHALLOW = 8  # models this deep stay as deep
WEIGHT_STD = 0.15
BIAS_STD = 0.1

Fields = MutableMapping[str, Any]

COUNT_NAMES = (
    "num_layers_per_stack",
    "num_hidden_layers",
    "decoder_layers",
    "num_decoder_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
)
BLOCK_COUNTS = (
    r"num_hidden_layers|(n|num|encoder|decoder|num_encoder|num_decoder)_layers?|num_blocks|depth|num_layers_per_stack"
)
PREFIX_COUNTS = r"first_k_dense_.*|num_dense_layers|max_window_layers|.*layer_index_start|.*layer_index_end"
SUFFIX_COUNTS = r"num_kv_shared_layers"
BLOCK_IDS = r".*layer_ids|.*(layers|layer|attn)_(ind(ic|ex)es|idxs)|mlp_only_layers|cross_attention_layers|.*_indexes"

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "full_attention"] * 2
_QWEN4 = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
    "split_ngram_parts": 1,
    "heads_per_ngram": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [16, 24, 24]}}
_GLM_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [8, 12, 12]}}
# Constructor arguments of types whose defaults build no model, or lose a kind of block when few blocks stay.
TINY_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "num_hidden_layers": 4,
        "layer_types": _MIXED,
        "sliding_window": 5,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "rope_parameters": _ROPE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "glm46v": {"text_config": _GLM_MROPE},
    "glm4v": {"text_config": _GLM_MROPE},
    "glm4v_moe": {"text_config": _GLM_MROPE},
    "glm_ocr": {"text_config": _GLM_MROPE},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": _HYBRID},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "inkling2_loop_text": {
        "num_hidden_layers": 6,
        "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "num_hidden_layers": 4,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds_dim": (16, 48),
        "axial_pos_shape": (8, 16),
    },
    "xmod": {"default_language": "en_XX"},
}


def shrunk(config: PreTrainedConfig, *, num_blocks: int | None = None) -> PreTrainedConfig:
    """A copy of ``config`` with small sizes and the same structure; ``config`` itself stays as it is.

    Args:
        num_blocks: depth of the decoder; None keeps it. Blocks are left out so that all kinds of blocks stay.

    Raises:
        CheckpointError: the class of the config does not take the small sizes.
    """
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    path = decoder_path(config)
    if num_blocks is not None:
        decoder = nested(fields, path)
        decoder.update(with_blocks(decoder, num_blocks))
    return rebuilt(type(config), shrunk_fields(fields, Old(tokens={}), path), config._attn_implementation)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default config of a type, shrunk to 4 blocks, or to as many as show all its kinds of blocks, at most 6.

    Args:
        changes: fields of the shrunk config.

    Raises:
        CheckpointError: transformers does not know the type, or the type does not take the fields.
    """
    try:
        config = AutoConfig.for_model(model_type, **TINY_FIELDS.get(model_type, {}))
    except ValueError as exc:
        raise CheckpointError(f"expected a model type of transformers, got '{model_type}': {first_line(exc)}") from exc
    fields = nested(config.to_dict(), decoder_path(config))
    num_blocks = block_count(fields)
    if num_blocks > SHALLOW:
        num_blocks = min(max(len(set(kinds(fields))), TINY_BLOCKS[0]), TINY_BLOCKS[-1])
    small = shrunk(config, num_blocks=num_blocks)
    given: dict[str, Any] = {"is_decoder": True} if fields.get("is_decoder") is False else {}
    if small.to_dict().get("pad_token_id", 0) is None:
        given["pad_token_id"] = 0
    return changed(small, given | changes)


def tiny_model(config: PreTrainedConfig, *, seed: int = 0, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model of ``config``, float32 on the CPU, in eval mode, whose errors show.

    Matrices are normal with std 0.15; vectors (norms, biases) are as the architecture initializes them, plus normal
    noise of std 0.1, so that none are alike. The same seed gives the same weights; the global generator stays as it is.

    Args:
        cls: the class to build; None takes the causal language model of the config.

    Raises:
        UnsupportedCallError: no ``cls``, and the architecture is no causal language model of transformers.
    """
    if cls is None:
        cls, config = model_class(config)
    with building, torch.random.fork_rng(devices=[]):  # the generator is the process's own, too
        torch.manual_seed(seed)
        model: PreTrainedModel = cls(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, WEIGHT_STD, generator=generator)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * BIAS_STD)
    model.eval()
    return model


def changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    return rebuilt(type(config), config.to_dict() | dict(changes), config._attn_implementation) if changes else config


def rebuilt(cls: type[PreTrainedConfig], fields: Fields, attention: str | None) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = cls.from_dict(dict(fields))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as exc:
        reason = first_line(exc.__cause__ or exc)
        raise CheckpointError(f"{cls.__name__} does not take the sizes of a tiny model: {reason}") from exc
    config._attn_implementation = attention
    return config


def decoder_path(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names that lead from a config to that of its decoder: ``("text_config",)``, or none."""
    text = config.get_text_config(decoder=True)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            if value is text:
                return (name, *decoder_path(value))
            if value.get_text_config(decoder=True) is text:
                return (name, *decoder_path(value))
    return ()


def nested(fields: Fields, path: tuple[str, ...]) -> Fields:
    for name in path:
        fields = fields[name]
    return fields


def shrunk_fields(fields: Mapping[str, Any], around: Old, path: tuple[str, ...] | None) -> dict[str, Any]:
    """The fields of one config, or of a part of one, made small.

    Args:
        path: leads from here to the decoder; None where the decoder is elsewhere, so that this is a tower.
    """
    if path is None and block_count(fields) > TOWER_BLOCKS:
        fields = dict(fields) | with_blocks(fields, TOWER_BLOCKS)
    old = around.inside(fields)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and name not in PLAIN:
            inner = path[1:] if path and path[0] == name else None if is_config(value) else ()
            small[name] = shrunk_fields(value, old, inner)
        else:
            small[name] = small_value(name, value, old)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(name), Mapping):
            small[name] = small_rope(small[name], small, old)
    return small


def is_config(fields: Mapping[str, Any]) -> bool:
    return "model_type" in fields and block_count(fields) > 0


def block_count(fields: Mapping[str, Any]) -> int:
    """Blocks of a config; 0 where it has none of its own."""
    return Old(fields, tokens={}).first(COUNT_NAMES) or len(fields.get("layers_block_type", ()))


def per_block(fields: Mapping[str, Any], count: int) -> list[str]:
    """The names of the lists that have an entry for each block."""
    return [
        name
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count and not is_token(name)
    ]


def matching(fields: Mapping[str, Any], pattern: str, kind: type) -> list[str]:
    return [name for name, value in fields.items() if isinstance(value, kind) and re.fullmatch(pattern, name)]


def overrides(fields: Mapping[str, Any]) -> dict[int, Any]:
    return {int(index): values for index, values in (fields.get("per_layer_config") or {}).items()}


def kinds(fields: Mapping[str, Any]) -> list[str]:
    """What tells each block apart from the others."""
    count = block_count(fields)
    lists = [fields[name] for name in per_block(fields, count)]
    named = [fields[name] for name in matching(fields, BLOCK_IDS, list)]
    ends = [fields[name] for name in matching(fields, PREFIX_COUNTS, int)]
    ends += [count - fields[name] for name in matching(fields, SUFFIX_COUNTS, int)]
    special = overrides(fields)
    return [
        repr(
            (
                [values[index] for values in lists],
                [index in ids for ids in named],
                [index < end for end in ends],
                special.get(index),
            )
        )
        for index in range(count)
    ]


def kept_blocks(fields: Mapping[str, Any], count: int) -> list[int]:
    """Which ``count`` blocks stay: the first of each kind, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for index, kind in enumerate(kinds(fields)):
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], index))
    return sorted(index for _, index in sorted(ranked)[:count])


def with_blocks(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields that change when only ``count`` of the blocks stay."""
    before = block_count(fields)
    if before in (0, count):
        return {}
    kept = kept_blocks(fields, count)
    changed: dict[str, Any] = dict.fromkeys(matching(fields, BLOCK_COUNTS, int), count)
    if len(kept) < count:  # a deeper model than before: repeat the blocks in order
        kept = [index % before for index in range(count)]
    for name in per_block(fields, before):
        changed[name] = type(fields[name])(fields[name][index] for index in kept)
    for name in matching(fields, BLOCK_IDS, list):
        if len(fields[name]) != before:
            changed[name] = [place for place, index in enumerate(kept) if index in fields[name]]
    for name in matching(fields, PREFIX_COUNTS, int):
        changed[name] = sum(index < fields[name] for index in kept)
    for name in matching(fields, SUFFIX_COUNTS, int):
        changed[name] = sum(index >= before - fields[name] for index in kept)
    if "num_layers_per_stack" in fields:  # each of them counts once for each pass through the stack
        changed["num_hidden_layers"] = fields["num_hidden_layers"] // before * count
    special = overrides(fields)
    if special:
        changed["per_layer_config"] = {place: special[index] for place, index in enumerate(kept) if index in special}
    return changed
