"""Blocks that peers run with adapters give what peft gives locally: losses, gradients, files. The oracle is peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model_state_dict

from tests.model.peft_support import FAMILIES, adapted, local_model, remote_twin, train, trainable

# peft asks transformers in a way that it will not answer in version 6.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

ATTENTION: dict[str, list[str]] = {
    "gpt2": ["c_attn"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
}
FEEDFORWARD: dict[str, list[str]] = {
    "gpt2": ["mlp.c_proj"],
    "bloom": ["dense_4h_to_h"],
    "falcon": ["dense_4h_to_h"],
    "qwen3_moe": ["o_proj"],  # its experts are no layers
    "mixtral": ["o_proj"],
}


def lora(family: str, **changes: Any) -> LoraConfig:
    options = {
        "r": 4,
        "target_modules": ATTENTION.get(family, ["q_proj", "v_proj"]),
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(**(options | changes))


def ia3(family: str) -> IA3Config:
    feedforward = FEEDFORWARD.get(family, ["down_proj"])
    targets = [*ATTENTION.get(family, ["k_proj", "v_proj"]), *feedforward]
    return IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=family == "gpt2")


METHODS = {
    "lora": lambda family: [lora(family)],
    "all-linear": lambda family: [lora(family, target_modules="all-linear")],
    "some layers": lambda family: [lora(family, layers_to_transform=[1, 3])],
    "rslora": lambda family: [lora(family, use_rslora=True)],
    "dora": lambda family: [lora(family, use_dora=True)],
    "ia3": lambda family: [ia3(family)],
    "two": lambda family: [lora(family), lora(family, r=2, lora_alpha=3)],
    "two ia3": lambda family: [ia3(family), ia3(family)],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_peft_on_local_blocks(method: str, family: str, folder: Path) -> None:
    model = local_model(folder, family)
    configs: list[PeftConfig] = METHODS[method](family)
    local, remote = adapted(copy.deepcopy(model), *configs), adapted(remote_twin(model), *configs)
    assert [name for name, _ in trainable(local)] == [name for name, _ in trainable(remote)]
    local.train()
    remote.train()
    losses, gradients = train(local)
    remote_losses, remote_gradients = train(remote)
    assert remote_losses == losses
    assert remote_gradients.keys() == gradients.keys()
    assert max(float((remote_gradients[name] - grad).abs().max()) for name, grad in gradients.items()) == 0.0
    assert max(float(grad.abs().max()) for grad in gradients.values()) > 0.0
    for number in range(len(configs)):
        state, expected = (get_peft_model_state_dict(one, adapter_name=f"a{number}") for one in (remote, local))
        assert state.keys() == expected.keys()
