"""Knowing the call that the owner of the blocks received.

Blocks are called with ready 4D masks and rotary tables; what has to travel is the owner's own call. Plain assignment
(``model.model.layers = layers``) gives no back reference, but torch announces each registration of a submodule:
`watch_registrations` uses that to put a pre-hook on the owner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.cache_utils import Cache

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.stack import CACHE_ARGUMENTS, bind_owner_call

__all__ = ["OwnerCall", "OwnerCapture", "watch_registrations"]

_REFUSED = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(slots=True)
class OwnerCall:
    """One running call of the owner.

    Attributes:
        position_ids, attention_mask: as given to the owner.
        cache: the cache that the caller passed in, if any.
        use_cache: as given, or the config's default.
        passed: what the previous remote block returned, to detect work between blocks.
    """

    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    cache: Cache | None = None
    use_cache: bool = True
    passed: torch.Tensor | None = field(default=None, repr=False)


class OwnerCapture:
    """Hooks on one owner module that keep its running call, per thread.

    A callable object rather than a closure: ``copy.deepcopy(model)`` must give the copy a capture of its own.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnerCapture:
        return memo.setdefault(id(self), OwnerCapture())  # type: ignore[no-any-return]

    @property
    def current(self) -> OwnerCall | None:
        """The innermost running call on this thread; None outside of one."""
        calls = getattr(self._local, "calls", None)
        return calls[-1] if calls else None

    def hook(self, owner: nn.Module) -> None:
        """Watch ``owner``; once for each module."""
        if any(isinstance(hook, _Enter) and hook.capture is self for hook in owner._forward_pre_hooks.values()):
            return
        owner.register_forward_pre_hook(_Enter(self), with_kwargs=True)
        owner.register_forward_hook(_Leave(self), always_call=True)

    def enter(self, call: OwnerCall) -> None:
        if not hasattr(self._local, "calls"):
            self._local.calls = []
        self._local.calls.append(call)

    def leave(self) -> None:
        calls = getattr(self._local, "calls", None)
        if calls:
            calls.pop()


@dataclass(frozen=True, slots=True)
class _Enter:
    capture: OwnerCapture

    def __call__(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = OwnerCall()
        self.capture.enter(entered)  # before anything can fail: the leaving hook runs in any case
        call = bind_owner_call(owner, args, kwargs)
        config = getattr(owner, "config", None)
        for name in _REFUSED:
            value = call.get(name)
            if value if value is not None else getattr(config, name, False):
                raise UnsupportedCallError(f"{name}=True is not carried by remote blocks yet; leave it off")
        mask = call.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            kind = f"{mask.dim()}-D tensor" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UnsupportedCallError(f"attention_mask must be [B, P + T] or absent, got a {kind}")
        use_cache = call.get("use_cache")
        entered.position_ids, entered.attention_mask = call.get("position_ids"), mask
        entered.cache = next((call[name] for name in CACHE_ARGUMENTS if call.get(name) is not None), None)
        entered.use_cache = bool(getattr(config, "use_cache", True) if use_cache is None else use_cache)


@dataclass(frozen=True, slots=True)
class _Leave:
    capture: OwnerCapture

    def __call__(self, owner: nn.Module, args: object, output: object) -> None:
        self.capture.leave()


_watch_lock = threading.Lock()
_watched: list[Callable[[nn.Module, str, nn.Module], None]] = []


def watch_registrations(callback: Callable[[nn.Module, str, nn.Module], None]) -> None:
    """Call ``callback(parent, name, child)`` for each submodule registered from now on; once for each callback.

    It runs for every registration in the process, so it must start with one cheap test.
    """
    with _watch_lock:
        if callback not in _watched:
            _watched.append(callback)
            register_module_module_registration_hook(_call_registered(callback))


def _call_registered(
    callback: Callable[[nn.Module, str, nn.Module], None],
) -> Callable[[nn.Module, str, nn.Module | None], None]:
    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            callback(parent, name, child)

    return registered
