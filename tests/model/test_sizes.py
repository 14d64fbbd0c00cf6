"""Which small size a field gets, by its name and the fields beside it."""

from __future__ import annotations

from typing import Any

import pytest

from remote_modules.model.sizes import Old, is_token, small_rope, small_value

AROUND: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "n_group": 8,
}


def small(name: str, value: object, **fields: Any) -> object:
    return small_value(name, value, Old(AROUND | fields, tokens={}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_size", 4096, 64),
        ("attention_hidden_size", 8192, 128),
        ("embedding_size", 128, 32),
        ("num_attention_heads", 32, 4),
        ("num_attention_heads", 1, 1),
        ("num_key_value_heads", 32, 4),
        ("num_key_value_heads", 8, 2),
        ("num_key_value_heads", 1, 1),
        ("qk_head_dim", 192, 24),
        ("head_dim", 64, 8),
        ("v_head_dim", 128, 16),
        ("topk_group", 4, 1),
        ("topk_group", 8, 2),
        ("num_experts_per_tok", 1, 1),
        ("num_experts_per_tok", 8, 2),
        ("moe_intermediate_size", 2048, 32),
        ("intermediate_size", [16384, 8192], [96, 96]),
        ("sliding_window", 4096, 5),
        ("sliding_window", None, None),
        ("attention_dropout", 0.1, 0.0),
        ("num_hidden_layers", 126, 126),
        ("layer_types", ["full_attention"], ["full_attention"]),
        ("use_sliding_window", True, True),
        ("residual_multiplier", 0.22, 0.22),
        ("pad_token_id", -1, -1),
        ("eos_token_id", 2, 2),
        ("eos_token_id", [128001, 128008, 128001], [127, 126, 127]),
        ("original_max_position_embeddings", 4096, 64),
        ("original_max_position_embeddings", 131072, 128),
    ],
)
def test_size_by_name(name: str, value: object, expected: object) -> None:
    assert small(name, value) == expected


def test_inner_fields_hide_those_around() -> None:
    old = Old(AROUND, tokens={}).inside({"hidden_size": 1152})
    assert small_value("out_width", 1152, old) == 1152
    assert small_value("hidden_size", 1152, old) == 64
    assert small_value("num_key_value_heads", 32, old) == 4


def test_tokens_are_told_by_name() -> None:
    assert is_token("image_token_id")
    assert not is_token("vocab_size")


def test_rope_of_each_kind_of_layer() -> None:
    sizes = {"head_dim": 16}
    rope = {"full": {"rope_type": "default", "mrope_section": [24, 20, 20]}, "sliding": {"rope_type": "default"}}
    assert small_rope(rope, sizes, Old(AROUND, tokens={})) == {
        "full": {"rope_type": "default", "mrope_section": [3, 3, 2]},
        "sliding": {"rope_type": "default"},
    }
