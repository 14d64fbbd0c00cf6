"""Reading adapters off the client's blocks: what peft put into shadow blocks, as entries and live parameters.

peft is not imported: its layers are known by their names. What is not carried is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapter_entries import Entry, Ia3, Lora, ParameterLora
from remote_modules.model.adapters import AdapterSet
from remote_modules.model.shadow import is_shadow

__all__ = ["collect"]

CARRIED = "LoRA (with rsLoRA, DoRA and target_parameters) and IA3 on linear layers"


def collect(blocks: Mapping[int, nn.Module]) -> AdapterSet | None:
    """The active adapters of ``blocks``, shadow blocks by index; None if there are none or they are disabled.

    Raises:
        UnsupportedCallError: something in a block is not carried: the message names it.
    """
    entries: list[Entry] = []
    parameters: list[torch.Tensor] = []
    for index, block in blocks.items():
        for path, layer in _layers_of_others(block, ""):
            for entry, tensors in _read_layer(index, path, layer):
                entries.append(entry)
                parameters.extend(tensors)
    return AdapterSet(tuple(entries), tuple(parameters)) if entries else None


def _layers_of_others(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are no shadows, by path in the block."""
    for name, child in module._modules.items():
        if child is None:
            continue
        child_path = f"{path}.{name}" if path else name
        if is_shadow(child):
            yield from _layers_of_others(child, child_path)
        else:
            yield child_path, child


def _read_layer(block: int, path: str, layer: Any) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    read = _READERS.get(kind)
    if read is None:
        raise UnsupportedCallError(f"{kind} at '{path}' of block {block} is not carried to peers, only {CARRIED}")
    where = f"'{path}' of block {block}"
    base = layer.base_layer
    if not is_shadow(base):
        if kind != _PARAMETER_LORA or f"{type(base).__module__}.{type(base).__name__}" != kind:
            raise UnsupportedCallError(f"adapters of two methods at {where} are not carried to peers; use one of them")
        yield from _read_layer(block, path, base)
    if layer.merged_adapters:
        raise UnsupportedCallError(f"adapters at {where} are merged, but peers keep their weights; unmerge them first")
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise UnsupportedCallError(
            f"hooks at {where} do not run on peers (peft's adapter_names argument makes such hooks); remove them"
        )
    if not layer.disable_adapters:
        for name in layer.active_adapters:
            yield from read(block, path, layer, name)


def _read_lora(block: int, path: str, layer: Any, name: str) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    if name not in layer.lora_A:
        return
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
    if variant not in (None, "DoraLinearVariant"):
        raise UnsupportedCallError(f"{variant} at '{path}' of block {block} is not carried to peers, only {CARRIED}")
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if up.bias is not None:
        raise UnsupportedCallError(f"lora_bias at '{path}' of block {block} is not carried to peers; leave it off")
    entry = Lora(
        block=block,
        module=path,
        scaling=float(layer.scaling[name]),
        is_dora=variant is not None,
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        cast_input=layer.cast_input_dtype_enabled,
    )
    magnitude = [layer.lora_magnitude_vector[name].weight] if entry.is_dora else []
    yield entry, [down.weight, up.weight, *magnitude]


def _read_parameter_lora(block: int, path: str, layer: Any, name: str) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    if name in layer.lora_A:
        entry = ParameterLora(
            block=block,
            module=path,
            parameter=layer.parameter_name,
            scaling=float(layer.scaling[name]),
            num_experts=layer.num_experts,
            is_in_out=bool(getattr(layer.get_base_layer(), "is_transposed", False)),
        )
        yield entry, [layer.lora_A[name].weight, layer.lora_B[name].weight]


def _read_ia3(block: int, path: str, layer: Any, name: str) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    if name in layer.ia3_l:
        yield Ia3(block=block, module=path, is_feedforward=layer.is_feedforward), [layer.ia3_l[name]]


_PARAMETER_LORA = "peft.tuners.lora.layer.ParamWrapper"
_READERS = {
    "peft.tuners.lora.layer.Linear": _read_lora,
    _PARAMETER_LORA: _read_parameter_lora,
    "peft.tuners.ia3.layer.Linear": _read_ia3,
}
