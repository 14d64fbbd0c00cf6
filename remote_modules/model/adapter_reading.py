"""Reading adapters off the client's blocks: what was put into shadow blocks, as entries and live parameters.

peft is not imported: its layers are known by their names. What is not carried is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapter_entries import (
    MAX_NEUMANN_TERMS,
    Entry,
    Ia3,
    LoHa,
    LoKr,
    Lora,
    Oft,
    ParameterLora,
    Prompt,
    RowLora,
)
from remote_modules.model.adapter_rows import groups_of, row_names_of
from remote_modules.model.adapters import AdapterSet
from remote_modules.model.block_prompt import BlockPrompt
from remote_modules.model.shadow import is_shadow

__all__ = ["collect"]

CARRIED = "LoRA (with rsLoRA, DoRA and target_parameters), LoHa, LoKr, OFT and IA3 on linear layers, and DeepPrompts"

Read = Iterator[tuple[Entry, list[torch.Tensor]]]


def collect(blocks: Mapping[int, nn.Module]) -> AdapterSet | None:
    """The active adapters of ``blocks``, shadow blocks by index; None if there are none or they are disabled.

    Raises:
        UnsupportedCallError: something in a block is not carried: the message names it.
    """
    entries: list[Entry] = []
    parameters: list[torch.Tensor] = []
    row_names: set[tuple[str, ...]] = set()
    for index, block in blocks.items():
        for path, layer in _layers_of_others(block, ""):
            for entry, tensors in _read_layer(index, path, layer, row_names):
                entries.append(entry)
                parameters.extend(tensors)
    if not entries:
        return None
    if len(row_names) > 1:
        raise UnsupportedCallError("layers of one model were given different adapter_names; give all the same")
    return AdapterSet(tuple(entries), tuple(parameters), *row_names)


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


def _read_layer(block: int, path: str, layer: Any, row_names: set[tuple[str, ...]]) -> Read:
    """Of one layer; notes in ``row_names`` which adapter each row has, if they have different ones."""
    if isinstance(layer, BlockPrompt):
        yield Prompt(block=block), [layer.weight]
        return
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    read = _READERS.get(kind)
    if read is None:
        raise UnsupportedCallError(f"{kind} at '{path}' of block {block} is not carried to peers, only {CARRIED}")
    where = f"'{path}' of block {block}"
    base = layer.base_layer
    if not is_shadow(base):
        if kind != _PARAMETER_LORA or f"{type(base).__module__}.{type(base).__name__}" != kind:
            raise UnsupportedCallError(f"adapters of two methods at {where} are not carried to peers; use one of them")
        yield from _read_layer(block, path, base, row_names)
    if layer.merged_adapters:
        raise UnsupportedCallError(f"adapters at {where} are merged, but peers keep their weights; unmerge them first")
    names = row_names_of(layer, where)
    if names is not None and read is not _read_lora:
        raise UnsupportedCallError(f"adapter_names are carried for LoRA on linear layers, got {kind} at {where}")
    if layer.disable_adapters:
        return
    if names is None:
        for name in layer.active_adapters:
            yield from read(block, path, layer, name)
    else:
        row_names.add(names)
        yield from _read_rows(block, path, layer, names)


def _read_lora(block: int, path: str, layer: Any, name: str) -> Read:
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


def _read_rows(block: int, path: str, layer: Any, names: Sequence[str]) -> Read:
    for name, group in groups_of(names).items():
        for entry, tensors in _read_lora(block, path, layer, name):
            yield _of_rows(entry, group, f"'{path}' of block {block}"), tensors


def _of_rows(entry: Any, group: int, where: str) -> RowLora:
    if entry.is_dora:
        raise UnsupportedCallError(f"DoRA at {where} does not go together with adapter_names, as in peft; use LoRA")
    if entry.is_random:
        raise UnsupportedCallError(f"dropout at {where} does not go together with adapter_names; call eval() first")
    return RowLora(
        block=entry.block, module=entry.module, group=group, scaling=entry.scaling, cast_input=entry.cast_input
    )


def _read_parameter_lora(block: int, path: str, layer: Any, name: str) -> Read:
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


def _read_ia3(block: int, path: str, layer: Any, name: str) -> Read:
    if name in layer.ia3_l:
        yield Ia3(block=block, module=path, is_feedforward=layer.is_feedforward), [layer.ia3_l[name]]


def _read_loha(block: int, path: str, layer: Any, name: str) -> Read:
    if name in layer.hada_w1_a:
        entry = LoHa(**_lycoris_fields(block, path, layer, name))
        yield entry, [layer.hada_w1_a[name], layer.hada_w1_b[name], layer.hada_w2_a[name], layer.hada_w2_b[name]]


def _read_lokr(block: int, path: str, layer: Any, name: str) -> Read:
    if name not in layer._available_adapters:
        return
    entry = LoKr(
        **_lycoris_fields(block, path, layer, name),
        is_w1_whole=name in layer.lokr_w1,
        is_w2_whole=name in layer.lokr_w2,
        scales_dropout=bool(layer.rank_dropout_scale.get(name)),
    )
    yield entry, [getattr(layer, f"lokr_{tensor}")[name] for tensor in entry.tensor_names]


def _lycoris_fields(block: int, path: str, layer: Any, name: str) -> dict[str, Any]:
    """What LoHa and LoKr share."""
    if layer.training and layer.module_dropout[name]:
        # locally, parameters of a layer that is left out get no gradient at all, and from a peer they would get zeros
        raise UnsupportedCallError(f"module_dropout at '{path}' of block {block} is not carried to peers; leave it 0")
    return {
        "block": block,
        "module": path,
        "scaling": float(layer.scaling[name]),
        "rank_dropout": float(layer.rank_dropout[name]) if layer.training else 0.0,
        "cast_input": layer.cast_input_dtype_enabled,
    }


def _read_oft(block: int, path: str, layer: Any, name: str) -> Read:
    if name not in layer.oft_R:
        return
    rotation = layer.oft_R[name]
    where = f"'{path}' of block {block}"
    if rotation.coft:
        raise UnsupportedCallError(
            f"coft at {where} is not carried to peers, it changes weights in each pass; leave it off"
        )
    if rotation.block_size < 2:
        raise UnsupportedCallError(f"oft_block_size 1 at {where} rotates nothing; use at least 2")
    terms = max(1, rotation.num_cayley_neumann_terms) if rotation.use_cayley_neumann else 0
    if terms > MAX_NEUMANN_TERMS:
        raise UnsupportedCallError(
            f"num_cayley_neumann_terms at {where} is {terms}, at most {MAX_NEUMANN_TERMS} are carried to peers"
        )
    entry = Oft(
        block=block,
        module=path,
        size=rotation.block_size,
        num_inputs=rotation.in_features,
        is_shared=rotation.block_share,
        neumann_terms=terms,
        cast_input=layer.cast_input_dtype_enabled,
    )
    yield entry, [rotation.weight]


_PARAMETER_LORA = "peft.tuners.lora.layer.ParamWrapper"
_READERS = {
    "peft.tuners.lora.layer.Linear": _read_lora,
    _PARAMETER_LORA: _read_parameter_lora,
    "peft.tuners.ia3.layer.Linear": _read_ia3,
    "peft.tuners.loha.layer.Linear": _read_loha,
    "peft.tuners.lokr.layer.Linear": _read_lokr,
    "peft.tuners.oft.layer.Linear": _read_oft,
}
