from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, WORKING, tiny_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedConfig

from remote_modules.errors import CheckpointError, UnsupportedCallError
from remote_modules.model.classes import model_class
from remote_modules.model.stack import (
    SideInput,
    StackSpec,
    bind_owner_call,
    cache_argument,
    find_stack,
    input_argument,
    meta_skeleton,
    takes_argument,
)
from remote_modules.model.tensors import TensorSpec
from remote_modules.spans import Span

PATHS = {
    **dict.fromkeys(("gpt2", "gptj", "ctrl", "bloom", "falcon"), "transformer.h"),
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "mamba": "backbone.layers",
    "bert": "bert.encoder.layer",
}


@pytest.mark.parametrize("family", WORKING)
def test_family_has_its_blocks_found(family: str) -> None:
    cls, config = model_class(tiny_config(family))
    stack = find_stack(meta_skeleton(cls, config), config)
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
    model = nn.ModuleDict({"body": nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])})
    with pytest.raises(UnsupportedCallError, match=r"^no list of 7 blocks found in ModuleDict$"):
        find_stack(model, LlamaConfig(num_hidden_layers=7))


def test_list_of_the_decoder_is_the_stack_whatever_the_config_counts() -> None:
    model = meta_skeleton(LlamaForCausalLM, tiny_config())
    assert find_stack(model, LlamaConfig(num_hidden_layers=7)) == StackSpec("model.layers", NUM_BLOCKS)


def test_owner_and_blocks_are_modules_of_the_model() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**tiny_config().to_dict()))
    stack = find_stack(model, model.config)
    assert stack.owner(model) is model.model
    assert stack.blocks(model) is model.model.layers


KEYS = {
    "model.layers.0.mlp.up_proj.weight": 0,
    "model.layers.1.mlp.experts.2.w1.weight": 1,
    "model.layers.15.norm.weight": 15,
    "model.embed_tokens.weight": None,
    "model.norm.weight": None,
    "lm_head.weight": None,
    "model.layers.weight": None,
    "model.sublayers.3.weight": None,
    "model.layers.3": None,
}


@pytest.mark.parametrize("prefix", ["", "language_model.", "base."])
def test_key_belongs_to_its_block(prefix: str) -> None:
    keys = {prefix + key: block for key, block in KEYS.items()}
    expected = {key: block for key, block in keys.items() if block is not None}
    assert StackSpec(path="model.layers", num_blocks=16).blocks_of_keys(keys) == expected


def test_keys_of_a_base_model_belong_to_blocks_without_its_name() -> None:
    stack = StackSpec(path="transformer.h", num_blocks=2)
    assert stack.blocks_of_keys(["h.0.attn.weight", "h.1.attn.weight", "wte.weight"]) == {
        "h.0.attn.weight": 0,
        "h.1.attn.weight": 1,
    }


def test_keys_of_other_towers_do_not_count() -> None:
    blocks = [f"model.language_model.layers.{index}.up.weight" for index in range(2)]
    others = [f"model.vision_tower.encoder.layers.{index}.{name}.weight" for index in range(2) for name in ("a", "b")]
    stack = StackSpec(path="model.language_model.layers", num_blocks=2)
    assert stack.blocks_of_keys([*others, *blocks]) == {blocks[0]: 0, blocks[1]: 1}


def test_numbers_beyond_the_last_block_are_of_something_else() -> None:
    stack = StackSpec(path="model.layers", num_blocks=2)
    assert stack.blocks_of_keys(["experts.7.weight"]) == {}
    assert stack.blocks_of_keys([]) == {}


# What crosses from block to block


def two_tensors() -> StackSpec:
    specs = {1: TensorSpec(("B", "T", "?"), is_float=False)}
    return StackSpec("model.layers", 4, container=tuple, arity=3, states=specs, state_keys={1: "chosen"})


def test_output_is_taken_apart_and_put_together_again() -> None:
    stack, hidden, chosen = two_tensors(), torch.ones(2, 3, 8), torch.ones(2, 3, 1, dtype=torch.int64)
    assert list(stack.carried) == ["hidden_states", "state.1"]
    named = stack.unpack((hidden, chosen, None))
    assert named == {"hidden_states": hidden, "state.1": chosen}
    packed = stack.pack(named)
    assert packed[0] is hidden
    assert packed[1] is chosen
    assert packed[2] is None
    assert type(packed) is tuple


