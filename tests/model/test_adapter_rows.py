"""Which row has which adapter is read off peft's hooks completely, or refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.model import _adapter_names_pre_forward_hook

from model.test_adapters import blocks_of, collected, model_with
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapter_reading import collect
from remote_modules.model.adapter_rows import groups_of
from remote_modules.model.adapters import AdapterSet

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def read_in_call(model: PeftModel, names: list[str]) -> AdapterSet:
    """What is read while a call with these ``adapter_names`` is under way."""
    tuner: Any = model.base_model
    with tuner._enable_peft_forward_hooks(adapter_names=names):
        return collected(model)


def test_adapters_of_rows_are_read_in_groups(tmp_path: Path) -> None:
    other = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])
    model = model_with(tmp_path, LoraConfig(r=4, target_modules=["q_proj"]), other).eval()
    names = ["a1", "__base__", "a0", "a1"]
    found = read_in_call(model, names)
    assert found.row_names == tuple(names)
    assert groups_of(names) == {"__base__": 0, "a0": 1, "a1": 2}
    ranks = {(entry.block, getattr(entry, "group", 0)): len(own[0]) for entry, own in found.items()}
    assert {key: rank for key, rank in ranks.items() if key[0] < 2} == {(0, 1): 4, (0, 2): 2, (1, 1): 4}
    assert collected(model).row_names == ()


def drop_out(model: PeftModel) -> None:
    model.train()
    model.base_model.training = False


def hook_more(model: PeftModel) -> None:
    blocks_of(model)[1].get_submodule("self_attn.q_proj").register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("config", "spoil", "named"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), None, "DoRA at 'self_attn.q_proj' of block 0"),
        (LoraConfig(target_modules=["q_proj"], lora_dropout=0.5), drop_out, "dropout at 'self_attn.q_proj' of block 0"),
        (LoraConfig(target_modules=["q_proj"]), hook_more, "hooks at 'self_attn.q_proj' of block 1 do not run"),
    ],
    ids=["dora", "dropout", "hook"],
)
def test_adapters_of_rows_that_are_not_carried_are_refused(
    config: PeftConfig, spoil: Any, named: str, tmp_path: Path
) -> None:
    model = model_with(tmp_path, config).eval()
    if spoil is not None:
        spoil(model)
    with pytest.raises(UnsupportedCallError, match=named):
        read_in_call(model, ["a0", "__base__"])


def test_experts_do_not_keep_rows_apart(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = model_with(tmp_path, config, family="qwen3_moe").eval()
    with pytest.raises(UnsupportedCallError, match="adapter_names are carried for LoRA on linear layers, got peft"):
        read_in_call(model, ["a0", "__base__"])


def test_layers_with_different_names_are_refused(tmp_path: Path) -> None:
    model = model_with(tmp_path, LoraConfig(target_modules=["q_proj"])).eval()
    for index, names in enumerate((["a0"], ["__base__"])):
        layer: Any = blocks_of(model)[index].get_submodule("self_attn.q_proj")
        hook: Any = partial(_adapter_names_pre_forward_hook, adapter_names=names)
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(UnsupportedCallError, match="different adapter_names"):
        collect(blocks_of(model))


def test_number_of_adapters_in_a_batch_is_bounded(tmp_path: Path) -> None:
    model = model_with(tmp_path, LoraConfig(target_modules=["q_proj"])).eval()
    layer: Any = blocks_of(model)[0].get_submodule("self_attn.q_proj")
    hook: Any = partial(_adapter_names_pre_forward_hook, adapter_names=[f"a{number}" for number in range(17)])
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(UnsupportedCallError, match="carried for 16 adapters in a batch, got 17"):
        collect(blocks_of(model))
