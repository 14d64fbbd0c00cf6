"""Blocks that peers run with adapters give what peft gives locally: losses, gradients, files. The oracle is peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from model.peft_support import FAMILIES, adapted, local_model, remote_twin, token_ids, train, trainable
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapted import applied, check_fit
from remote_modules.model.adapted_item import Batch
from remote_modules.model.adapter_entries import Entry, Ia3, LoHa, LoKr, Lora, Oft, ParameterLora, Prompt, RowLora
from remote_modules.model.adapters import Adapter

pytestmark = [
    # peft asks transformers in a way that it will not answer in version 6.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    # It gives fused experts a rank, and then looks for them among modules only.
    pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module:RuntimeWarning"),
]

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
    options: dict[str, Any] = {
        "r": 4,
        "target_modules": ATTENTION.get(family, ["q_proj", "v_proj"]),
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(**(options | changes))


def ia3(family: str) -> IA3Config:
    feedforward = FEEDFORWARD.get(family, ["down_proj"])
    targets = [*ATTENTION.get(family, ["k_proj", "v_proj"]), *feedforward]
    return IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=family == "gpt2")


def other(kind: type[PeftConfig], family: str, **changes: Any) -> PeftConfig:
    """One of the methods that adapt plain linear layers only, which gpt2 has none of."""
    targets = ATTENTION.get(family, ["q_proj", "v_proj"])
    return kind(**({"target_modules": targets} | changes))


def parameter_lora(name: str, num_experts: int = 1) -> ParameterLora:
    return ParameterLora(block=0, module="layer", parameter=name, scaling=1.0, num_experts=num_experts, is_in_out=False)


METHODS: dict[str, Callable[[str], list[PeftConfig]]] = {
    "lora": lambda family: [lora(family)],
    "all-linear": lambda family: [lora(family, target_modules="all-linear")],
    "some layers": lambda family: [lora(family, layers_to_transform=[1, 3])],
    "rslora": lambda family: [lora(family, use_rslora=True)],
    "dora": lambda family: [lora(family, use_dora=True)],
    "ia3": lambda family: [ia3(family)],
    "two": lambda family: [lora(family), lora(family, r=2, lora_alpha=3)],
    "two ia3": lambda family: [ia3(family), ia3(family)],
}
UPDATES: dict[str, Callable[[str], list[PeftConfig]]] = {
    "loha": lambda family: [other(LoHaConfig, family, r=4, alpha=6)],
    "two loha": lambda family: [other(LoHaConfig, family, r=4), other(LoHaConfig, family, r=2, alpha=3)],
    "lokr": lambda family: [other(LoKrConfig, family, r=2, alpha=3)],
    "lokr, both in factors": lambda family: [
        other(LoKrConfig, family, r=1, decompose_both=True, decompose_factor=4, init_weights="lycoris")
    ],
    "lokr, both whole": lambda family: [other(LoKrConfig, family, r=64)],
    "two lokr": lambda family: [other(LoKrConfig, family, r=2), other(LoKrConfig, family, r=1)],
    "oft": lambda family: [other(OFTConfig, family, r=0, oft_block_size=8)],
    "oft, shared": lambda family: [other(OFTConfig, family, r=0, oft_block_size=4, block_share=True)],
    "oft, exact": lambda family: [other(OFTConfig, family, r=4, oft_block_size=0, use_cayley_neumann=False)],
    "oft, three terms": lambda family: [other(OFTConfig, family, r=0, oft_block_size=8, num_cayley_neumann_terms=3)],
    "oft, seven terms": lambda family: [other(OFTConfig, family, r=0, oft_block_size=8, num_cayley_neumann_terms=7)],
    "two oft": lambda family: [
        other(OFTConfig, family, r=0, oft_block_size=8),
        other(OFTConfig, family, r=0, oft_block_size=4, module_dropout=0.5),  # which peft does not look at
    ],
}
METHODS |= UPDATES


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_peft_on_local_blocks(method: str, family: str, folder: Path) -> None:
    model = local_model(folder, family)
    configs = METHODS[method](family)
    if family == "gpt2" and method in UPDATES:  # its layers are transposed
        for one in (copy.deepcopy(model), remote_twin(model)):
            with pytest.raises((TypeError, ValueError), match="not supported|Unsupported layer type|not implemented"):
                adapted(one, *configs)
        return
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


@pytest.mark.parametrize("method", ["lora", "all-linear", "dora", "ia3", "loha", "lokr, both in factors", "oft"])
def test_files_go_both_ways(method: str, family: str, folder: Path, tmp_path: Path) -> None:
    if family == "gpt2" and method in UPDATES:
        family = "llama"
    model = local_model(folder, family)
    local, remote = (
        adapted(copy.deepcopy(model), *METHODS[method](family)),
        adapted(remote_twin(model), *METHODS[method](family), seed=8),
    )
    expected = {}
    for name, one in (("local", local.eval()), ("remote", remote.eval())):
        one.save_pretrained(str(tmp_path / name))
        expected[name] = logits(one)
    assert not torch.equal(expected["local"], expected["remote"])
    for name, fresh in (("remote", copy.deepcopy(model)), ("local", remote_twin(model))):
        loaded = PeftModel.from_pretrained(fresh, tmp_path / name / "a0").eval()
        assert torch.equal(logits(loaded), expected[name])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=token_ids()).logits
    return result


@pytest.mark.parametrize("method", ["lora", "all-linear", "dora", "ia3", "two", *UPDATES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_peft(method: str, dtype: torch.dtype, folder: Path) -> None:
    model: Any = local_model(folder, "llama").to(dtype=dtype)  # type: ignore[call-arg]
    local = adapted(copy.deepcopy(model), *METHODS[method]("llama")).train()
    remote = adapted(remote_twin(model, dtype=dtype), *METHODS[method]("llama")).train()
    assert [parameter.dtype for _, parameter in trainable(local)] == [p.dtype for _, p in trainable(remote)]
    assert train(remote, steps=2)[0] == train(local, steps=2)[0]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha", "lokr", "oft"])
def test_autocast_is_that_of_peft(method: str, folder: Path) -> None:
    model = local_model(folder, "llama")
    losses = []
    for one in (copy.deepcopy(model), remote_twin(model)):
        wrapped = adapted(one, *METHODS[method]("llama"))
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(logits(wrapped))
    assert torch.equal(*losses)


def test_one_gradient_is_that_of_the_formula() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    down, up = torch.randn(2, 5, requires_grad=True), torch.randn(7, 2, requires_grad=True)
    with applied({0: holder(layer)}, adapter_of(Lora(block=0, module="layer", scaling=0.5), down, up)):
        output = layer(x)
    assert torch.equal(output, layer(x) + (x @ down.T) @ up.T * 0.5)
    output.sum().backward()
    assert down.grad is not None
    assert torch.allclose(down.grad, 0.5 * torch.outer(up.detach().sum(0), x.sum((0, 1))), atol=1e-5)


def holder(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": module})


def adapter_of(entry: Entry, *tensors: torch.Tensor) -> Adapter:
    return Adapter((entry,), tensors)


def lora_of(layer: nn.Module, **changes: Any) -> Adapter:
    options: dict[str, Any] = {"block": 0, "module": "layer", "scaling": 1.0}
    entry = Lora(**(options | changes))
    magnitude = [torch.rand(7) + 1] if entry.is_dora else []
    torch.manual_seed(0)
    return adapter_of(entry, torch.randn(2, 5), torch.randn(7, 2), *magnitude)


def test_dropout_is_decided_by_seed_block_and_module() -> None:
    layer, x = nn.Linear(5, 7), torch.ones(4, 5)
    blocks = {0: holder(layer), 1: holder(layer)}

    def output(seed: int, **changes: Any) -> torch.Tensor:
        with applied(blocks, lora_of(layer, dropout=0.5, **changes), Batch(seed=seed)):
            return layer(x)  # type: ignore[no-any-return]

    assert torch.equal(output(1), output(1))
    assert torch.equal(output(1, is_dora=True), output(1, is_dora=True))
    assert not torch.equal(output(1), output(2))
    assert not torch.equal(output(1), output(1, block=1))
    with pytest.raises(UnsupportedCallError, match="need a seed"), applied(blocks, lora_of(layer, dropout=0.5)):
        pass


def test_mask_of_a_row_does_not_depend_on_the_rows_around_it() -> None:
    layer = nn.Linear(5, 7)
    adapter = lora_of(layer, dropout=0.5)
    x = torch.ones(6, 3, 5)

    def output(x: torch.Tensor, **batch: Any) -> torch.Tensor:
        with applied({0: holder(layer)}, adapter, Batch(seed=1, num_tokens=3, **batch)):
            return layer(x)  # type: ignore[no-any-return]

    whole = output(x, rows=6)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6
    parts = [output(x[:1], rows=1), output(x[1:4], rows=3, first_row=1), output(x[4:], rows=2, first_row=4)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(output(x.flatten(0, 1), rows=6), whole.flatten(0, 1))
    chosen = x.flatten(0, 1)[:4]  # tokens that an expert gets
    assert torch.equal(output(chosen, rows=6), output(chosen, rows=6))
    assert not torch.equal(output(chosen, rows=6), output(chosen, rows=6, first_row=6))


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr, scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_outputs_is_that_of_peft(kind: str, dtype: torch.dtype, folder: Path, monkeypatch: Any) -> None:
    """With every second output left out."""
    model: Any = local_model(folder, "llama").to(dtype=dtype)  # type: ignore[call-arg]
    options: dict[str, Any] = {"rank_dropout_scale": True} if kind == "lokr, scaled" else {}
    config = other(LoHaConfig if kind == "loha" else LoKrConfig, "llama", r=2, rank_dropout=0.5, **options)
    local, remote = adapted(copy.deepcopy(model), config), adapted(remote_twin(model, dtype=dtype), config)
    assert torch.equal(logits(local.eval()), logits(remote.eval()))
    undropped = adapted(copy.deepcopy(model), other(type(config), "llama", r=2))
    blocks: Any = remote.get_submodule("base_model.model.model.layers")
    for block in blocks:
        block.forward.__self__.seed = 1
    draws = []

    def draw(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        draws.append(generator)
        return (torch.arange(1, count + 1) % 2).float()

    monkeypatch.setattr("torch.rand", draw)
    losses = [train(one.train(), steps=2)[0] for one in (local, remote)]
    assert losses[0] == losses[1] != train(undropped.train(), steps=2)[0]
    assert {generator is None for generator in draws} == {True, False}  # peft and peers


def test_dropout_of_outputs_is_the_same_in_all_parts_of_a_batch() -> None:
    layer = nn.Linear(4, 6)
    entry = LoHa(block=0, module="layer", scaling=1.0, rank_dropout=0.5)
    torch.manual_seed(0)
    adapter = adapter_of(entry, torch.randn(6, 2), torch.randn(2, 4), torch.randn(6, 2), torch.randn(2, 4))
    x = torch.ones(2, 4)
    outputs = []
    for seed, first_row in ((1, 0), (1, 2), (2, 0)):
        with applied({0: holder(layer)}, adapter, Batch(seed=seed, rows=2, first_row=first_row)):
            outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with pytest.raises(UnsupportedCallError, match="need a seed"), applied({0: holder(layer)}, adapter):
        pass


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    entry = Lora(block=0, module="layer", scaling=1.0, dropout=0.25)
    with applied({0: holder(layer)}, adapter_of(entry, torch.ones(1, 1), torch.ones(1, 1)), Batch(seed=3)):
        output = layer(torch.ones(4, 25_000, 1))
    assert set(output.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs(output.mean().item() - 1.0) < 0.01


def test_dropout_with_dora_of_a_trained_probability_is_that_of_peft(folder: Path, monkeypatch: Any) -> None:
    """With a mask that keeps all, and is scaled, as peft's would be."""
    model = local_model(folder, "llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True, lora_dropout=0.5)
    local, remote = adapted(copy.deepcopy(model), config).train(), adapted(remote_twin(model), config).train()
    blocks: Any = remote.get_submodule("base_model.model.model.layers")
    for block in blocks:
        block.forward.__self__.seed = 1
    monkeypatch.setattr("torch.rand", lambda shape, generator: torch.ones(shape))
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * torch.ones_like(x) / (1.0 - self.p))
    assert train(remote)[0] == train(local)[0]


