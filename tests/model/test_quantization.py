from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from tiny_models import save_tiny
from torch import nn

from model.support import opened, opened_files, run_span
from remote_modules.model.adapted import applied
from remote_modules.model.adapter_entries import Entry, LoHa, LoKr, Oft
from remote_modules.model.adapters import Adapter
from remote_modules.model.loading import load_span
from remote_modules.model.quantization import (
    QuantizedExperts,
    block_state,
    check_quantization,
    compute_dtype,
    quantized_bytes,
    restore_block,
)
from remote_modules.model.quantized_cache import QuantizedCache
from remote_modules.model.replay import SpanModel
from remote_modules.model.stack import meta_skeleton
from remote_modules.spans import Span

SPAN = Span(0, 2)
QUANTIZATIONS = ["int8", "nf4"]
MAX_RATIO = {"int8": 0.53, "nf4": 0.30}
LARGE: dict[str, Any] = {  # enough that scales and tables weigh as little as in real models
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
}
# One of each: plain, Conv1D, experts by `F.linear`, by `@` with biases, after a dense block, by `torch.bmm`.
FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"]
FUSED = FAMILIES[2:]


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=FUSED)
def fused_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def large_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("large"), request.param, shard_size="4MB", **LARGE)


def loaded(folder: Path, span: Span = SPAN, **kwargs: Any) -> SpanModel:
    checkpoint, config, cls = opened(folder)
    model, stack = load_span(checkpoint, config, cls, span, **kwargs)
    span_model = SpanModel(model, stack, span)
    span_model.dtype = compute_dtype(model)
    return span_model


def blocks_of(folder: Path, span: Span = SPAN, **kwargs: Any) -> list[nn.Module]:
    checkpoint, config, cls = opened(folder)
    model, stack = load_span(checkpoint, config, cls, span, **kwargs)
    return [stack.blocks(model)[index] for index in span]


