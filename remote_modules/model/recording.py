"""Router logits of mixture-of-experts blocks, and the place where transformers looks for them.

transformers records outputs (``output_router_logits=True``) by hooks on modules of certain classes. A peer finds
the same modules in its blocks and returns what they gave; a client lets the hooks of its shadow modules see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["RouterTaps", "records_parts", "router_of", "show_router_logits"]

KEY = "router_logits"


class RouterTaps:
    """Watches the routers of ``blocks``, as the classes of ``model`` say which modules they are."""

    def __init__(self, model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> None:
        self._routers: dict[int, tuple[nn.Module, int]] = {}
        for index, block in blocks.items():
            found = router_of(model, block)
            if found is not None:
                self._routers[index] = found

    @contextmanager
    def recording(self, is_on: bool) -> Iterator[dict[int, torch.Tensor]]:
        """Logits by block, filled while the context is open."""
        logits: dict[int, torch.Tensor] = {}
        handles = []
        if is_on:
            for index, (router, position) in self._routers.items():

                def hook(
                    module: nn.Module, args: object, output: Any, index: int = index, position: int = position
                ) -> None:
                    logits[index] = output[position] if isinstance(output, tuple) else output

                handles.append(router.register_forward_hook(hook))
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()


def router_of(model: PreTrainedModel, block: nn.Module) -> tuple[nn.Module, int] | None:
    """The router of ``block``, and at which position of its output the logits are; None for a dense block."""
    for target, name, position in _targets(model, KEY):
        for path, part in block.named_modules():
            if isinstance(part, target) and (name is None or f".{name}." in f".{path}."):
                return part, position
    return None


def records_parts(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether transformers takes hidden states from parts inside of some blocks, which are not at the client."""
    kinds = tuple(target for target, _, _ in _targets(model, "hidden_states"))
    return bool(kinds) and not all(isinstance(block, kinds) for block in blocks)


def _targets(model: PreTrainedModel, key: str) -> Iterator[tuple[type[nn.Module], str | None, int]]:
    """Class, name and position of output of what ``model`` and its parts record as ``key``."""
    for module in model.modules():
        recorders: Any = getattr(module, "_can_record_outputs", None)
        if not isinstance(recorders, Mapping) or key not in recorders:
            continue
        entries = recorders[key]
        for entry in entries if isinstance(entries, list) else [entries]:
            target = getattr(entry, "target_class", entry)
            if isinstance(target, type):
                yield target, getattr(entry, "layer_name", None), int(getattr(entry, "index", 1))


def show_router_logits(model: PreTrainedModel, block: nn.Module, logits: torch.Tensor) -> None:
    """Call the router of a shadow ``block`` so that the hooks on it see ``logits``.

    Args:
        model: whose classes say which module is a router.
    """
    found = router_of(model, block)
    if found is None:
        return
    router, position = found
    output = (*(None for _ in range(position)), logits)
    router.__dict__["forward"] = lambda: output
    try:
        router()
    finally:
        del router.__dict__["forward"]
