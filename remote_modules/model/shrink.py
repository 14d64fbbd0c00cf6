"""Tiny random models of any architecture of transformers, for tests and for the self-test of an architecture.

`shrunk` rewrites a config as its JSON would be rewritten: sizes become small by the name of the field (`RULES`), and
whatever decides the structure stays (number and types of blocks, sharing, ties, flags, scales, rope types).
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from remote_modules.errors import CheckpointError, first_line
from remote_modules.model.stack import causal_lm_class

__all__ = ["shrunk", "tiny_config", "tiny_model"]

HIDDEN = 64
NARROW, WIDE = HIDDEN // 2, HIDDEN * 2  # for widths that differ from the hidden size
HEADS = 4
HEAD_DIM = 16
ROPE_HEAD_DIM = 8  # of the rotated part, where a head has one
VOCABULARY = 128
POSITIONS = 128
WINDOW = 5
EXPERTS = 4
TOWER_BLOCKS = 2  # of vision and audio towers: the decoder alone keeps its depth
WEIGHT_STD = 0.15
BIAS_STD = 0.1
TINY_BLOCKS = range(4, 7)

Fields = MutableMapping[str, Any]
Rule = Callable[[Any, "Old"], Any]


class Old:
    """The config before, as rules see it: the fields beside the one at hand, then those of the configs around it.

    Attributes:
        tokens: new special token ids by old ones, one map for the whole config so that equal ids stay equal.
    """

    def __init__(self, *fields: Mapping[str, Any], tokens: dict[int, int]) -> None:
        self.fields = fields
        self.tokens = tokens

    def inside(self, fields: Mapping[str, Any]) -> Old:
        return Old(fields, *self.fields, tokens=self.tokens)

    def first(self, names: Iterable[str]) -> int:
        """The first of ``names`` that is set to a number, of the innermost config that has one; 0 without any."""
        for fields in self.fields:
            for name in names:
                if isinstance(fields.get(name), int):
                    return int(fields[name])
        return 0


HIDDEN_NAMES = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embed_dim", "dim")
HEADS_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")


def at_most(limit: int) -> Rule:
    return lambda value, old: min(value, limit)


def width(value: int, old: Old) -> int:
    hidden = old.first(HIDDEN_NAMES)
    return HIDDEN if value == hidden or not hidden else WIDE if value > hidden else NARROW


def heads(value: int, old: Old) -> int:
    return HEADS if value >= HEADS - 1 else value


def fewer_heads(*others: str) -> Rule:
    """One, some or all of the heads that ``others`` count."""

    def rule(value: int, old: Old) -> int:
        return 1 if value == 1 else HEADS if value >= old.first(others) else HEADS // 2

    return rule


def head_dim(value: int, old: Old) -> int:
    if value == old.first(["qk_rope_head_dim"]):
        return ROPE_HEAD_DIM
    if old.first(["expand"]):  # mamba2 has no heads of attention
        return ssm_head_dim(value, old)
    nope = old.first(["qk_nope_head_dim"])
    return HEAD_DIM + ROPE_HEAD_DIM if nope and value == nope + old.first(["qk_rope_head_dim"]) else HEAD_DIM


def ssm_head_dim(value: int, old: Old) -> int:
    """State space heads fill the expanded width."""
    expanded = WIDE if old.first(["mamba_d_ssm"]) else HIDDEN * (old.first(["mamba_expand", "expand"]) or 2)
    return expanded // HEADS


def wide_head_dim(value: int, old: Old) -> int:
    return HEAD_DIM * (2 if value * old.first(HEADS_NAMES) > old.first(HIDDEN_NAMES) else 1)


def global_head_dim(value: int, old: Old) -> int:
    return HEAD_DIM * 2 if value > old.first(["head_dim"]) else HEAD_DIM


def expert_groups(value: int, old: Old) -> int:
    return min(value, EXPERTS // 2)


def chosen_groups(value: int, old: Old) -> int:
    return 1 if value < old.first(["n_group", "num_expert_group", "n_groups"]) else min(value, EXPERTS // 2)


def positions(value: int, old: Old) -> int:
    return min(value, POSITIONS)


def original_positions(value: int, old: Old) -> int:
    longest = old.first(["max_position_embeddings"])
    return min(value, POSITIONS // 2 if longest > value else POSITIONS)


def token(value: int, old: Old) -> int:
    """Ids outside the vocabulary move to its end; those inside stay."""
    return value if value < VOCABULARY // 2 else old.tokens.setdefault(value, VOCABULARY - 1 - len(old.tokens))


def zero(value: float, old: Old) -> float:
    return type(value)(0)


# By field name, the first that matches; what none matches stays. Rules see positive numbers, in lists one by one.
RULES: tuple[tuple[str, Rule], ...] = (
    (r".*(dropout|pdrop|layerdrop|drop_path|jitter).*", zero),
    (r"ngram_vocab_size_base|(type|task_type)_vocab_size", at_most(64)),
    (r"make_ngram_vocab_size_divisible_by", at_most(8)),
    (r".*vocab_size.*|.*vocab_offset|.*_vocab|codebook_size|num_centroids", at_most(VOCABULARY)),
    (r".*_token_ids?|.*_token_index|(bos|eos|pad|unk|mask)_index", token),
    # heads
    (r"swa_num_key_value_heads", fewer_heads("swa_num_attention_heads")),
    (r"num_(global_)?key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", fewer_heads(*HEADS_NAMES)),
    (r"linear_num_key_heads", fewer_heads("linear_num_value_heads")),
    (r"(indexer|index)_(n|kv)_heads", at_most(2)),
    (r".*(num|n|attention|mamba|linear)_(attention_|query_|value_)?heads(_per_layer)?|n_head|linear_num_heads", heads),
    (r"global_head_dim", global_head_dim),
    (r"qk_rope_head_dim|rotary_dim|swa_qk_rope_head_dim", at_most(ROPE_HEAD_DIM)),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", ssm_head_dim),
    (r"attention_head_dim", wide_head_dim),
    (r".*head_dim|d_head|dim_head|d_kv|attention_head_size", head_dim),
    # experts
    (r"(moe_)?(topk_group|topk_groups)", chosen_groups),
    (r"n_group|num_expert_group", expert_groups),
    (r"num_experts_per_tok(en)?|.*moe_k|.*moe_topk|.*moe_top_k|top_k_experts|n_activated_experts", at_most(2)),
    (r".*num_shared_experts|n_shared_experts|zero_expert_num", at_most(2)),
    (r".*(num|n|routed|local)_experts", at_most(EXPERTS)),
    # widths
    (r"(moe|shared|expert).*(intermediate|ffn|hidden).*|.*_latent_size", at_most(NARROW)),
    (r".*intermediate_size.*|.*ffn_(dim|hidden|hidden_size)|dff|d_ff|n_inner|dim_ff|d_inner|.*mlp_dim", at_most(96)),
    (r"feed_forward_size", at_most(96)),
    (r"hidden_size_per_layer_input|conv_dim|.*_embed_dim", at_most(HEAD_DIM)),
    (r"(.*out_hidden|backbone_hidden|cross_attention_hidden|.*projection|proj)_(size|dim)", at_most(HIDDEN)),
    (r".*hidden_size(_global)?|.*embedding_size|" + "|".join(HIDDEN_NAMES), width),
    (r"word_embed_proj_dim|lru_width|dim_model_base|projector_.*_dim|adapter_(in|out)_dim|.*hidden_dimension", width),
    (r".*(_lora_rank|_rank|_lowrank)", at_most(HEAD_DIM)),
    # states and windows
    (r"mamba_d_ssm", at_most(WIDE)),
    (r"mamba_dt_rank|time_step_rank", at_most(4)),
    (r".*state_size|mamba_d_state", at_most(8)),
    (r".*mamba_ngroups|mamba_n_groups|n_groups|o_groups", at_most(2)),
    (r".*chunk_size|.*chunk_length|.*block_multiple_of|.*block_size|heavily_compressed_attention", at_most(8)),
    (r".*sliding_window|.*sliding_window_size|attention_window_size|attention_chunk_size|local_attention", at_most(5)),
    (r"index_topk|indexer_budget", at_most(8)),
    (r"index_topk_blocks", at_most(2)),
    # positions
    (r"original_max_position_embeddings", original_positions),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*context_length|max_(source|target)_positions", positions),
    # towers
    (r".*_channels?", at_most(NARROW)),
    (r"image_size", at_most(16)),
    (r"patch_size", at_most(4)),
    (r"mm_tokens_per_image", at_most(4)),
)

COUNT_NAMES = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "n_layer", "n_layers", "num_layers", "depth")
BLOCK_COUNTS = r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks|depth"
PREFIX_COUNTS = r"first_k_dense_.*|num_dense_layers|max_window_layers|.*layer_index_start|.*layer_index_end"
SUFFIX_COUNTS = r"num_kv_shared_layers"
BLOCK_IDS = r".*layer_ids|.*(layers|layer|attn)_(ind(ic|ex)es|idxs)|mlp_only_layers|cross_attention_layers|.*_indexes"


# Constructor arguments of types whose defaults make no model, or lose their structure in a few blocks.
TINY_FIELDS: Mapping[str, Mapping[str, Any]] = {
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
    wanted = len(set(kinds(fields))) if "layer_types" in fields else 0
    small = shrunk(config, num_blocks=min(max(wanted, TINY_BLOCKS[0]), TINY_BLOCKS[-1]))
    return rebuilt(type(small), small.to_dict() | changes, small._attn_implementation) if changes else small


def tiny_model(
    config: PreTrainedConfig, *, seed: int = 0, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """A model of ``config``, float32 on the CPU, in eval mode, whose errors show.

    Matrices are normal with std 0.15; vectors (norms, biases) are as the architecture initializes them, plus normal
    noise of std 0.1, so that none are alike. The same seed gives the same weights; the global generator stays as it is.

    Args:
        cls: the class to build; None takes the causal language model of the config.

    Raises:
        UnsupportedCallError: no ``cls``, and the architecture is no causal language model of transformers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (cls or causal_lm_class(config))(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, WEIGHT_STD, generator=generator)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * BIAS_STD)
    return model.eval()


