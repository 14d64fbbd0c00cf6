"""From the owner's call, as it was captured, to what travels."""

from __future__ import annotations

from typing import Any

import torch

from remote_modules.client.adapters import CallAdapter, row_names
from remote_modules.client.call import CallArguments, Named
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.capture import OwnerCall
from remote_modules.model.stack import StackSpec
from remote_modules.model.tensors import TensorSpec

__all__ = ["argument_of", "call_arguments", "own"]


def call_arguments(call: OwnerCall, stack: StackSpec, adapter: CallAdapter | None) -> CallArguments:
    """What travels beside the blocks' own inputs; side inputs as they are, since they take part in the gradient.

    Raises:
        UnsupportedCallError: a gradient is wanted of something that is given to the owner alone.
    """
    hidden_states = call.entry["hidden_states"]
    if not call.rows:
        call.rows, call.num_tokens = _batch_of(hidden_states, stack.hidden)
    for name, tensor in call.tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled() and name not in stack.indirect:
            raise UnsupportedCallError(f"gradients of the owner's argument '{name}' are not carried; detach it")
    record: Any = ("hidden_states", *call.record) if call.record else ()  # each block returns its true output
    mask = call.attention_mask
    return CallArguments(
        rows=call.rows,
        num_tokens=call.num_tokens,
        position_ids=_small(call.position_ids),
        attention_mask={kind: _small(m) for kind, m in mask.items()} if isinstance(mask, dict) else _small(mask),
        tensors={name: tensor.detach().cpu() for name, tensor in call.tensors.items()},
        sides=call.sides,
        options=call.options,
        use_cache=call.use_cache,
        autocast=_autocast_name(hidden_states),
        record=tuple(dict.fromkeys(record)),
        adapter=adapter,
        row_names=row_names(adapter, call.rows),
    )


def argument_of(args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str) -> Any:
    """The argument at a position or of a name; None if it was not given."""
    if isinstance(key, int):
        return args[key] if key < len(args) else None
    return kwargs.get(key)


def own(tensors: Named) -> Named:
    """Copies of one's own on the CPU: the history keeps them, whatever the caller does to the originals."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _small(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu")


def _batch_of(hidden_states: torch.Tensor, spec: TensorSpec) -> tuple[int, int]:
    """Rows and tokens of hidden states."""
    rows = 1 if spec.batch is None else hidden_states.shape[spec.batch]
    return rows, 1 if spec.time is None else hidden_states.shape[spec.time]


def _autocast_name(hidden_states: torch.Tensor) -> str:
    kind = hidden_states.device.type
    if not torch.is_autocast_enabled(kind):
        return ""
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