def test_state_may_be_absent() -> None:
    hidden = torch.ones(2, 3, 8)
    assert list(two_tensors().unpack((hidden, None, "attention"))) == ["hidden_states"]


def test_bare_tensor_goes_as_it_is() -> None:
    stack, hidden = StackSpec("model.layers", 4), torch.ones(2, 3, 8)
    assert stack.unpack(hidden) == {"hidden_states": hidden}
    assert stack.pack({"hidden_states": hidden}) is hidden


@pytest.mark.parametrize(
    ("stack", "output", "reason"),
    [
        (StackSpec("model.layers", 4), (torch.ones(1),), r"^a block returned a tuple, expected one tensor$"),
        (two_tensors(), torch.ones(1), r"^a block returned a Tensor, expected a tuple of 3$"),
        (two_tensors(), (torch.ones(1),) * 2, r"^a block returned a tuple, expected a tuple of 3$"),
        (two_tensors(), (torch.ones(1), "text", None), r"^a block returned a tuple, expected a tuple of 3$"),
        (two_tensors(), (None, torch.ones(1), None), r"^a block returned a tuple, expected a tuple of 3$"),
    ],
    ids=["tuple", "tensor", "short", "text", "none"],
)
def test_other_output_is_refused(stack: StackSpec, output: Any, reason: str) -> None:
    with pytest.raises(UnsupportedCallError, match=reason):
        stack.unpack(output)


def test_side_inputs_have_a_name_for_each_block_where_they_differ() -> None:
    spec = TensorSpec(("B", "T", "?"))
    stack = StackSpec("model.layers", 4, sides=(SideInput(2, True, spec), SideInput("ids", False, spec)))
    assert list(stack.side_specs(Span(1, 3))) == ["side.2.1", "side.ids", "side.2.2"]


def test_blocks_without_a_map_fill_the_layers_of_their_numbers() -> None:
    assert StackSpec("model.layers", 4).layers_of(Span(1, 3)) == (1, 2)
    assert StackSpec("model.layers", 3, cache_map=((0, 1), (), (2,))).layers_of(Span(0, 2)) == (0, 1)


def test_span_may_only_end_at_a_cut() -> None:
    stack = StackSpec("model.layers", 6, cuts=frozenset([0, 1, 2, 6]))
    for span in ("0:1", "1:2", "2:6", "0:6"):
        stack.check_cuts(Span.parse(span))
    with pytest.raises(UnsupportedCallError, match=r"across block 3; spans may begin and end at 0\.\.2, 6$"):
        stack.check_cuts(Span(2, 3))
    StackSpec("model.layers", 6).check_cuts(Span(2, 3))


def test_blocks_of_the_decoder_come_before_larger_ones() -> None:
    class Body(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(3)])

    class TwoStacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.decoder = Body(64), Body(2)

        def get_decoder(self) -> nn.Module:
            return self.decoder

    assert find_stack(TwoStacks(), LlamaConfig(num_hidden_layers=3)).path == "decoder.layers"


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


def test_owner_without_cache_has_no_name_for_it() -> None:
    assert cache_argument(nn.Linear(2, 2)) is None


def test_owner_that_takes_no_hidden_states_is_refused() -> None:
    with pytest.raises(UnsupportedCallError, match=r"^Linear.forward takes none of \('inputs_embeds', 'hidden_states'"):
        input_argument(nn.Linear(2, 2))
    assert input_argument(LlamaModel(LlamaConfig(**tiny_config().to_dict()))) == "inputs_embeds"


@pytest.mark.parametrize("name", ["input_ids", "past_key_values", "anything"])
def test_owner_with_further_arguments_takes_any(name: str) -> None:
    assert takes_argument(Owner(), name)


def test_owner_without_them_takes_its_own() -> None:
    assert takes_argument(nn.Linear(2, 2), "input")
    assert not takes_argument(nn.Linear(2, 2), "use_cache")


def test_owner_call_is_bound_by_name_with_its_extra_arguments() -> None:
    ids = torch.ones(1, 2)
    bound = bind_owner_call(Owner(), (ids,), {"use_cache": False, "attention_mask": None})
    assert bound == {"input_ids": ids, "use_cache": False, "attention_mask": None}
