"""Small sizes for the fields of a config, by their names.

Everything that is not named in `RULES` stays, so that the structure does. Sizes keep their relations: equal widths stay
equal, heads divide, a key-value head is shared by as many, or by all, and chosen experts exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

__all__ = ["HEADS_NAMES", "HIDDEN_NAMES", "PLAIN", "Old", "is_token", "small_rope", "small_value"]

HIDDEN = 64
NARROW, WIDE = HIDDEN // 2, HIDDEN * 2  # for widths that differ from the hidden size
HEADS = 4
HEAD_DIM = 16
ROPE_HEAD_DIM = 8  # of the rotated part, where a head has one
VOCABULARY = 128
POSITIONS = 128
WINDOW = 5
EXPERTS = 4

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
    if old.first(["ffn_round_up_to_multiple_of"]):  # xlstm rounds half of the width up to 64
        return WIDE
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
    rotated, plain = old.first(["qk_rope_head_dim"]), old.first(["qk_nope_head_dim"])
    if value == rotated:
        return min(value, ROPE_HEAD_DIM)
    if old.first(["expand"]):  # mamba2 has no heads of attention
        return ssm_head_dim(value, old)
    return min(plain, HEAD_DIM) + min(rotated, ROPE_HEAD_DIM) if plain else HEAD_DIM


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
    (r"(qk_|swa_)?head_dim", head_dim),
    (r".*head_dim|d_head|dim_head|d_kv|attention_head_size", at_most(HEAD_DIM)),
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
    (
        r"(.*out_hidden|backbone_hidden|text_hidden|adapter_in|adapter_input|adapter_out|cross_attention_hidden|.*projection|proj)_(size|dim)",
        at_most(HIDDEN),
    ),
    (r".*hidden_size(_global)?|.*embedding_size|" + "|".join(HIDDEN_NAMES), width),
    (r"word_embed_proj_dim|lru_width|dim_model_base|projector_.*_dim|.*hidden_dimension", width),
    (r".*(_lora_rank|_rank|_lowrank)", at_most(HEAD_DIM)),
    # states and windows
    (r"mamba_d_ssm", at_most(WIDE)),
    (r"mamba_dt_rank|time_step_rank", at_most(4)),
    (r".*state_size|mamba_d_state", at_most(8)),
    (r".*mamba_ngroups|mamba_n_groups|n_groups|o_groups", at_most(2)),
    (r".*chunk_size|.*chunk_length|.*block_multiple_of|.*block_size|heavily_compressed_attention", at_most(8)),
    (
        r".*sliding_window|.*sliding_window_size|attention_window_size|attention_chunk_size|local_attention",
        at_most(WINDOW),
    ),
    (r"index_topk|index_kpool|indexer_budget", at_most(8)),
    (r"index_topk_blocks", at_most(2)),
    # positions
    (r"original_max_position_embeddings", original_positions),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*context_length|max_(source|target)_positions",
        positions,
    ),
    # towers
    (r".*_channels?", at_most(NARROW)),
    (r"image_size", at_most(16)),
    (r"patch_size", at_most(4)),
    (r"mm_tokens_per_image", at_most(4)),
)

PLAIN = ("rope_parameters", "rope_scaling", "id2label", "label2id")  # mappings that are no configs


@cache
def rule_of(name: object) -> Rule | None:
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, str(name))), None)


def is_token(name: object) -> bool:
    return rule_of(name) is token


def small_value(name: object, value: Any, old: Old) -> Any:
    """The value of the field ``name`` in a small config; lists entry by entry."""
    if isinstance(value, list | tuple):
        return type(value)(small_value(name, one, old) for one in value)
    rule = rule_of(name)
    if rule is None or isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return value
    return rule(value, old) if isinstance(value, int) or rule is zero else value


def small_rope(rope: Mapping[str, Any], small: Mapping[str, Any], old: Old) -> dict[str, Any]:
    """Rope parameters, of one kind or by kind of layer, for heads of the small size; factors stay."""
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {
            name: small_rope(value, small, old) if isinstance(value, Mapping) else value for name, value in rope.items()
        }
    sizes = Old(small, tokens={})
    dim = sizes.first(["head_dim"]) or sizes.first(HIDDEN_NAMES) // max(sizes.first(HEADS_NAMES), 1)
    rotated = sizes.first(["qk_rope_head_dim"])
    share = rope.get("partial_rotary_factor") or small.get("partial_rotary_factor") or 1.0
    half = (rotated or int(dim * share)) // 2
    changed = dict(rope)
    if rotated and rope.get("partial_rotary_factor", 1.0) < 1.0:
        changed["partial_rotary_factor"] = rotated / dim
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
