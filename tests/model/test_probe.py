"""What is learned about an architecture by watching a tiny model, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from remote_modules.errors import CheckpointError, UnsupportedCallError
from remote_modules.model.classes import model_class, serving_class
from remote_modules.model.probe import probe_stack, tiny_twin
from remote_modules.model.shrink import tiny_config
from remote_modules.model.stack import StackSpec
from remote_modules.model.tensors import TensorSpec

BARE = TensorSpec(("B", "T", "1H"))


def probed(family: str, **changes: Any) -> StackSpec:
    cls, config = serving_class(tiny_config(family, **changes))
    return probe_stack(cls, config)


def all_cuts(stack: StackSpec) -> frozenset[int]:
    return frozenset(range(stack.num_blocks + 1))


def test_plain_stack_has_nothing_but_hidden_states_and_one_layer_for_each_block() -> None:
    stack = probed("llama")
    assert stack.carried == {"hidden_states": BARE}
    assert (stack.container, stack.arity, stack.sides, stack.owner_tensors) == (None, 0, (), {})
    assert (stack.cache_map, stack.num_layers, stack.cache_class) == (((0,), (1,), (2,), (3,)), 4, None)
    assert (stack.is_croppable, stack.replays_steps, stack.no_cache) == (True, False, "")
    assert stack.cuts == all_cuts(stack)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_blocks_that_return_tuples_carry_their_hidden_states_alone(family: str) -> None:
    stack = probed(family)
    assert stack.container is tuple
    assert stack.arity >= 1
    assert stack.carried == {"hidden_states": BARE}


class Choosing(nn.Module):
    """A block that hands what it chose to the next one, as some do with the tokens that they attend to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor | None = None) -> Any:
        if chosen is None:
            chosen = hidden_states.topk(3).indices
        picked = hidden_states.gather(-1, chosen).sum(-1, keepdim=True)
        return hidden_states + self.up(hidden_states) * picked, chosen, None


class ChoosingModel(LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([Choosing(config.hidden_size) for _ in range(config.num_hidden_layers)])

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        chosen = None
        for block in self.layers:
            hidden_states, chosen, _ = block(hidden_states, chosen=chosen)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


class ChoosingForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = ChoosingModel(config)


def test_state_that_the_next_block_takes_is_carried() -> None:
    stack = probe_stack(ChoosingForCausalLM, tiny_config("llama"))
    assert (stack.container, stack.arity) == (tuple, 3)
    assert list(stack.carried) == ["hidden_states", "state.1"]
    assert stack.carried["state.1"] == TensorSpec(("B", "T", "?"), is_float=False, is_exact=False)
    assert stack.state_keys == {1: "chosen"}
    assert stack.no_cache == "ChoosingModel takes no KV cache"


def test_state_of_a_real_architecture_is_of_rows_and_tokens() -> None:
    stack = probed("glm_moe_dsa")
    assert set(stack.state_keys.values()) <= {"prev_topk_indices"}  # handed over in another way in older releases
    for spec in stack.states.values():
        assert (spec.dims[:2], spec.is_float) == (("B", "T"), False)


def test_embeddings_of_each_block_are_side_inputs() -> None:
    stack = probed("gemma3n_text")
    (side,) = stack.sides
    assert side.is_per_block
    assert side.spec.dims == ("B", "T", "?")
    assert side.spec.is_float
    assert stack.hidden.dims[-3:] == ("B", "T", "1H")
    assert stack.hidden.batch == 1, "several streams of hidden states"


@pytest.mark.parametrize(("num_shared", "cuts"), [(0, {0, 1, 2, 3, 4}), (2, {0, 4})])
def test_no_cut_where_later_blocks_look_for_keys_of_earlier_ones(num_shared: int, cuts: set[int]) -> None:
    """Four blocks of two kinds in turn: each kind has its keys put aside by its last block that has any."""
    cls, config = model_class(tiny_models.tiny_config("gemma3n_text", num_kv_shared_layers=num_shared))
    stack = probe_stack(cls, config)
    assert stack.cuts == cuts
    assert stack.cache_map == tuple((block,) if block < 4 - num_shared else () for block in range(4))


def test_cuts_lie_before_the_first_block_whose_keys_are_shared() -> None:
    types = ["sliding_attention", "full_attention"] * 3
    cls, config = model_class(
        tiny_models.tiny_config(
            "gemma3n_text",
            num_hidden_layers=6,
            layer_types=types,
            num_kv_shared_layers=2,
            intermediate_size=[48] * 6,
            activation_sparsity_pattern=[0.0] * 6,
        )
    )
    assert probe_stack(cls, config).cuts == {0, 1, 2, 6}


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_states_of_linear_attention_cannot_be_cropped(family: str) -> None:
    stack = probed(family)
    assert not stack.is_croppable
    assert stack.no_cache == ""
    assert stack.cache_map == ((0,), (1,), (2,), (3,))


def test_time_may_come_first() -> None:
    assert probed("xlnet").hidden == TensorSpec(("T", "B", "1H"))


@pytest.mark.parametrize(
    ("family", "reason"), [("xlnet", "XLNetModel takes no KV cache"), ("rwkv", "RwkvModel takes no KV cache")]
)
def test_why_there_is_no_cache_is_said(family: str, reason: str) -> None:
    stack = probed(family)
    assert stack.no_cache == reason
    assert stack.cache_map == ()


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, False),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, True),
    ],
)
def test_rotary_tables_that_follow_the_length_are_seen(rope: dict[str, Any], expected: bool) -> None:
    assert probed("llama", rope_parameters=rope).replays_steps is expected


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("reformer", r"its blocks return a ReformerOutput$"),
        ("xlm", r"it changes hidden states between blocks 0 and 1$"),
    ],
)
def test_architecture_that_does_more_between_blocks_is_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedCallError, match=rf"^architecture '{family}' is not carried: {reason}") as caught:
        probed(family)
    assert "\n" not in str(caught.value)


