"""Shadow blocks: the module tree of a decoder block without its parameters.

The client puts one in the place of each remote block. Its classes, names, shapes and dtypes are those of the real
block, so that peft finds and wraps what it looks for; its ``forward`` is whatever the client sets. All parameters
that ever appear below a shadow block are therefore adapters.

``weight`` and ``bias`` are `ShadowTensor`: they know their shape, dtype and device and cost one element of memory.
Values are read where the true weight is, when somebody computes with them, and never invented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._C import DisableTorchFunctionSubclass  # no public name; documented as the way to write __torch_function__

from remote_modules.errors import UnsupportedCallError

__all__ = ["ShadowTensor", "is_shadow", "shadow_block"]

WeightReader = Callable[[str], torch.Tensor]

_TENSOR: Any = torch.Tensor  # mypy takes its properties for what they return
# What is known without values. Everything that is in no table here reads the weight.
_KNOWN = {
    *(
        getattr(_TENSOR, name).__get__
        for name in (
            *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
            *("requires_grad", "is_leaf", "grad", "grad_fn", "retains_grad", "_base", "output_nr", "_version"),
            *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_quantized", "is_sparse", "is_sparse_csr"),
            *("is_mkldnn", "is_nested", "is_vulkan", "is_mtia", "is_maia", "is_ipu"),
        )
    ),
    *(_TENSOR.size, _TENSOR.dim, _TENSOR.ndimension, _TENSOR.numel, _TENSOR.nelement, _TENSOR.element_size),
    *(_TENSOR.is_floating_point, _TENSOR.is_complex, _TENSOR.is_signed, _TENSOR.get_device, _TENSOR.is_inference),
    *(_TENSOR.__len__, _TENSOR.__hash__),
    *(torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel, torch.is_tensor),
    # New tensors of the same shape, dtype or device.
    *(_TENSOR.new_empty, _TENSOR.new_zeros, _TENSOR.new_ones, _TENSOR.new_full, _TENSOR.new_tensor),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
}
_ITSELF = {_TENSOR.detach, _TENSOR.data.__get__, torch.detach, _TENSOR.__deepcopy__}
_LAYOUT = {_TENSOR.stride, _TENSOR.is_contiguous}
_SET_REQUIRES_GRAD = {_TENSOR.requires_grad_, _TENSOR.requires_grad.__set__}
_WRITES = {
    _TENSOR.__setitem__,
    *(
        function
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
        if (function := getattr(_TENSOR, f"__i{name}__", None)) is not None
    ),
}


class ShadowTensor(torch.Tensor):
    """A weight that is elsewhere.

    Attributes:
        shadow_name: its name in the block, such as ``"self_attn.q_proj.weight"``.
    """

    shadow_name: str
    _read: WeightReader | None
    _is_hf_initialized = True  # transformers leaves it alone when it fills in what a checkpoint lacks

    @staticmethod
    def of(spec: _Weight) -> ShadowTensor:
        # NaN, so that code that gets past __torch_function__ cannot go on unnoticed.
        fill = float("nan") if spec.dtype.is_floating_point else 0
        element = torch.full((), fill, dtype=spec.dtype, device=spec.device)
        tensor = element.expand(spec.shape).as_subclass(ShadowTensor)
        tensor.shadow_name, tensor._read = spec.name, spec.read
        return tensor

    def true_value(self) -> torch.Tensor:
        """The weight itself, in this dtype and on this device.

        Raises:
            UnsupportedCallError: it cannot be read here, or what was read has another shape.
        """
        if self._read is None:
            raise UnsupportedCallError(
                f"weight '{self.shadow_name}' is on remote peers and was asked for its values here; open the model "
                "from a checkpoint to have it read, or choose an initialization that does not look at weights"
            )
        value = self._read(self.shadow_name)
        if value.shape != self.shape:
            raise UnsupportedCallError(
                f"weight '{self.shadow_name}' was read with shape {list(value.shape)}, expected {list(self.shape)}"
            )
        return value.detach().to(self.device, self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], cls) else None
        if first is not None:
            if func in _KNOWN:
                with DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _ITSELF:
                return first
            if func in _LAYOUT:  # that of the weight, not of the view that stands for it
                return func(torch.empty(first.shape, device="meta"), *args[1:], **kwargs)
            if func in _SET_REQUIRES_GRAD:
                if args[1:] == (False,) or kwargs.get("requires_grad") is False:
                    return first
                raise UnsupportedCallError(
                    f"weight '{first.shadow_name}' is on remote peers, which never change it: requires_grad must stay "
                    "False; train adapters instead"
                )
            if _is_write(func):
                raise UnsupportedCallError(
                    f"weight '{first.shadow_name}' is on remote peers and cannot be changed from here; choose a method "
                    "that leaves the weights of the model as they are"
                )
        return func(*_true_values(args), **_true_values(kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ShadowTensor('{self.shadow_name}', {list(self.shape)}, {dtype}, {self.device})"


def _is_write(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return func in _WRITES or name == "__set__" or (name.endswith("_") and not name.endswith("__"))


def _true_values(value: Any) -> Any:
    if isinstance(value, ShadowTensor):
        return value.true_value()
    if isinstance(value, dict):
        return {key: _true_values(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_true_values(item) for item in value)
    return value


@dataclass(slots=True)
class _Weight:
    """What is known of one parameter or buffer of the real block. One for each shadow: `_apply` changes it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    read: WeightReader | None
    is_parameter: bool

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype, self.device = moved.dtype, moved.device

    def __deepcopy__(self, memo: dict[int, Any]) -> _Weight:  # a copied model reads from the same place
        return _Weight(self.name, self.shape, self.dtype, self.device, self.read, self.is_parameter)


