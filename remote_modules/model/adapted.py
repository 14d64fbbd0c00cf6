"""Running real blocks with a client's adapters, without peft.

Hooks are on the target modules for the time of one pass. Each computes what peft's layer computes, in its order of
operations, so that outputs and gradients are equal to the last bit.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapters import Adapter, Entry, Lora, ParameterLora

__all__ = ["applied", "check_fit"]

_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes; known by name, as it need not be installed
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def applied(blocks: Mapping[int, nn.Module], adapter: Adapter, *, seed: int | None = None) -> Iterator[None]:
    """Inside, ``blocks`` compute with ``adapter``; gradients flow to its tensors if they require them.

    The tensors must be on the device of the blocks. Not for two threads at once: the blocks themselves are changed.

    Args:
        blocks: real decoder blocks by index; entries of other blocks are left out.
        seed: decides the dropout masks, together with block and module. The same in forward and recomputation.

    Raises:
        UnsupportedCallError: an entry does not fit its block, or there is dropout and no seed.
    """
    targets = _targets(blocks, adapter)
    if seed is None and any(isinstance(item.entry, Lora) and item.entry.dropout for items in targets for item in items):
        raise UnsupportedCallError("adapters with dropout need a seed in the request")
    with ExitStack() as hooks:
        for items in targets:
            for handle in _install(items, seed):
                hooks.callback(handle)
        yield


def check_fit(blocks: Mapping[int, nn.Module], adapter: Adapter) -> None:
    """Raises: UnsupportedCallError: an entry does not fit its block."""
    _targets(blocks, adapter)


@dataclass(frozen=True, slots=True)
class _Item:
    """One entry and the module that it changes."""

    entry: Any
    tensors: Sequence[torch.Tensor]
    module: Any
    number: int  # among those of the module


def _targets(blocks: Mapping[int, nn.Module], adapter: Adapter) -> list[list[_Item]]:
    """Items by module, in order of the entries."""
    found: dict[tuple[int, str], list[_Item]] = {}
    for entry, tensors in adapter.items():
        block = blocks.get(entry.block)
        if block is None:
            continue
        try:
            module = block.get_submodule(entry.module)
        except AttributeError:
            raise UnsupportedCallError(f"block {entry.block} has no module '{entry.module}' to adapt") from None
        _check_fit(entry, tensors, module)
        items = found.setdefault((entry.block, entry.module), [])
        items.append(_Item(entry, tensors, module, len(items)))
    return list(found.values())


def _check_fit(entry: Entry, tensors: Sequence[torch.Tensor], module: nn.Module) -> None:
    where = f"'{entry.module}' of block {entry.block}"
    if isinstance(entry, ParameterLora):
        parameter = module._parameters.get(entry.parameter)
        if parameter is None or parameter.dim() not in (2, 3) or parameter.dtype not in _PLAIN_DTYPES:
            raise UnsupportedCallError(f"{where} has no parameter '{entry.parameter}' that can be adapted")
        experts = parameter.shape[0] if parameter.dim() == 3 else 1
        sizes = list(parameter.shape[-2:])
        expected = [experts, *(reversed(sizes) if entry.is_in_out and parameter.dim() == 3 else sizes)]
        got = [entry.num_experts, tensors[1].shape[0], tensors[0].shape[1]]
        if got != expected:
            raise UnsupportedCallError(f"adapter of '{entry.parameter}' at {where} is for {got}, expected {expected}")
        return
    if isinstance(module, nn.Linear):
        size_out, size_in = module.out_features, module.in_features
    elif isinstance(module, Conv1D):
        size_in, size_out = module.weight.shape
    else:
        raise UnsupportedCallError(f"{where} is a {type(module).__name__}, adapters are carried for linear layers")
    if isinstance(entry, Lora):
        got, expected = [tensors[1].shape[0], tensors[0].shape[1]], [size_out, size_in]
    else:
        got, expected = [tensors[0].numel()], [size_in if entry.is_feedforward else size_out]
    if got != expected:
        raise UnsupportedCallError(f"adapter of {where} is for sizes {got}, expected {expected}")


def _install(items: Sequence[_Item], seed: int | None) -> list[Callable[[], None]]:
    """Hook the module of ``items``; returns what undoes it."""
    module, first = items[0].module, items[0].entry
    if isinstance(first, ParameterLora):
        names = {item.entry.parameter for item in items}

        def leave(module: nn.Module, *_: object) -> None:
            for name in names:
                module.__dict__.pop(name, None)

        def enter(module: nn.Module, args: object) -> None:
            for name in sorted(names):  # an attribute of the instance hides the parameter, which stays as it is
                module.__dict__[name] = _adapted_parameter([item for item in items if item.entry.parameter == name])

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        return [*(handle.remove for handle in handles), lambda: leave(module)]
    if isinstance(first, Lora):
        return [module.register_forward_hook(lambda module, args, out: _lora(items, args[0], out, seed)).remove]
    if first.is_feedforward:
        return [module.register_forward_pre_hook(lambda module, args: (_ia3_input(items, args[0]), *args[1:])).remove]
    return [module.register_forward_hook(lambda module, args, out: (out * _ia3_scale(items)).to(out.dtype)).remove]


# --- LoRA -----------------------------------------------------------------------------------------------------------


def _lora(items: Sequence[_Item], x: torch.Tensor, result: torch.Tensor, seed: int | None) -> torch.Tensor:
    """Output of the layer, from its input and its own output. Any shape before the features."""
    dtype = result.dtype
    is_quantized = type(items[0].module).__name__ in _QUANTIZED
    casts = not (is_quantized and torch.is_autocast_enabled())
    for item in items:
        down, up = item.tensors[:2]
        if casts and item.entry.cast_input:
            x = x.to(down.dtype)
        if item.entry.is_dora:
            result = _dora(item, x, result, seed)
            if is_quantized and casts:
                result = result.to(dtype)
        else:
            update = F.linear(F.linear(_dropped(item, x, seed), down), up) * item.entry.scaling
            result = result + (update.to(dtype) if is_quantized and casts else update)
    output: torch.Tensor = result if is_quantized else result.to(dtype)
    return output


def _dora(item: _Item, x: torch.Tensor, result: torch.Tensor, seed: int | None) -> torch.Tensor:
    down, up, magnitude = item.tensors
    module, scaling = item.module, item.entry.scaling
    base: torch.Tensor | None = result
    if item.entry.dropout > 0:
        x, base = _dropped(item, x, seed), None
    identity = torch.eye(down.shape[1], device=down.device, dtype=down.dtype)
    update = F.linear(F.linear(identity, down), up).T.to(x.dtype)
    weight = _weight(module).to(x.dtype)
    by_output = weight.T if isinstance(module, Conv1D) else weight
    total = by_output + scaling * update.detach()
    norm = torch.linalg.norm(total, dim=1).to(total.dtype).detach()
    scale = (magnitude / norm).view(1, -1)
    lora = F.linear(F.linear(x, down), up)
    if base is None:
        base = F.linear(x, by_output)
    elif module.bias is not None:
        base = base - module.bias
    output: torch.Tensor = result + ((scale - 1) * base + scale * lora * scaling)
    return output


def _weight(module: Any) -> torch.Tensor:
    """In full precision where it is quantized."""
    weight: torch.Tensor = module.weight
    if type(module).__name__ == "Linear4bit":
        dequantize: Any = sys.modules["bitsandbytes"].functional.dequantize_4bit
        weight = dequantize(module.weight.data, module.weight.quant_state)
    elif type(module).__name__ == "Linear8bitLt":
        raise UnsupportedCallError("DoRA on peers that hold 8-bit weights is not carried; use LoRA or other peers")
    return weight


def _dropped(item: _Item, x: torch.Tensor, seed: int | None) -> torch.Tensor:
    """``x`` with dropout. The mask is drawn on the CPU, so that a peer with another device draws the same."""
    entry = item.entry
    if entry.dropout == 0.0:
        return x
    text = f"{seed} {entry.block} {entry.module} {item.number}"
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    keep = torch.rand(x.shape, generator=generator) >= entry.dropout
    dropped: torch.Tensor = x * keep.to(x.device, x.dtype) / (1.0 - entry.dropout)
    return dropped


def _adapted_parameter(items: Sequence[_Item]) -> torch.Tensor:
    """The parameter with all its updates, in its own shape and dtype."""
    entry, module = items[0].entry, items[0].module
    weight: torch.Tensor = module._parameters[entry.parameter]
    if len(items) == 1 and entry.num_experts > 1:
        left, right = _factors(items[0])
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            folded: torch.Tensor = torch.baddbmm(weight, left, right, alpha=entry.scaling)
            return folded
    update = _update(items[0]).to(weight.dtype)
    for item in items[1:]:
        update = update + _update(item).to(weight.dtype)
    return weight + update


def _factors(item: _Item) -> tuple[torch.Tensor, torch.Tensor]:
    """The two whose product is the update without scaling: ``[E, out, r]``, ``[E, r, in]`` or both transposed."""
    down, up = item.tensors
    experts = item.entry.num_experts
    a = down.reshape(experts, -1, down.shape[-1])
    b = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    return (a.transpose(-2, -1), b.transpose(-2, -1)) if item.entry.is_in_out else (b, a)


def _update(item: _Item) -> torch.Tensor:
    down, up = item.tensors
    experts, scaling = item.entry.num_experts, item.entry.scaling
    if experts == 1:
        is_slow = up.device.type == "cpu" and up.dtype in (torch.float16, torch.bfloat16)
        product: torch.Tensor = (up.float() @ down.float() if is_slow else up @ down) * scaling
        return product.to(up.dtype)
    a = down.reshape(experts, -1, down.shape[-1])
    b = up.reshape(up.shape[0], -1, experts)
    update: torch.Tensor = torch.einsum("ore,eri->eio" if item.entry.is_in_out else "ore,eri->eoi", b, a) * scaling
    return update


# --- IA3 ------------------------------------------------------------------------------------------------------------


def _ia3_scale(items: Sequence[_Item]) -> torch.Tensor:
    scale: torch.Tensor = items[0].tensors[0].flatten()
    for item in items[1:]:
        scale = scale * item.tensors[0].flatten()
    return scale


def _ia3_input(items: Sequence[_Item], x: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = x.to(items[-1].tensors[0].dtype) * _ia3_scale(items)
    return scaled.to(x.dtype)