@pytest.mark.parametrize(
    ("entry", "shapes", "message"),
    [
        (Lora(block=0, module="other", scaling=1.0), [[2, 5], [7, 2]], "block 0 has no module 'other' to adapt"),
        (Lora(block=0, module="layer", scaling=1.0), [[2, 6], [7, 2]], r"is for sizes \[7, 6\], expected \[7, 5\]"),
        (Lora(block=0, module="norm", scaling=1.0), [[2, 5], [7, 2]], "'norm' of block 0 is a LayerNorm"),
        (Ia3(block=0, module="layer", is_feedforward=True), [[1, 7]], r"is for sizes \[7\], expected \[5\]"),
        (Ia3(block=0, module="layer", is_feedforward=False), [[5, 1]], r"is for sizes \[5\], expected \[7\]"),
        (LoHa(block=0, module="layer", scaling=1.0), [[7, 2], [2, 6], [7, 2], [2, 6]], r"\[7, 6\], expected \[7, 5\]"),
        (LoKr(block=0, module="layer", scaling=1.0), [[7, 5], [1, 1], [1, 2]], r"\[7, 10\], expected \[7, 5\]"),
        (Oft(block=0, module="layer", size=2, num_inputs=4), [[2, 1]], r"is for sizes \[4\], expected \[5\]"),
        (LoHa(block=0, module="turned", scaling=1.0), [[7, 2], [2, 5], [7, 2], [2, 5]], "is a Conv1D"),
        (parameter_lora("nothing"), [[2, 5], [7, 2]], "has no parameter 'nothing' that can be adapted"),
        (parameter_lora("bias"), [[2, 5], [7, 2]], "has no parameter 'bias' that can be adapted"),
        (parameter_lora("weight", 2), [[2, 5], [7, 2]], r"is for \[2, 7, 5\], expected \[1, 7, 5\]"),
    ],
)
def test_entry_that_does_not_fit_is_refused(entry: Entry, shapes: list[list[int]], message: str) -> None:
    block = nn.ModuleDict({"layer": nn.Linear(5, 7), "norm": nn.LayerNorm(5), "turned": Conv1D(7, 5)})
    adapter = adapter_of(entry, *(torch.ones(shape) for shape in shapes))
    with pytest.raises(UnsupportedCallError, match=message):
        check_fit({0: block}, adapter)
    with pytest.raises(UnsupportedCallError, match=message), applied({0: block}, adapter):
        pass
    assert not block["layer"]._forward_hooks


