"""Blocks whose weights are stored in int8 or nf4, and dequantized for the operations that they enter.

transformers quantizes `nn.Linear` through bitsandbytes while it loads; what it leaves, the fused experts of
mixture-of-experts blocks, is done here. Norms, biases, routers and small tensors stay as they are. A quantized block is
frozen: gradients flow through it to its input.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = [
    "QuantizedExperts",
    "block_state",
    "check_quantization",
    "compute_dtype",
    "loading_options",
    "quantize_experts",
    "quantized_bytes",
    "restore_block",
]

NF4_BLOCK = 64  # weights that share a scale
_OUTLIER_THRESHOLD = 6.0  # of LLM.int8(): activation columns beyond it are computed in floating point
_MIN_FEATURES = 16  # smaller linear layers are gates and routers
_BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 4 / NF4_BLOCK}


def check_quantization(quantization: str) -> None:
    """Raise `ValueError` for an unknown one, or if its packages are missing."""
    if quantization not in _BYTES_PER_WEIGHT:
        raise ValueError(f"quantization must be int8 or nf4, got {quantization!r}")
    _bitsandbytes()


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each int8 product that is not float16
    try:
        import accelerate  # noqa: F401  what transformers needs besides
        import bitsandbytes
    except ImportError as exc:
        raise ValueError(
            f"quantization needs {exc.name}, which is not installed; pip install 'remote-modules[quantization]'"
        ) from exc
    return bitsandbytes


def loading_options(quantization: str, block: nn.Module, path: str) -> dict[str, Any]:
    """What `from_pretrained` takes to quantize the linear layers of ``block``, a meta one that lies at ``path``."""
    small = [name for name, module in block.named_modules() if _is_linear(module) and not _is_large(module.weight)]
    # The rest of the model is shadows, which bitsandbytes would take for what they stand for: by pattern, all of it.
    skip = [f"{path}.{name}" for name in small] + [rf"(?!{re.escape(path)}\.).*"]
    if quantization == "int8":
        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=_OUTLIER_THRESHOLD, llm_int8_skip_modules=skip
        )
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=skip,  # used for nf4 too
        )
    return {"quantization_config": config, "experts_implementation": "eager"}


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _is_large(weight: torch.Tensor) -> bool:
    return min(weight.shape) >= _MIN_FEATURES


def _is_experts(module: nn.Module, parameter: torch.Tensor) -> bool:
    return (
        parameter.dim() == 3
        and parameter.is_floating_point()
        and parameter.shape[0] == getattr(module, "num_experts", None)
        and parameter[0].numel() % NF4_BLOCK == 0
    )


def quantized_bytes(block: nn.Module, dtype: torch.dtype, quantization: str) -> int:
    """Memory of ``block``, which need not be loaded, once quantized; what stays as it is counts in ``dtype``."""
    total = 0.0
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_linear_weight = name == "weight" and _is_linear(module) and _is_large(parameter)
            is_quantized = is_linear_weight or _is_experts(module, parameter)
            total += parameter.numel() * (_BYTES_PER_WEIGHT[quantization] if is_quantized else dtype.itemsize)
            if is_quantized and quantization == "int8":
                total += 4 * parameter.numel() // parameter.shape[-1]  # the scales of its rows
    return int(total)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """What ``model`` computes in, whatever its weights are stored in."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