class _Shadow(nn.Module):
    """Mixed in before the class of a real module."""

    _weights: dict[str, _Weight]
    _is_hf_initialized = True

    def __getattr__(self, name: str) -> Any:
        weight = self.__dict__.get("_weights", {}).get(name)
        return super().__getattr__(name) if weight is None else ShadowTensor.of(weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_weights", ()):
            full_name = self._weights[name].name
            raise UnsupportedCallError(
                f"weight '{full_name}' is on remote peers and cannot be replaced from here; choose a method that "
                "leaves the weights of the model as they are"
            )
        super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Adapters; with ``recurse=False`` the module's own shadows, too: peft finds fused experts in no other way."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if not recurse:
            yield from ((f"{prefix}.{name}" if prefix else name, shadow) for name, shadow in self._shadows())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Adapters, and the module's own shadows: peft asks the first one where it is. Models never call this one."""
        yield from (parameter for _, parameter in super().named_parameters(recurse=recurse))
        yield from (shadow for _, shadow in self._shadows())

    def _shadows(self) -> Iterator[tuple[str, Any]]:
        return ((name, ShadowTensor.of(weight)) for name, weight in self._weights.items() if weight.is_parameter)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # What to(), half(), cuda() and the like call: no public method sees them all.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self._weights.values():
            weight.apply(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedCallError(
            f"a {type(self).__name__} inside of a remote block was called, but runs on its peer; call the whole model"
        )


@cache
def _shadow_class(cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    shadow = type(cls.__name__, (_Shadow, cls), names)
    # transformers' GradientCheckpointingLayer wraps the forward of each subclass. A peer recomputes its blocks anyway:
    # a checkpoint around a remote call would only make it twice.
    shadow.forward = _Shadow.forward  # type: ignore[attr-defined]
    return shadow


def is_shadow(module: nn.Module) -> bool:
    """Whether ``module`` is a shadow block or a part of one; adapters inside are not."""
    return isinstance(module, _Shadow)


def shadow_block(
    block: nn.Module,
    forward: Callable[..., Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    read_weight: WeightReader | None,
) -> nn.Module:
    """The module tree of ``block`` without memory, whose call is ``forward``.

    Args:
        block: a decoder block, on the meta device; left as it is.
        forward: called with the block's arguments. It is the attribute ``forward`` of the result and may be set anew.
            ``copy.deepcopy`` copies the object of a bound method along (and finds the copied block in it), but shares
            plain functions: pass a bound method where a copy must call something of its own.
        dtype: what floating-point weights claim to have, and what peft then makes adapters of.
        device: where weights claim to be, and where peft then puts adapters.
        read_weight: gives the weight of a name in the block, such as ``"self_attn.q_proj.weight"``; None if weights
            cannot be had here, and computing with one is then an `UnsupportedCallError`.
    """
    maker = _Maker(dtype, torch.device(device), read_weight, {})
    shadow = maker.make(block, "")
    shadow.__dict__["forward"] = forward
    return shadow


@dataclass(frozen=True, slots=True)
class _Maker:
    dtype: torch.dtype
    device: torch.device
    read: WeightReader | None
    made: dict[int, nn.Module]

    def make(self, module: nn.Module, prefix: str) -> nn.Module:
        """The shadow of ``module``; the same one where a module is in the tree twice."""
        if id(module) in self.made:
            return self.made[id(module)]
        cls = _shadow_class(type(module))  # type: ignore[arg-type]
        shadow = self.made[id(module)] = cls.__new__(cls)
        # The attributes of the architecture, but torch's own state (hooks, parameters, buffers, children) of a new one.
        shadow.__dict__.update({**module.__dict__, **nn.Module().__dict__})
        shadow.__dict__["training"] = module.training
        weights = {}
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    (shadow._parameters if is_parameter else shadow._buffers)[name] = None
                    continue
                dtype = self.dtype if tensor.dtype.is_floating_point else tensor.dtype
                weights[name] = _Weight(prefix + name, tensor.shape, dtype, self.device, self.read, is_parameter)
        shadow.__dict__["_weights"] = weights
        for name, child in module._modules.items():
            shadow._modules[name] = None if child is None else self.make(child, f"{prefix}{name}.")
        return shadow
