"""Several adapters in one batch: which row has which, as peft's ``adapter_names`` say it.

While a call with that argument runs, peft has a hook on each of its layers that holds the names; they are read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adapter_entries import MAX_AT_PLACE

__all__ = ["groups_of", "row_names_of"]

BASE = "__base__"  # peft's name for a row without any


def row_names_of(layer: Any, where: str) -> tuple[str, ...] | None:
    """The adapter of each row at a layer of peft; None where all rows have the active ones.

    Args:
        where: the layer, for errors.

    Raises:
        UnsupportedCallError: there are hooks of other kinds, or names that cannot be carried.
    """
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    if not hooks:
        return None
    if len(hooks) > 1 or not _is_of_names(hooks[0]):
        raise UnsupportedCallError(f"hooks at {where} do not run on peers, but for those of peft's adapter_names")
    names = tuple(hooks[0].keywords["adapter_names"])
    num_adapters = len(groups_of(names)) - 1
    if num_adapters > MAX_AT_PLACE:
        raise UnsupportedCallError(
            f"adapter_names are carried for {MAX_AT_PLACE} adapters in a batch, got {num_adapters}"
        )
    return names


def groups_of(names: Sequence[str]) -> dict[str, int]:
    """The numbers that stand for adapters; 0 for none."""
    return {BASE: 0, **{name: number for number, name in enumerate(sorted(set(names) - {BASE}), 1)}}


def _is_of_names(hook: Any) -> bool:
    return isinstance(hook, partial) and getattr(hook.func, "__name__", "") == "_adapter_names_pre_forward_hook"