def run(model: SpanModel, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output without grad, then output and gradient of the input with it."""
    inputs = torch.randn(2, 6, model.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        output = run_span(model, inputs)
    inputs.requires_grad_()
    trained = run_span(model, inputs)
    trained.float().square().sum().backward()
    assert inputs.grad is not None
    return output, trained.detach(), inputs.grad


def num_bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# Spans


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_restored_span_equals_the_quantized_one_and_opens_no_shard(
    family_folder: Path, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, opened_by = [], []
    for _ in range(2):
        cache = QuantizedCache("key", tmp_path)
        with opened_files(monkeypatch) as names:
            model = loaded(family_folder, quantization=quantization, quantized_cache=cache)
        opened_by.append(names)
        results.append((run(model), cache.digests))
    (cold, cold_digests), (warm, warm_digests) = results
    for mine, theirs in zip(warm, cold, strict=True):
        assert torch.equal(mine, theirs)
    assert opened_by[1] == {"block-0.safetensors", "block-1.safetensors"}
    assert any(name.startswith("model-") for name in opened_by[0])
    assert warm_digests == cold_digests
    assert cold_digests.keys() == {0, 1}
    assert all(cold_digests.values())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_grad_follows_inference_with_equal_outputs(family_folder: Path, quantization: str) -> None:
    output, trained, gradient = run(loaded(family_folder, quantization=quantization))
    assert torch.equal(output, trained)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_blocks_quantize_alike_in_every_span(family_folder: Path, quantization: str) -> None:
    _, second = blocks_of(family_folder, quantization=quantization)
    (alone,) = blocks_of(family_folder, Span(1, 2), quantization=quantization)
    ours, theirs = block_state(alone), block_state(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantized_weights_take_their_share_of_bfloat16(large_folder: Path, quantization: str) -> None:
    dtype = torch.bfloat16
    plain = dict(blocks_of(large_folder, dtype=dtype)[1].named_parameters())
    large = {name for name, tensor in plain.items() if tensor.dim() > 1 and name != "mlp.gate.weight"}
    block = blocks_of(large_folder, dtype=dtype, quantization=quantization)[1]
    state = block_state(block)
    kept = {name for name in plain.keys() - large if torch.equal(state[name], plain[name])}
    assert kept == plain.keys() - large  # norms, routers
    weights = num_bytes(state[name] for name in state.keys() - kept)
    assert weights / num_bytes(plain[name] for name in large) <= MAX_RATIO[quantization]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_estimate_is_near_the_bytes_of_a_block(large_folder: Path, quantization: str) -> None:
    _, config, cls = opened(large_folder)
    meta = meta_skeleton(cls, config).model.layers[1]
    estimate = quantized_bytes(meta, torch.bfloat16, quantization)
    actual = num_bytes(
        block_state(blocks_of(large_folder, dtype=torch.bfloat16, quantization=quantization)[1]).values()
    )
    assert 0.98 < estimate / actual < 1.1


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.02), ("nf4", 0.2)])
def test_output_is_near_that_of_the_checkpoint(large_folder: Path, quantization: str, limit: float) -> None:
    plain, *_ = run(loaded(large_folder))
    output, *_ = run(loaded(large_folder, quantization=quantization))
    inputs = torch.randn(2, 6, LARGE["hidden_size"], generator=torch.Generator().manual_seed(1))
    assert 0 < (output - plain).norm() / (plain - inputs).norm() < limit


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_span_computes_in_the_dtype_asked_for(fused_folder: Path, quantization: str) -> None:
    model = loaded(fused_folder, quantization=quantization, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert [tensor.dtype for tensor in run(model, dtype=torch.bfloat16)] == [torch.bfloat16] * 3


# Experts


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_fused_experts_equal_their_dequantized_weights(fused_folder: Path, quantization: str) -> None:
    model = loaded(fused_folder, quantization=quantization)
    output, _, gradient = run(model)
    num_replaced = 0
    for module in [module for index in SPAN for module in model.stack.blocks(model_of(model))[index].modules()]:
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedExperts):
                delattr(module, name)
                setattr(module, name, nn.Parameter(child.dequantize(), requires_grad=False))
                num_replaced += 1
    assert num_replaced > 0
    expected, _, expected_gradient = run(model)
    assert torch.equal(output, expected)
    assert torch.equal(gradient, expected_gradient)


def model_of(span_model: SpanModel) -> nn.Module:
    holder = nn.Module()  # the stack's path starts at the model, which a span model does not keep
    parent: nn.Module = holder
    *path, last = span_model.stack.path.split(".")[:-1]
    for name in path:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, span_model._owner)
    return holder


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_only_experts_that_are_hit_are_dequantized_and_again_in_backward(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(save_tiny(tmp_path, "mixtral"), Span(1, 2), quantization=quantization)
    dequantized: list[int] = []
    real = QuantizedExperts.expert

    def counting(self: QuantizedExperts, index: int) -> torch.Tensor:
        dequantized.append(index)
        return real(self, index)

    monkeypatch.setattr(QuantizedExperts, "expert", counting)
    inputs = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    output = run_span(model, inputs, Span(1, 2))
    assert len(dequantized) == 4  # two tensors of two experts of four
    assert len(set(dequantized)) == 2
    dequantized.clear()
    output.sum().backward()
    assert len(dequantized) == 4


def test_int8_experts_are_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(3, 8, 64)
    weight[1, 2] = 0
    step = weight.abs().amax(dim=-1, keepdim=True) / 127
    error = (QuantizedExperts.quantize(weight, "int8").dequantize() - weight).abs()
    assert (error <= step * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_experts_equal_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 8, 64).to(dtype)
    experts = QuantizedExperts.quantize(weight, "nf4")
    functional = bitsandbytes.functional
    expected = [functional.dequantize_4bit(*functional.quantize_4bit(one, quant_type="nf4")) for one in weight]
    assert experts.shape == weight.shape
    assert torch.equal(experts.dequantize(), torch.stack(expected))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_experts_serve_as_a_tensor(quantization: str) -> None:
    experts = QuantizedExperts.quantize(torch.randn(3, 8, 64), quantization)
    weight = experts.dequantize()
    rows = torch.randn(3, 5, 8)
    assert torch.equal(rows[0] @ experts[torch.tensor(1)], rows[0] @ weight[1])
    assert torch.equal(rows[0] @ experts[1], rows[0] @ weight[1])
    like_a_tensor: Any = experts
    assert torch.equal(torch.bmm(rows, like_a_tensor), torch.bmm(rows, weight))
    assert torch.equal(torch.stack([experts[2], experts[0]]), weight[[2, 0]])
    assert torch.equal(experts[torch.tensor([2, 0])], weight[[2, 0]])
    assert torch.equal(experts[1].T, weight[1].T)
    assert torch.equal(experts.transpose(1, 2), weight.transpose(1, 2))
    with pytest.raises(AttributeError, match="nothing"):
        _ = experts.nothing


# Refusals


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_missing_package_is_one_line_that_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^quantization needs {package}, which is not installed; pip install '") as e:
        check_quantization("int8")
    assert "remote-modules[quantization]" in str(e.value)


def test_unknown_quantization_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="quantization must be int8 or nf4, got 'int3'"):
        blocks_of(llama_folder, quantization="int3")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_tensors_of_another_block_are_refused(quantization: str, llama_folder: Path, large_folder: Path) -> None:
    (block,) = blocks_of(llama_folder, Span(0, 1), quantization=quantization)
    _, config, cls = opened(large_folder)
    with pytest.raises(ValueError, match="'input_layernorm.weight' has shape|not those of a MixtralDecoderLayer"):
        restore_block(meta_skeleton(cls, config).model.layers[0], block_state(block), "cpu")
    _, config, cls = opened(llama_folder)
    state = block_state(block)
    del state["input_layernorm.weight"]
    with pytest.raises(ValueError, match="lack 'input_layernorm.weight'"):
        restore_block(meta_skeleton(cls, config).model.layers[0], state, "cpu")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_updates_and_rotations_leave_quantized_weights_alone(quantization: str, llama_folder: Path) -> None:
    layer: Any = blocks_of(llama_folder, quantization=quantization)[0].get_submodule("self_attn.q_proj")
    size_out, size_in = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    x = draw(2, 3, size_in)
    first, second = (draw(size_out, 2), draw(2, size_in)), (draw(size_out, 2), draw(2, size_in))
    update = (first[0] @ first[1]) * (second[0] @ second[1]) * 2.0
    turned = torch.zeros(size_in // 4, 4, 4)
    triangle = draw(size_in // 4, 6)
    rows, columns = torch.triu_indices(4, 4, 1)
    turned[:, rows, columns] = triangle
    skew, identity = turned - turned.mT, torch.eye(4)
    rotation = torch.block_diag(*((identity - part) @ torch.linalg.inv(identity + part) for part in skew))
    left, right = draw(size_out // 4, 4), draw(4, size_in // 4)
    cases: list[tuple[Entry, list[torch.Tensor], torch.Tensor]] = [
        (LoHa(0, "q", 2.0), [*first, *second], layer(x) + x @ update.T),
        (LoKr(0, "q", 0.5, is_w2_whole=True), [left, right], layer(x) + x @ (torch.kron(left, right) * 0.5).T),
        (Oft(0, "q", 4, size_in, neumann_terms=0), [triangle], layer(x @ rotation)),
    ]
    for entry, tensors, expected in cases:
        with applied({0: nn.ModuleDict({"q": layer})}, Adapter((entry,), tuple(tensors))):
            torch.testing.assert_close(layer(x), expected.to(x.dtype), rtol=1e-2, atol=1e-2)
            assert not torch.equal(layer(x), layer.forward(x))
