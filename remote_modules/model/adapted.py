"""Running real blocks with a client's adapters, without peft.

Hooks are on the target modules for the time of one pass. Each computes what peft's layer computes, in its order of
operations, so that outputs and gradients are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapted_ia3 import ia3_input, ia3_output
from remote_modules.model.adapted_item import Batch, Item
from remote_modules.model.adapted_lora import lora_output, row_lora_output
from remote_modules.model.adapted_lycoris import updated_output
from remote_modules.model.adapted_oft import rotated_input
from remote_modules.model.adapted_parameter import adapted_parameter
from remote_modules.model.adapted_prompt import prompted_arguments
from remote_modules.model.adapter_entries import (
    Entry,
    Ia3,
    LayerEntry,
    LoHa,
    LoKr,
    Lora,
    Oft,
    ParameterLora,
    Prompt,
    RowLora,
)
from remote_modules.model.adapters import Adapter

__all__ = ["applied", "check_fit"]

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_BATCH = Batch()


@contextmanager
def applied(blocks: Mapping[int, nn.Module], adapter: Adapter, batch: Batch = _NO_BATCH) -> Iterator[None]:
    """Inside, ``blocks`` compute with ``adapter``; gradients flow to its tensors if they require them.

    The tensors must be on the device of the blocks. Not for two threads at once: the blocks themselves are changed.

    Args:
        blocks: real decoder blocks by index; entries of other blocks are left out.
        batch: what request this is; the same in forward and recomputation.

    Raises:
        UnsupportedCallError: an entry does not fit its block, or there is dropout and no seed.
    """
    targets = _targets(blocks, adapter)
    if batch.seed is None and any(item.entry.is_random for items in targets for item in items):
        raise UnsupportedCallError("adapters with dropout need a seed in the request")
    with ExitStack() as hooks:
        for items in targets:
            for handle in _install(items, batch):
                hooks.callback(handle)
        yield


def check_fit(blocks: Mapping[int, nn.Module], adapter: Adapter) -> None:
    """Raises: UnsupportedCallError: an entry does not fit its block."""
    _targets(blocks, adapter)


def _targets(blocks: Mapping[int, nn.Module], adapter: Adapter) -> list[list[Item]]:
    """Items by module, in order of the entries."""
    found: dict[tuple[int, str], list[Item]] = {}
    for entry, tensors in adapter.items():
        block = blocks.get(entry.block)
        if block is None:
            continue
        try:
            module = block.get_submodule(entry.place)
        except AttributeError:
            raise UnsupportedCallError(f"block {entry.block} has no module '{entry.place}' to adapt") from None
        _check_fit(entry, tensors, module)
        items = found.setdefault((entry.block, entry.place), [])
        items.append(Item(entry, tensors, module, len(items)))
    return list(found.values())


def _check_fit(entry: Entry, tensors: Sequence[torch.Tensor], module: nn.Module) -> None:
    if isinstance(entry, ParameterLora):
        _check_parameter(entry, tensors, module)
    elif not isinstance(entry, Prompt):  # the size of hidden states is seen when there are some
        _check_layer(entry, tensors, module)


def _check_parameter(entry: ParameterLora, tensors: Sequence[torch.Tensor], module: nn.Module) -> None:
    where = f"'{entry.module}' of block {entry.block}"
    parameter = module._parameters.get(entry.parameter)
    if parameter is None or parameter.dim() not in (2, 3) or parameter.dtype not in _PLAIN_DTYPES:
        raise UnsupportedCallError(f"{where} has no parameter '{entry.parameter}' that can be adapted")
    experts = parameter.shape[0] if parameter.dim() == 3 else 1
    sizes = list(parameter.shape[-2:])
    expected = [experts, *(reversed(sizes) if entry.is_in_out and parameter.dim() == 3 else sizes)]
    got = [entry.num_experts, tensors[1].shape[0], tensors[0].shape[1]]
    if got != expected:
        raise UnsupportedCallError(f"adapter of '{entry.parameter}' at {where} is for {got}, expected {expected}")


def _check_layer(entry: LayerEntry, tensors: Sequence[torch.Tensor], module: nn.Module) -> None:
    where = f"'{entry.place}' of block {entry.block}"
    if isinstance(module, nn.Linear):
        own = (module.out_features, module.in_features)
    elif isinstance(module, Conv1D) and entry.takes_conv1d:
        own = (module.weight.shape[1], module.weight.shape[0])
    else:
        raise UnsupportedCallError(f"{where} is a {type(module).__name__}, adapters are carried for linear layers")
    pairs = [pair for pair in zip(entry.sizes([tensor.shape for tensor in tensors]), own, strict=True) if pair[0]]
    got, expected = [size for size, _ in pairs], [size for _, size in pairs]
    if got != expected:
        raise UnsupportedCallError(f"adapter of {where} is for sizes {got}, expected {expected}")


def _install(items: Sequence[Item], batch: Batch) -> list[Callable[[], None]]:
    """Hook the module of ``items``; returns what undoes it."""
    module, first = items[0].module, items[0].entry
    if isinstance(first, ParameterLora):
        return _install_parameters(items)
    if isinstance(first, Prompt):
        change = lambda module, args, kwargs: prompted_arguments(items, args, kwargs, batch)  # noqa: E731
        return [module.register_forward_pre_hook(change, with_kwargs=True).remove]
    handles = []
    if isinstance(first, Oft):
        rotate = lambda module, args: (rotated_input(items, args[0]), *args[1:])  # noqa: E731
        handles.append(module.register_forward_pre_hook(rotate))
        handles.append(module.register_forward_hook(lambda module, args, out: out.to(args[0].dtype)))
    elif isinstance(first, Ia3) and first.is_feedforward:
        handles.append(module.register_forward_pre_hook(lambda module, args: (ia3_input(items, args[0]), *args[1:])))
    else:
        output = _OUTPUTS[type(first)]
        handles.append(module.register_forward_hook(lambda module, args, out: output(items, args[0], out, batch)))
    return [handle.remove for handle in handles]


_OUTPUTS: dict[type, Callable[[Sequence[Item], torch.Tensor, torch.Tensor, Batch], torch.Tensor]] = {
    Lora: lora_output,
    RowLora: row_lora_output,
    Ia3: ia3_output,
    LoHa: updated_output,
    LoKr: updated_output,
}


def _install_parameters(items: Sequence[Item]) -> list[Callable[[], None]]:
    module = items[0].module
    names = {item.entry.parameter for item in items}

    def leave(module: nn.Module, *_: object) -> None:
        for name in names:
            module.__dict__.pop(name, None)

    def enter(module: nn.Module, args: object) -> None:
        for name in sorted(names):  # an attribute of the instance hides the parameter, which stays as it is
            module.__dict__[name] = adapted_parameter([item for item in items if item.entry.parameter == name])

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    return [*(handle.remove for handle in handles), lambda: leave(module)]
