"""Shadow blocks look like real ones to peft and like empty ones to everything else, and never invent a value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_config
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.pytorch_utils import Conv1D

from model.peft_support import FAMILIES, adapted, local_model, remote_twin, token_ids
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.classes import model_class
from remote_modules.model.shadow import ShadowTensor, is_shadow, shadow_block
from remote_modules.model.stack import find_stack, meta_skeleton

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def real_block(family: str = "llama") -> nn.Module:
    cls, config = model_class(tiny_config(family))
    skeleton = meta_skeleton(cls, config)
    return find_stack(skeleton, config).blocks(skeleton)[0]


def make(block: nn.Module, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "read_weight": None}
    return shadow_block(block, lambda hidden: hidden + 1, **(options | changes))


@pytest.fixture
def block() -> nn.Module:
    return make(real_block())


@pytest.fixture
def weight() -> torch.Tensor:
    """A shadow whose true value is 0, 1, 2 ... 1023."""
    values = torch.arange(1024.0).reshape(32, 32)
    return make(real_block(), read_weight=lambda name: values).get_submodule("self_attn.q_proj").weight  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_is_the_same_and_holds_nothing(family: str) -> None:
    block = real_block(family)
    shadow = make(block)
    modules = dict(block.named_modules())
    assert [name for name, _ in shadow.named_modules()] == list(modules)
    for name, module in shadow.named_modules():
        assert isinstance(module, type(modules[name]))
        assert type(module).__name__ == type(modules[name]).__name__
    assert [*shadow.named_parameters(), *shadow.named_buffers(), *shadow.state_dict()] == []
    for name, parameter in block.named_parameters():
        path, _, own = name.rpartition(".")
        stand_in = getattr(shadow.get_submodule(path), own)
        assert (stand_in.shape, stand_in.dtype, stand_in.device.type) == (parameter.shape, torch.float32, "cpu")
    assert next(block.parameters()).is_meta, "the skeleton is left as it is"


def test_classes_are_those_that_others_look_for(block: nn.Module) -> None:
    assert isinstance(block, LlamaDecoderLayer)
    assert isinstance(block.self_attn, LlamaAttention)
    assert isinstance(make(real_block("mixtral")).get_submodule("mlp.gate"), MixtralTopKRouter)
    assert isinstance(make(real_block("gpt2")).get_submodule("attn.c_attn"), Conv1D)
    assert type(block) is type(make(real_block())), "one class for all blocks"


def test_call_goes_to_the_given_function(block: nn.Module) -> None:
    assert block(torch.ones(1)).item() == 2.0
    block.forward = lambda hidden: hidden + 2
    assert block(torch.ones(1)).item() == 3.0


def test_call_of_an_inner_module_is_refused(block: nn.Module) -> None:
    with pytest.raises(UnsupportedCallError, match="Linear inside of a remote block was called"):
        block.get_submodule("self_attn.q_proj")(torch.ones(1, 32))


def test_weight_answers_without_reading(block: nn.Module) -> None:
    weight = block.get_submodule("mlp.up_proj").weight
    assert isinstance(weight, ShadowTensor)
    assert (weight.shape, weight.size(0), weight.dim(), weight.numel(), len(weight)) == ((48, 32), 48, 2, 1536, 48)
    assert (weight.dtype, weight.device, weight.is_meta) == (torch.float32, torch.device("cpu"), False)
    assert (weight.requires_grad, weight.grad, weight.is_leaf) == (False, None, True)
    assert (weight.stride(), weight.is_contiguous(), weight.element_size()) == ((32, 1), True, 4)
    assert weight.data is weight
    assert weight.detach() is weight
    assert weight.requires_grad_(False) is weight
    assert torch.zeros_like(weight).sum().item() == 0.0
    assert repr(weight) == "ShadowTensor('mlp.up_proj.weight', [48, 32], float32, cpu)"
    assert block.get_submodule("mlp.up_proj").bias is None


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight + 1,
        lambda weight: 1 - weight,
        lambda weight: F.linear(torch.eye(32), weight),
        lambda weight: weight.to(torch.float64),
        lambda weight: weight.cpu(),
        lambda weight: weight[0],
        lambda weight: weight.T,
        lambda weight: weight.clone(),
        lambda weight: torch.linalg.svd(weight).S,
        lambda weight: torch.cat([weight, weight]),
        lambda weight: torch.zeros(32, 32).copy_(weight),
        lambda weight: torch.tensor(weight.tolist()),
        lambda weight: torch.from_numpy(weight.numpy()),
        lambda weight: weight == 3,
        lambda weight: torch.stack(list(weight)),
        lambda weight: torch.ops.aten.add(weight, 1),
        lambda weight: weight.untyped_storage().nbytes(),
        lambda weight: torch.tensor(sum(weight.flatten().tolist())),
    ],
)
def test_computing_with_a_weight_reads_it(use: Any, weight: torch.Tensor) -> None:
    assert torch.equal(torch.as_tensor(use(weight)), torch.as_tensor(use(torch.arange(1024.0).reshape(32, 32))))
    unreadable = make(real_block()).get_submodule("self_attn.q_proj").weight
    with pytest.raises(UnsupportedCallError, match="'self_attn.q_proj.weight' is on remote peers and was asked for"):
        use(unreadable)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: weight.__iadd__(1),
        lambda weight: nn.init.zeros_(weight),
        lambda weight: setattr(weight, "data", torch.zeros(32, 32)),
        lambda weight: weight.data.copy_(torch.zeros(32, 32)),
    ],
)
def test_writing_to_a_weight_is_refused(write: Any, weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedCallError, match="'self_attn.q_proj.weight' .* cannot be changed from here"):
        write(weight)


def test_weight_can_neither_be_replaced_nor_trained(block: nn.Module) -> None:
    layer = block.get_submodule("self_attn.q_proj")
    with pytest.raises(UnsupportedCallError, match="cannot be replaced"):
        layer.weight = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(UnsupportedCallError, match="requires_grad must stay False"):
        layer.weight.requires_grad_()


def test_weight_of_another_shape_is_refused() -> None:
    layer: Any = make(real_block(), read_weight=lambda name: torch.zeros(3)).get_submodule("mlp.up_proj")
    with pytest.raises(UnsupportedCallError, match=r"read with shape \[3\], expected \[48, 32\]"):
        torch.add(layer.weight, 1)


def test_weight_that_is_reached_unseen_is_nan(block: nn.Module) -> None:
    layer: Any = block.get_submodule("mlp.up_proj")
    with torch._C.DisableTorchFunctionSubclass():
        assert bool(layer.weight.isnan().all())


def test_what_is_read_takes_dtype_and_name() -> None:
    names: list[str] = []

    def read(name: str) -> torch.Tensor:
        names.append(name)
        return torch.ones(48, 32, dtype=torch.bfloat16)

    layer: Any = make(real_block(), read_weight=read).get_submodule("mlp.up_proj")
    assert (layer.weight + 1).dtype == torch.float32
    assert names == ["mlp.up_proj.weight"]


def test_dtype_follows_the_model(block: nn.Module) -> None:
    layer: Any = block.get_submodule("mlp.up_proj")
    assert block.to(torch.bfloat16) is block
    assert layer.weight.dtype == torch.bfloat16
    assert block.float().get_submodule("mlp.up_proj").weight.dtype == torch.float32
    assert block.to("meta").get_submodule("mlp.up_proj").weight.is_meta


def test_module_calls_of_training_work(block: nn.Module) -> None:
    assert block.train().training
    assert not block.eval().get_submodule("mlp.up_proj").training
    block.requires_grad_(False)
    block.zero_grad()
    assert block.load_state_dict({}) is not None


def test_copy_of_a_model_calls_its_own_object(tmp_path: Path) -> None:
    model = remote_twin(local_model(tmp_path, "llama"))
    twin = copy.deepcopy(model)
    for one, other in zip(model.model.layers, twin.model.layers, strict=True):
        assert one.forward.__self__.shadow is one
        assert other.forward.__self__.shadow is other
        assert other.forward.__self__ is not one.forward.__self__
    twin.model.layers[0].half()
    assert model.model.layers[0].get_submodule("mlp.up_proj").weight.dtype == torch.float32


def test_no_checkpoint_is_put_around_a_remote_block(tmp_path: Path) -> None:
    model: PreTrainedModel = remote_twin(local_model(tmp_path, "llama"))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # by release
    model.train()
    block = model.model.layers[0]
    assert isinstance(block, GradientCheckpointingLayer)
    calls = []

    def counted(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(*args, **kwargs)

        return call

    for layer in model.model.layers:
        layer.forward = counted(layer.forward)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert len(calls) == 4


def test_fused_experts_are_listed_where_peft_looks_only() -> None:
    experts = make(real_block("mixtral")).get_submodule("mlp.experts")
    assert [name for name, _ in experts.named_parameters(recurse=False)] == ["gate_up_proj", "down_proj"]
    assert [name for name, _ in experts.named_parameters("x", recurse=False)] == ["x.gate_up_proj", "x.down_proj"]
    assert list(experts.named_parameters()) == []
    assert [parameter.requires_grad for parameter in experts.parameters()] == [False, False]


def test_only_adapters_are_parameters_and_keys_of_a_wrapped_model(tmp_path: Path) -> None:
    wrapped = adapted(remote_twin(local_model(tmp_path, "mixtral")), LoraConfig(target_modules="all-linear"))
    inner = [name for name, _ in wrapped.named_parameters() if ".layers." in name]
    assert len(inner) == 4 * 2 * 7  # q, k, v, o, the router, two expert parameters
    assert all("lora_" in name for name in inner)
    assert {name for name in wrapped.state_dict() if ".layers." in name} == set(inner)
    layers: Any = wrapped.get_submodule("base_model.model.model.layers")
    assert is_shadow(layers[0])
    assert not is_shadow(layers[0].get_submodule("self_attn.q_proj"))


def test_initialization_reads_weights_or_says_which_it_lacks(tmp_path: Path) -> None:
    model = local_model(tmp_path, "llama")
    config = LoraConfig(target_modules=["q_proj"], use_dora=True)
    local = adapted(copy.deepcopy(model), config).state_dict()
    remote = {name: value for name, value in adapted(remote_twin(model), config).state_dict().items() if "lora" in name}
    assert len(remote) == 12
    assert all(torch.equal(value, local[name]) for name, value in remote.items())
    with pytest.raises(UnsupportedCallError, match=r"'self_attn.q_proj.weight' .* asked for its values"):
        adapted(remote_twin(model, reads=False), config)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initialization_that_changes_weights_is_refused(method: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=method)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedCallError, match="cannot be changed from here"):
        adapted(remote_twin(local_model(tmp_path, "llama")), config)