class _TensorLike:
    """Quantized weights that models use as if they were tensors: indexed, or as an operand of torch functions.

    They exist dequantized for one operation only. Autograd keeps the quantized ones for them, and they are dequantized
    again in backward: a span under grad would otherwise hold its whole weights in the compute dtype.
    """

    def dequantize(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.bmm and isinstance(args[1], QuantizedExperts):  # expert by expert: all need not fit at once
            return torch.stack([rows @ args[1][expert] for expert, rows in enumerate(args[0])])
        sources: dict[int, _TensorLike] = {}

        def dequantized(value: Any) -> Any:
            if isinstance(value, _TensorLike):
                tensor = value.dequantize()
                sources[tensor.untyped_storage().data_ptr()] = value
                return tensor
            return type(value)(map(dequantized, value)) if type(value) in (list, tuple) else value

        def pack(tensor: torch.Tensor) -> Any:
            source = sources.get(tensor.untyped_storage().data_ptr())
            return tensor if source is None else (source, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            source, *layout = packed
            weight: torch.Tensor = source.dequantize()
            return weight.as_strided(*layout)

        plain = {name: dequantized(value) for name, value in (kwargs or {}).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return func(*dequantized(args), **plain)


class _Expert(_TensorLike):
    """The weights ``[R, C]`` of one expert."""

    def __init__(self, experts: QuantizedExperts, index: int) -> None:
        self._experts = experts
        self._index = index

    def dequantize(self) -> torch.Tensor:
        return self._experts.expert(self._index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dequantize(), name)


class QuantizedExperts(_TensorLike, nn.Module):
    """Fused weights ``[E, R, C]`` of all experts of a block, in the place of the parameter that they were.

    int8 has one scale for each row, the largest magnitude over 127: the storage of LLM.int8(), so that experts and
    linear layers of a block lose alike. bitsandbytes' blockwise 8 bit would take as many bytes, and a table look-up for
    each weight. nf4 has one scale for each 64 weights. These scales are not quantized again, as those of linear layers
    are: groups of 256 of them would span experts.

    Args:
        codes: int8 ``[E, R, C]``, or uint8 ``[E, R * C / 2]``, two of nf4 in each.
        scales: float32 ``[E, R, 1]``, or ``[E, R * C / 64]``.
        like: ``[0, R, C]``, empty, of the dtype to compute in.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, like: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("like", like)

    @classmethod
    def quantize(cls, weight: torch.Tensor, quantization: str) -> QuantizedExperts:
        """Of ``weight`` ``[E, R, C]``; one expert at a time."""
        parts = [_quantize_rows(expert) if quantization == "int8" else _quantize_nf4(expert) for expert in weight]
        codes, scales = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return cls(codes, scales, weight.new_empty((0, *weight.shape[1:])))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], *self.like.shape[1:]))

    @torch.no_grad()
    def expert(self, index: int) -> torch.Tensor:
        """``[R, C]``."""
        codes, scales = self.codes[index], self.scales[index]
        if codes.dtype == torch.int8:
            return codes.float().mul_(scales).to(self.like.dtype)  # twelve times as fast as codes * scales on a CPU
        functional = _bitsandbytes().functional
        state = functional.QuantState(
            absmax=scales,
            shape=self.shape[1:],
            code=_nf4_table(codes.device),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.like.dtype,
        )
        weight: torch.Tensor = functional.dequantize_4bit(codes.unsqueeze(1), state)
        return weight

    @torch.no_grad()
    def dequantize(self) -> torch.Tensor:
        return torch.stack([self.expert(index) for index in range(self.shape[0])])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(torch.Tensor, name):
                raise
            return getattr(self.dequantize(), name)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0):
            return _Expert(self, int(index))
        return self.dequantize()[index]


@cache
def _nf4_table(device: torch.device) -> torch.Tensor:
    table: torch.Tensor = _bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return table


def _quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(dim=-1, keepdim=True) / 127
    data = torch.round(weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).to(torch.int8)
    return data, scale


def _quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    data, state = _bitsandbytes().functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return data.flatten(), state.absmax


@torch.no_grad()
def quantize_experts(block: nn.Module, quantization: str) -> None:
    """Finish in place what `from_pretrained` with `loading_options` began."""
    for module in list(block.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if _is_experts(module, parameter):
                delattr(module, name)
                setattr(module, name, QuantizedExperts.quantize(parameter, quantization))
    _settle(block)


def _settle(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, _bitsandbytes().nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = module.weight.quant_state.dtype, True
            # on CPUs with AVX512-BF16 it would repack its weights at the first inference, and have no gradient then
            module.support_avx512bf16_for_cpu = False


def block_state(block: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that `restore_block` needs: quantized weights with their scales, other parameters, all buffers."""
    state = {**block.state_dict(), **dict(block.named_buffers())}
    return {name: tensor.detach() for name, tensor in state.items() if not name.endswith(".weight_format")}


def restore_block(block: nn.Module, state: Mapping[str, torch.Tensor], device: torch.device | str) -> None:
    """Give ``block``, the meta one of a skeleton, the tensors of `block_state`.

    Raises:
        ValueError: they are not those of such a block.
    """
    rest = {name: tensor.to(device) for name, tensor in state.items()}
    try:
        for name in [name.removesuffix(".SCB") for name in state if name.endswith(".SCB")]:
            _replace_linear(block, name, _int8_linear(rest.pop(f"{name}.weight"), rest.pop(f"{name}.SCB")))
        for name in [name.removesuffix(".weight.absmax") for name in state if name.endswith(".weight.absmax")]:
            prefix = f"{name}.weight."
            stats = {key: rest.pop(key) for key in list(rest) if key.startswith(prefix)}
            _replace_linear(block, name, _nf4_linear(rest.pop(f"{name}.weight"), stats))
        for name in [name.removesuffix(".like") for name in state if name.endswith(".like")]:
            path, _, attribute = name.rpartition(".")
            delattr(block.get_submodule(path), attribute)
            parts = (rest.pop(f"{name}.{part}") for part in ("codes", "scales", "like"))
            setattr(block.get_submodule(path), attribute, QuantizedExperts(*parts))
        for name, tensor in rest.items():
            path, _, attribute = name.rpartition(".")
            module = block.get_submodule(path)
            if getattr(module, attribute).shape != tensor.shape:
                raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}")
            is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    except (AttributeError, KeyError) as exc:
        raise ValueError(f"the stored tensors are not those of a {type(block).__name__}: {exc}") from exc
    for name, left in [*block.named_parameters(), *block.named_buffers()]:
        if left.is_meta:
            raise ValueError(f"the stored tensors of a {type(block).__name__} lack '{name}'")
    _settle(block)


def _replace_linear(block: nn.Module, name: str, linear: nn.Module) -> None:
    old = block.get_submodule(name)
    linear.bias = old.bias  # a meta one, restored with the rest
    block.set_submodule(name, linear)


def _int8_linear(weight: torch.Tensor, scale: torch.Tensor) -> nn.Module:
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    linear: nn.Module = bnb.nn.Linear8bitLt(
        columns, rows, bias=False, has_fp16_weights=False, threshold=_OUTLIER_THRESHOLD, device="meta"
    )
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scale)
    return linear


def _nf4_linear(weight: torch.Tensor, stats: dict[str, torch.Tensor]) -> nn.Module:
    bnb = _bitsandbytes()
    parameter = bnb.nn.Params4bit.from_prequantized(weight, stats, device=weight.device)
    rows, columns = parameter.quant_state.shape
    linear: nn.Module = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", device="meta")
    parameter.module = linear
    linear.weight = parameter
    linear.quant_state = parameter.quant_state
    return linear
