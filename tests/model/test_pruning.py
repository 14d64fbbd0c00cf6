from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import NUM_BLOCKS, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from remote_modules.model.classes import model_class
from remote_modules.model.pruning import UnknownArgument, kept_tensors, passed_on, prune, pruned_class
from remote_modules.model.shadow import is_shadow
from remote_modules.model.stack import StackSpec, find_stack, meta_skeleton


def skeleton(family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, StackSpec]:
    cls, config = model_class(tiny_config(family, **changes))
    model = meta_skeleton(cls, config)
    return model, find_stack(model, config)


def is_second(block: int | None) -> bool:
    return block == 1


def is_around(block: int | None) -> bool:
    return block is None


def held(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_span_keeps_its_blocks_alone() -> None:
    model, stack = skeleton()
    names = {name for name in held(model) if name.startswith("model.layers.1.")}
    prune(model, stack, is_second)
    assert held(model) == names
    assert [is_shadow(block) for block in stack.blocks(model)] == [True, False, True, True]
    assert is_shadow(model.get_submodule("model.embed_tokens"))
    assert is_shadow(model.get_submodule("model.norm"))
    assert is_shadow(model.get_submodule("lm_head"))
    assert not is_shadow(model.get_submodule("model.rotary_emb")), "it has no weights"


def test_client_keeps_all_but_the_blocks() -> None:
    model, stack = skeleton()
    prune(model, stack, is_around)
    assert held(model) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(map(is_shadow, stack.blocks(model)))


def test_shadows_have_the_attributes_of_what_they_stand_for() -> None:
    model, stack = skeleton("gemma2")
    real = [block.self_attn.sliding_window for block in stack.blocks(model)]  # type: ignore[union-attr]
    prune(model, stack, is_second)
    blocks: Any = stack.blocks(model)
    assert [block.self_attn.sliding_window for block in blocks] == real == [5, None, 5, None]


def test_pruning_twice_changes_nothing() -> None:
    model, stack = skeleton()
    prune(model, stack, is_second)
    once = list(stack.blocks(model))
    prune(model, stack, is_second)
    assert list(stack.blocks(model)) == once


def test_class_prunes_what_it_builds_and_keeps_its_name() -> None:
    model, stack = skeleton()
    cls: Any = pruned_class(type(model), stack, is_second)
    assert (cls.__name__, cls.__module__) == ("LlamaForCausalLM", type(model).__module__)
    with torch.device("meta"):
        built = cls(tiny_config())
    assert {name.split(".")[2] for name in held(built)} == {"1"}


def test_class_takes_no_unknown_argument() -> None:
    model, stack = skeleton()
    cls: Any = pruned_class(type(model), stack, is_second)
    with pytest.raises(UnknownArgument, match=r"^unexpected keyword arguments \['nonsense'\]; "):
        cls(tiny_config(), nonsense=1)


@pytest.mark.parametrize("is_tied", [False, True])
def test_ties_are_only_those_between_what_is_held(is_tied: bool) -> None:
    model, stack = skeleton(tie_word_embeddings=is_tied)
    client = copy.deepcopy(model)
    prune(model, stack, is_second)
    assert model.all_tied_weights_keys == {}
    prune(client, stack, is_around)
    assert client.all_tied_weights_keys == ({"lm_head.weight": "model.embed_tokens.weight"} if is_tied else {})


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", set()), ("opt", {"model.decoder.embed_positions.weight"}), ("gpt2", set())]
)
def test_tables_of_positions_are_kept_by_every_span(family: str, expected: set[str]) -> None:
    model, stack = skeleton(family)
    assert kept_tensors(model, stack, is_second) == expected


class Tied(nn.Module):
    """Blocks that share one weight: each holds a copy of its own once they are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)])
        shared = self.body.layers[0][1].weight  # type: ignore[index]
        for block in self.body.layers[1:]:
            block[1].weight = shared  # type: ignore[index]
        self.all_tied_weights_keys = {f"body.layers.{block}.1.weight": "body.layers.0.1.weight" for block in (1, 2)}


def test_weight_that_a_held_block_shares_is_kept_where_it_is() -> None:
    model: Any = Tied()
    stack = StackSpec("body.layers", 3)
    expected = model.body.layers[0][1].weight
    prune(model, stack, lambda block: block == 2)
    first, second, third = model.body.layers
    assert (is_shadow(first), is_shadow(second), is_shadow(third)) == (True, True, False)
    assert not is_shadow(first[1])
    assert is_shadow(first[0])
    assert first[1].weight is third[1].weight is expected
    assert model.all_tied_weights_keys == {"body.layers.2.1.weight": "body.layers.0.1.weight"}
    assert kept_tensors(Tied(), stack, lambda block: block == 2) >= {"body.layers.0.1.weight"}  # type: ignore[arg-type]


# What the rest of the owner gets


def test_call_passes_the_first_tensor_on() -> None:
    tensor = torch.ones(2)
    assert passed_on(tensor, 3) is tensor
    assert passed_on(3, hidden_states=tensor) is tensor
    assert passed_on(3, name="text") is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_modules_around_a_span_give_zeros_of_the_right_shape(family: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family))
    stack = find_stack(model, model.config)
    prune(model, stack, is_second)
    ids = torch.ones(2, 3, dtype=torch.int64)
    embedded = model.get_input_embeddings()(ids)
    assert embedded.shape == (2, 3, 32)
    assert not embedded.any()
    embedded += 1  # some owners scale it in place
    logits = model.get_output_embeddings()(torch.ones(2, 3, 32))
    assert logits.shape == (2, 3, model.config.vocab_size)
    assert not logits.any()


def test_blocks_of_others_pass_on_what_they_get() -> None:
    model, stack = skeleton()
    prune(model, stack, is_second)
    hidden_states = torch.ones(1, 2, 32)
    assert [block(hidden_states) is hidden_states for block in list(stack.blocks(model))[2:]] == [True] * (
        NUM_BLOCKS - 2
    )