def test_blocks_that_run_twice_are_refused() -> None:
    def looped(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.layers[1].register_forward_hook(again)
        return super(type(self), self).forward(*args, **kwargs)

    def again(block: Any, args: Any, output: Any) -> None:
        block._forward_hooks.popitem()
        block(output, **seen[-1])

    seen: list[dict[str, Any]] = []
    cls = looping_class(looped, seen)
    with pytest.raises(
        UnsupportedCallError, match=r"^architecture 'llama' is not carried: its blocks run in the order \[0, 1, 1, 2"
    ):
        probe_stack(cls, tiny_config("llama"))


def looping_class(looped: Any, seen: list[dict[str, Any]]) -> Any:
    """A llama whose second block runs twice, as in architectures that loop."""

    class LoopingForCausalLM(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            inner = type(self.model)
            self.model.__class__ = type("LoopingModel", (inner,), {"forward": looped})
            self.model.layers[1].register_forward_pre_hook(
                lambda block, args, kwargs: seen.append(kwargs), with_kwargs=True
            )

    return LoopingForCausalLM


def test_config_that_builds_nothing_is_a_checkpoint_error() -> None:
    config = tiny_config("llama")
    config.hidden_act = "no such function"
    with pytest.raises(CheckpointError, match=r"^config of type 'llama' builds no LlamaForCausalLM: ") as caught:
        probe_stack(LlamaForCausalLM, config)
    assert "\n" not in str(caught.value)


# One probe for all sizes and for each class


def test_real_size_is_probed_as_fast_as_a_tiny_one_and_its_random_state_is_left() -> None:
    before = torch.get_rng_state()
    stack = probe_stack(LlamaForCausalLM, LlamaConfig())
    assert stack.num_blocks == LlamaConfig().num_hidden_layers
    assert stack.hidden == BARE
    assert torch.equal(torch.get_rng_state(), before)


def test_same_class_and_config_are_probed_once() -> None:
    cls, config = serving_class(tiny_config("llama"))
    assert probe_stack(cls, config) is probe_stack(cls, tiny_config("llama"))
    other = probe_stack(cls, tiny_config("llama", num_hidden_layers=3))
    assert other.num_blocks == 3


def test_head_of_another_task_has_the_same_blocks() -> None:
    cls, config = model_class(tiny_config("llama"), AutoModelForSequenceClassification)
    stack = probe_stack(cls, config)
    assert stack.carried == probed("llama").carried
    assert stack.cache_map == probed("llama").cache_map


def test_twin_has_the_structure_of_the_config_and_small_sizes() -> None:
    twin = tiny_twin(LlamaForCausalLM, LlamaConfig(num_hidden_layers=5, tie_word_embeddings=True))
    assert type(twin) is LlamaForCausalLM
    assert len(twin.model.layers) == 5
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in twin.parameters()) < 1_000_000