def test_blocks_are_as_before_after_a_failure(folder: Path) -> None:
    experts = nn.ModuleDict({"layer": Experts()})
    adapter = adapter_of(parameter_lora("weight", 3), torch.ones(6, 5), torch.ones(7, 6))
    with pytest.raises(ZeroDivisionError), applied({0: experts}, adapter):
        experts["layer"](fail=True)
    assert experts["layer"].__dict__.keys() == Experts().__dict__.keys()
    assert not experts["layer"]._forward_hooks
    assert not experts["layer"]._forward_pre_hooks
    with applied({0: experts}, adapter):
        assert torch.equal(experts["layer"](), torch.full((3, 7, 5), 3.0))
    assert torch.equal(experts["layer"](), torch.ones(3, 7, 5))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 7, 5), requires_grad=False)

    def forward(self, fail: bool = False) -> torch.Tensor:
        return self.weight / 0 if fail and 1 // 0 else self.weight


def test_blocks_of_other_spans_are_left_out() -> None:
    layer = nn.Linear(5, 7)
    with applied({1: holder(layer)}, lora_of(layer, block=0)):
        assert not layer._forward_hooks


class Shifted(nn.Module):
    """A block that takes its hidden states by position or by name."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


def test_prompt_is_added_at_the_first_positions_of_the_cache() -> None:
    block, prompt, x = Shifted(), torch.randn(3, 5, requires_grad=True), torch.randn(2, 4, 5)
    adapter = adapter_of(Prompt(block=0), prompt)
    expected = x.clone()
    expected[:, :3] += prompt.detach()
    with applied({0: block}, adapter):
        assert torch.equal(block(x), expected * 2)
        output = block(hidden_states=x)
    assert torch.equal(output, expected * 2)
    output.sum().backward()
    assert prompt.grad is not None
    assert torch.equal(prompt.grad, torch.full((3, 5), 4.0))  # two rows, doubled
    parts = []
    for position, part in ((0, x[:, :2]), (2, x[:, 2:3]), (3, x[:, 3:])):
        with applied({0: block}, adapter, Batch(position=position)):
            parts.append(block(part))
    assert torch.equal(torch.cat(parts, dim=1), expected * 2)
    assert not block._forward_pre_hooks


@pytest.mark.parametrize("shape", [[4, 5], [2, 4, 6], [2, 1, 4, 5]])
def test_prompt_that_does_not_fit_hidden_states_is_refused(shape: list[int]) -> None:
    block = Shifted()
    with applied({7: block}, adapter_of(Prompt(block=7), torch.ones(3, 5))):
        with pytest.raises(UnsupportedCallError, match=r"prompt of block 7 is \[3, 5\], but hidden states are \["):
            block(torch.ones(shape))


class Linear8bitLt(nn.Linear):
    """Known by its name only."""


def test_dora_on_eight_bits_is_refused() -> None:
    layer = Linear8bitLt(5, 7)
    with applied({0: holder(layer)}, lora_of(layer, is_dora=True)):
        with pytest.raises(UnsupportedCallError, match="DoRA on peers that hold 8-bit weights"):
            layer(torch.ones(1, 5))


def test_update_of_a_quantized_layer_is_rounded_before_it_is_added() -> None:
    layer = Linear8bitLt(5, 7).to(torch.bfloat16)
    adapter, x = lora_of(layer), torch.randn(3, 5, dtype=torch.bfloat16)
    down, up = adapter.tensors
    with applied({0: holder(layer)}, adapter):
        output = layer(x)
    assert torch.equal(output, layer(x) + ((x.float() @ down.T) @ up.T).to(torch.bfloat16))


def rows_of(group: int, seed: int) -> tuple[RowLora, list[torch.Tensor]]:
    torch.manual_seed(seed)
    return RowLora(block=0, module="layer", group=group, scaling=2.0), [torch.randn(2, 5), torch.randn(7, 2)]


@pytest.mark.parametrize("kind", [nn.Linear, Linear8bitLt])
def test_each_row_has_the_update_of_its_group(kind: type[nn.Linear]) -> None:
    layer, x = kind(5, 7).to(torch.bfloat16), torch.randn(4, 3, 5, dtype=torch.bfloat16)
    own = [rows_of(group, seed=group) for group in (1, 2, 3)]
    adapter = Adapter(tuple(entry for entry, _ in own), tuple(tensor for _, tensors in own for tensor in tensors))
    with applied({0: holder(layer)}, adapter, Batch(adapter_rows=b"\2\0\1\2")):
        output = layer(x)
    expected = layer(x)
    for row, group in ((0, 2), (2, 1), (3, 2)):
        down, up = own[group - 1][1]
        expected[row] += (x[row].float() @ down.T @ up.T * 2.0).to(torch.bfloat16)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("rows", [b"", b"\1", b"\1\1\1"])
def test_layer_that_does_not_keep_rows_apart_is_refused(rows: bytes) -> None:
    layer = nn.Linear(5, 7)
    entry, tensors = rows_of(1, seed=0)
    with applied({0: holder(layer)}, adapter_of(entry, *tensors), Batch(adapter_rows=rows)):
        with pytest.raises(UnsupportedCallError, match=f"given for {len(rows)} rows, but an adapted layer takes 2"):
            layer(torch.ones(2, 5))
