from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, WORKING, tiny_config
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from remote_modules.errors import CheckpointError, UnsupportedCallError
from remote_modules.model.stack import (
    StackSpec,
    bind_owner_call,
    cache_argument,
    causal_lm_class,
    find_stack,
    meta_skeleton,
)

PATHS = {"gpt2": "transformer.h", "gptj": "transformer.h", "ctrl": "transformer.h", "opt": "model.decoder.layers"} | {
    "gpt_neox": "gpt_neox.layers"
}


@pytest.mark.parametrize("family", WORKING)
def test_family_has_its_blocks_found(family: str) -> None:
    config = tiny_config(family)
    stack = find_stack(meta_skeleton(causal_lm_class(config), config), config)
    assert stack == StackSpec(path=PATHS.get(family, "model.layers"), num_blocks=NUM_BLOCKS)


def test_skeleton_takes_no_memory() -> None:
    config = LlamaConfig(num_hidden_layers=2)  # 7B-sized blocks
    model = meta_skeleton(LlamaForCausalLM, config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_largest_list_of_the_right_length_is_the_stack() -> None:
    class TwoLists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Module()
            self.body.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
            self.body.large = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.body.long = nn.ModuleList([nn.Linear(64, 64) for _ in range(5)])

    assert find_stack(TwoLists(), LlamaConfig(num_hidden_layers=3)).path == "body.large"


def test_no_list_of_that_length_is_refused() -> None:
    model = meta_skeleton(LlamaForCausalLM, tiny_config())
    with pytest.raises(UnsupportedCallError, match=r"^no list of 7 blocks found in LlamaForCausalLM$"):
        find_stack(model, LlamaConfig(num_hidden_layers=7))


def test_owner_and_blocks_are_modules_of_the_model() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**tiny_config().to_dict()))
    stack = find_stack(model, model.config)
    assert stack.owner(model) is model.model
    assert stack.blocks(model) is model.model.layers


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.13.mlp.experts.2.w1.weight", 13),
        ("layers.3.norm.weight", 3),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("model.layers.weight", None),
        ("model.sublayers.3.weight", None),
        ("model.layers.3", None),
    ],
)
def test_key_belongs_to_its_block(key: str, block: int | None) -> None:
    assert StackSpec(path="model.layers", num_blocks=16).block_of_key(key) == block


def test_list_name_with_a_dot_free_path_is_escaped() -> None:
    assert StackSpec(path="transformer.h", num_blocks=2).block_of_key("transformer.h.1.attn.weight") == 1
    assert StackSpec(path="transformer.h", num_blocks=2).block_of_key("transformer.xh.1.attn.weight") is None


def test_type_without_causal_model_is_refused() -> None:
    with pytest.raises(UnsupportedCallError, match=r"^model type 'vit' has no causal language model in transformers$"):
        causal_lm_class(AutoConfig.for_model("vit"))


def test_config_that_builds_nothing_is_a_checkpoint_error() -> None:
    config = tiny_config()
    config.hidden_act = "no such function"
    with pytest.raises(CheckpointError, match=r"^config of type 'llama' builds no LlamaForCausalLM: ") as caught:
        meta_skeleton(LlamaForCausalLM, config)
    assert "\n" not in str(caught.value)


class Owner(nn.Module):
    config: PreTrainedConfig

    def forward(self, input_ids: torch.Tensor, *, past_key_values: object = None, **kwargs: object) -> None:
        pass


def test_cache_argument_goes_by_the_name_of_the_release() -> None:
    assert cache_argument(Owner()) == "past_key_values"


def test_owner_without_cache_is_refused() -> None:
    with pytest.raises(UnsupportedCallError, match=r"^Linear.forward takes no KV cache, expected one of "):
        cache_argument(nn.Linear(2, 2))


def test_owner_call_is_bound_by_name_with_its_extra_arguments() -> None:
    ids = torch.ones(1, 2)
    bound = bind_owner_call(Owner(), (ids,), {"use_cache": False, "attention_mask": None})
    assert bound == {"input_ids": ids, "use_cache": False, "attention_mask": None}
