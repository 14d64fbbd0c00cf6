"""Which remote blocks of a list run as one pass inside of a model's loop.

Neighbours that are in the list themselves run together. A block that a module of the user's is wrapped around runs
alone: its input and its output are that module's business.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.shadow import is_shadow
from remote_modules.spans import Span

__all__ = ["has_wrapped", "remote_blocks", "run_at"]


def remote_blocks(modules: Iterable[nn.Module], blocks: Span) -> dict[int, nn.Module]:
    """The shadows in a list that are ``blocks``, by index; wrapped ones, too.

    Raises:
        UnsupportedCallError: some were taken out of the list.
    """
    return dict(zip(blocks, filter(None, map(_shadow_in, _holding(modules, blocks))), strict=True))


def has_wrapped(modules: Iterable[nn.Module]) -> bool:
    return any(not is_shadow(module) and _shadow_in(module) is not None for module in modules)


def run_at(modules: Iterable[nn.Module], blocks: Span, index: int) -> Span:
    """The blocks that run together from block ``index`` on, which is the first of them.

    Raises:
        UnsupportedCallError: some were taken out of the list.
    """
    held = _holding(modules, blocks)[index - blocks.start :]
    bare = next((count for count, module in enumerate(held) if not is_shadow(module)), len(held))
    return Span(index, index + max(1, bare))


def _holding(modules: Iterable[nn.Module], blocks: Span) -> list[nn.Module]:
    """The entries of the list that are or contain ``blocks``."""
    held = [module for module in modules if _shadow_in(module) is not None]
    if len(held) != len(blocks):
        text = f"{len(held)} of the remote blocks {blocks} are left in their list; put back what was taken out"
        raise UnsupportedCallError(text)
    return held


def _shadow_in(module: nn.Module) -> nn.Module | None:
    """The shadow block that an entry of the list is or contains."""
    if is_shadow(module):
        return module
    return next(filter(is_shadow, module.modules()), None)
