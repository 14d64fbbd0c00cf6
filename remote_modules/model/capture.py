"""Knowing the call that the owner of the blocks received.

Blocks are called with ready 4D masks and rotary tables; what has to travel is the owner's own call. Plain assignment
(``model.model.layers = layers``) gives no back reference, but torch announces each registration of a submodule:
`watch_registrations` uses that to put a pre-hook on the owner.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, EncoderDecoderCache

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.stack import CACHE_ARGUMENTS, INPUT_ARGUMENTS, bind_owner_call
from remote_modules.spans import Span

__all__ = ["OwnerCall", "OwnerCapture", "keep_recording", "plain_cache", "record_once", "watch_registrations"]

Mask = torch.Tensor | dict[str, torch.Tensor | None]

_RECORDS = ("hidden_states", "router_logits")
_READ = {"input_ids", *INPUT_ARGUMENTS, *CACHE_ARGUMENTS, "attention_mask", "position_ids", "use_cache"}
# About what the owner returns, which is decided here, or about work after the blocks.
_LOCAL = {"return_dict", "num_items_in_batch", "logits_to_keep", "labels", "output_attentions"}
_LOCAL |= {f"output_{name}" for name in _RECORDS}
_LOCAL |= {"tokenizer", "assistant_tokenizer"}  # what stops `generate`, which passes it on to the model


@dataclass(slots=True)
class OwnerCall:
    """One running call of the owner.

    Attributes:
        rows, num_tokens: shape of its inputs ``[B, T]``; 0 if it was not given any.
        position_ids, attention_mask: as given to the owner.
        tensors, options: its other arguments.
        cache: the cache that the caller passed in, if any.
        use_cache: as given, or the config's default.
        record: which outputs of each block are asked for.
        passed: what the previous remote block returned, to detect work between blocks.
        entry: what entered the first remote block, by the names that travel.
        sides: side inputs of the blocks called so far, by the names that travel.
        run: the remote blocks that run as one pass, of which the current one is; `client.runs`.
        outputs: what the blocks returned, when they ran before they were called.
    """

    rows: int = 0
    num_tokens: int = 0
    position_ids: torch.Tensor | None = None
    attention_mask: Mask | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    cache: Cache | None = None
    use_cache: bool = True
    record: tuple[str, ...] = ()
    passed: torch.Tensor | None = field(default=None, repr=False)
    entry: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    sides: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    run: Span | None = None
    outputs: dict[str, torch.Tensor] | None = field(default=None, repr=False)


class OwnerCapture:
    """Hooks on one owner module that keep its running call, per thread.

    A callable object rather than a closure: ``copy.deepcopy(model)`` must give the copy a capture of its own.

    Args:
        no_cache: what to say to a call that brings a KV cache; "" if such calls are carried.
    """

    def __init__(self, no_cache: str = "") -> None:
        self.no_cache = no_cache
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnerCapture:
        return memo.setdefault(id(self), OwnerCapture(self.no_cache))  # type: ignore[no-any-return]

    @property
    def current(self) -> OwnerCall | None:
        """The innermost running call on this thread; None outside of one."""
        calls = getattr(self._local, "calls", None)
        return calls[-1] if calls else None

    def hook(self, owner: nn.Module) -> list[RemovableHandle]:
        """Watch ``owner``; once for each module."""
        if any(isinstance(hook, _Enter) and hook.capture is self for hook in owner._forward_pre_hooks.values()):
            return []
        return [
            owner.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            owner.register_forward_hook(_Leave(self), always_call=True),
        ]

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
        if _flag(call, config, "output_attentions"):
            raise UnsupportedCallError("output_attentions=True is not carried by remote blocks; leave it off")
        entered.record = tuple(name for name in _RECORDS if _flag(call, config, f"output_{name}"))
        inputs = next((call[name] for name in ("input_ids", *INPUT_ARGUMENTS) if call.get(name) is not None), None)
        if isinstance(inputs, torch.Tensor) and inputs.dim() >= 2:
            entered.rows, entered.num_tokens = inputs.shape[0], inputs.shape[1]
        entered.attention_mask = _mask(call.get("attention_mask"))
        entered.position_ids = call.get("position_ids")
        entered.cache = next((call[name] for name in CACHE_ARGUMENTS if call.get(name) is not None), None)
        if entered.cache is not None and self.capture.no_cache:  # at once: the owner may stumble over it first
            raise UnsupportedCallError(self.capture.no_cache)
        use_cache = call.get("use_cache")
        entered.use_cache = bool(getattr(config, "use_cache", True) if use_cache is None else use_cache)
        for name, value in call.items():
            if name not in _READ | _LOCAL and value is not None:
                _note(entered, name, value)


def _flag(call: Mapping[str, Any], config: object, name: str) -> bool:
    value = call.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def _mask(mask: object) -> Mask | None:
    if mask is None or _is_mask(mask):
        return mask  # type: ignore[return-value]
    if isinstance(mask, Mapping) and all(part is None or _is_mask(part) for part in mask.values()):
        return {str(kind): part for kind, part in mask.items()}
    kind = f"{mask.dim()}-D tensor" if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise UnsupportedCallError(f"attention_mask must be [B, P + T], [B, h, T, P + T] or a dict of these, got a {kind}")


def _is_mask(mask: object) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() in (2, 3, 4)


def _note(entered: OwnerCall, name: str, value: object) -> None:
    if isinstance(value, torch.Tensor):
        entered.tensors[name] = value
    elif isinstance(value, bool | int | float | str):
        entered.options[name] = value
    else:
        raise UnsupportedCallError(f"argument '{name}' of kind {type(value).__name__} is not carried by remote blocks")


def plain_cache(cache: Cache | None) -> Cache | None:
    """The cache of self-attention, which is all that remote blocks keep."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@dataclass(frozen=True, slots=True)
class _Leave:
    capture: OwnerCapture

    def __call__(self, owner: nn.Module, args: object, output: object) -> None:
        self.capture.leave()


def keep_recording(old: nn.Module | None, new: nn.Module) -> bool:
    """Give ``new`` the hooks by which transformers records what modules of ``old`` return; whether there were any.

    They are put there once, in the first call that records, and whoever called for them may be far above the owner.
    """
    places = dict(new.named_modules())
    found = False
    for name, module in old.named_modules() if old is not None else ():
        for hook in filter(_records, module._forward_hooks.values()):
            found = True
            if name in places and places[name] is not module:
                places[name].register_forward_hook(hook)
    return found


def record_once(blocks: nn.Module) -> None:
    """Drop such hooks that are there twice: each model that ``blocks`` were assigned to puts its own."""
    for module in blocks.modules():
        seen = set()
        for number, hook in list(module._forward_hooks.items()):
            if _records(hook):
                variables = inspect.getclosurevars(hook).nonlocals
                kind = variables["key"], variables["index"]
                if kind in seen:
                    del module._forward_hooks[number]
                seen.add(kind)


def _records(hook: object) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


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
