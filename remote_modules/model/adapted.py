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
from remote_modules.model.adapted_ia3 import ia3_input, ia3_scale
from remote_modules.model.adapted_item import Item
from remote_modules.model.adapted_lora import lora_output
from remote_modules.model.adapted_parameter import adapted_parameter
from remote_modules.model.adapter_entries import Entry, Lora, ParameterLora
from remote_modules.model.adapters import Adapter

__all__ = ["applied", "check_fit"]

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


def _targets(blocks: Mapping[int, nn.Module], adapter: Adapter) -> list[list[Item]]:
    """Items by module, in order of the entries."""
    found: dict[tuple[int, str], list[Item]] = {}
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
        items.append(Item(entry, tensors, module, len(items)))
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


def _install(items: Sequence[Item], seed: int | None) -> list[Callable[[], None]]:
    """Hook the module of ``items``; returns what undoes it."""
    module, first = items[0].module, items[0].entry
    if isinstance(first, ParameterLora):
        names = {item.entry.parameter for item in items}

        def leave(module: nn.Module, *_: object) -> None:
            for name in names:
                module.__dict__.pop(name, None)

        def enter(module: nn.Module, args: object) -> None:
            for name in sorted(names):  # an attribute of the instance hides the parameter, which stays as it is
                module.__dict__[name] = adapted_parameter([item for item in items if item.entry.parameter == name])

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        return [*(handle.remove for handle in handles), lambda: leave(module)]
    if isinstance(first, Lora):
        return [module.register_forward_hook(lambda module, args, out: lora_output(items, args[0], out, seed)).remove]
    if first.is_feedforward:
        return [module.register_forward_pre_hook(lambda module, args: (ia3_input(items, args[0]), *args[1:])).remove]
    return [module.register_forward_hook(lambda module, args, out: (out * ia3_scale(items)).to(out.dtype)).remove]