def rebuilt(cls: type[PreTrainedConfig], fields: Fields, attention: str | None) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = cls.from_dict(dict(fields))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as exc:
        raise CheckpointError(f"{cls.__name__} does not take the sizes of a tiny model: {first_line(exc)}") from exc
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


PLAIN = ("rope_parameters", "rope_scaling", "id2label", "label2id")  # mappings that are no configs


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
            small[name] = shrunk_value(rule_of(name), value, old)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(name), Mapping):
            small[name] = shrunk_rope(small[name], small, old)
    return small


def is_config(fields: Mapping[str, Any]) -> bool:
    return "model_type" in fields and block_count(fields) > 0


@cache
def rule_of(name: object) -> Rule | None:
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, str(name))), None)


def shrunk_value(rule: Rule | None, value: Any, old: Old) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(shrunk_value(rule, one, old) for one in value)
    if rule is None or isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return value
    if isinstance(value, float) and rule is not zero:
        return value
    return rule(value, old)


def shrunk_rope(rope: Mapping[str, Any], small: Mapping[str, Any], old: Old) -> dict[str, Any]:
    """Rope parameters, of one kind or by kind of layer, for heads of the small size; factors stay."""
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {
            name: shrunk_rope(value, small, old) if isinstance(value, Mapping) else value
            for name, value in rope.items()
        }
    sizes = Old(small, tokens={})
    dim = sizes.first(["qk_rope_head_dim", "head_dim"]) or sizes.first(HIDDEN_NAMES) // max(sizes.first(HEADS_NAMES), 1)
    half = int(dim * (rope.get("partial_rotary_factor") or small.get("partial_rotary_factor") or 1.0)) // 2
    changed = dict(rope)
    for name in ("short_factor", "long_factor"):
        if name in rope:
            changed[name] = [rope[name][index * len(rope[name]) // half] for index in range(half)]
    if rope.get("mrope_section"):
        changed["mrope_section"] = shares(rope["mrope_section"], half)
    if rope.get("original_max_position_embeddings"):
        changed["original_max_position_embeddings"] = original_positions(rope["original_max_position_embeddings"], old)
    return changed


def shares(parts: list[int], total: int) -> list[int]:
    """``parts`` scaled to the sum ``total``."""
    ends = [round(sum(parts[: index + 1]) * total / sum(parts)) for index in range(len(parts))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def block_count(fields: Mapping[str, Any]) -> int:
    """Blocks of a config; 0 where it has none of its own."""
    return Old(fields, tokens={}).first(COUNT_NAMES) or len(fields.get("layers_block_type", ()))


def per_block(fields: Mapping[str, Any], count: int) -> list[str]:
    """The names of the lists that have an entry for each block."""
    return [
        name
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count and rule_of(name) is not token
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
        repr((
            [values[index] for values in lists],
            [index in ids for ids in named],
            [index < end for end in ends],
            special.get(index),
        ))
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
    changed: dict[str, Any] = {name: count for name in matching(fields, BLOCK_COUNTS, int)}
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
    special = overrides(fields)
    if special:
        changed["per_layer_config"] = {place: special[index] for place, index in enumerate(kept) if index in special}
    return changed
