"""Building a model in part: the class that `from_pretrained` fills is one whose ``__init__`` takes away the rest.

What is not held is replaced by shadows (`model.shadow`), which have all attributes of the real modules and no weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from remote_modules.model.shadow import is_shadow, shadow_block
from remote_modules.model.stack import StackSpec

__all__ = ["KeepBlock", "UnknownArgument", "head_tensors", "kept_tensors", "prune", "pruned_class"]

_MAX_SMALL_ROWS = 64  # fewer than any vocabulary, a tiny model's too

KeepBlock = Callable[[int | None], bool]  # of a block's number; None for what is around the blocks


class UnknownArgument(TypeError):
    """A keyword argument that neither `from_pretrained` nor the class takes."""


def pruned_class(
    cls: type[PreTrainedModel], stack: StackSpec, keep_block: KeepBlock, *, with_head: bool = True
) -> type[PreTrainedModel]:
    """``cls`` with only the wanted part of its modules; the instance's class is to be set back after loading."""

    def build_then_prune(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        unknown = sorted(kwargs.keys() - inspect.signature(cls.__init__).parameters.keys())
        if unknown:
            raise UnknownArgument(f"unexpected keyword arguments {unknown}; from_pretrained takes none of that name")
        cls.__init__(self, config, *args, **kwargs)
        prune(self, stack, keep_block, with_head=with_head)

    members: dict[str, Any] = {
        "__init__": build_then_prune,
        "__module__": cls.__module__,  # for classes from elsewhere, transformers skips the renaming of old keys
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(cls.__name__, (cls,), members)


def kept_tensors(
    skeleton: PreTrainedModel, stack: StackSpec, keep_block: KeepBlock, *, with_head: bool = True
) -> frozenset[str]:
    """Tensors outside the wanted blocks that the part needs all the same, by name; ``skeleton`` is pruned by this."""
    prune(skeleton, stack, keep_block, with_head=with_head)
    where = stack.blocks_of_keys(dict(skeleton.named_parameters()))
    return frozenset(name for name, _ in skeleton.named_parameters() if not keep_block(where.get(name)))


def head_tensors(model: PreTrainedModel) -> frozenset[str]:
    """Those that the LM head has for itself, by name."""
    head, ties = model.get_output_embeddings(), getattr(model, "all_tied_weights_keys", {})
    if head is None:
        return frozenset()
    path = next(name for name, module in model.named_modules() if module is head)
    names = frozenset(f"{path}.{name}" for name, _ in head.named_parameters())
    return frozenset() if names.intersection([*ties, *ties.values()]) else names


def prune(model: PreTrainedModel, stack: StackSpec, keep_block: KeepBlock, *, with_head: bool = True) -> None:
    """Replace all modules of ``model`` that are not wanted by shadows, in place."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    blocks = stack.blocks(model)
    shared = _shared_with_kept(ties, stack, keep_block)
    for index in range(len(blocks)):
        if not keep_block(index):
            prefix = f"{stack.path}.{index}."
            held = [name.removeprefix(prefix) for name in shared if name.startswith(prefix)]
            blocks[index] = _skipped_but(blocks[index], held)
    if not keep_block(None):
        _prune_around(model, stack.path)
    elif not with_head and not is_shadow(head := model.get_output_embeddings()):
        model.set_output_embeddings(_skipped(head, _zeros_of(head)))
    real = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.all_tied_weights_keys = {a: b for a, b in ties.items() if a in real and b in real}


def _shared_with_kept(ties: dict[str, str], stack: StackSpec, keep_block: KeepBlock) -> list[str]:
    """Weights of other blocks that kept blocks share: every peer holds its own copy."""
    where = stack.blocks_of_keys([*ties, *ties.values()])
    return [
        source
        for target, source in ties.items()
        if where.get(target) is not None and keep_block(where[target]) and not keep_block(where.get(source))
    ]


def _skipped_but(block: nn.Module, held: Iterable[str]) -> nn.Module:
    """A shadow of ``block`` in which the modules that have the tensors ``held`` are real."""
    shadow = _skipped(block, passed_on)
    for name in held:
        path = name.rpartition(".")[0]
        parent, _, leaf = path.rpartition(".")
        shadow.get_submodule(parent)._modules[leaf] = block.get_submodule(path)
    return shadow


def _prune_around(model: nn.Module, path: str) -> None:
    """Replace every module with parameters that lies outside the list at ``path``.

    Embeddings of positions stay: they are small, and in some architectures blocks get them as arguments.
    """
    head, _, rest = path.partition(".")
    for name, child in list(model.named_children()):
        if name == head:
            if rest:
                _prune_around(child, rest)
        elif isinstance(child, nn.ModuleList | nn.ModuleDict):
            _prune_around(child, "")
        elif not _is_of_positions(child) and any(True for _ in child.parameters()):
            setattr(model, name, _skipped(child, _zeros_of(child)))


def _is_of_positions(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and "osition" in type(module).__name__


def _skipped(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    if is_shadow(module):
        return module
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return shadow_block(module, forward, dtype=dtype, device="cpu", read_weight=_reader_of(module))


def _reader_of(module: nn.Module) -> Callable[[str], torch.Tensor] | None:
    """Some owners add a weight of a small module to hidden states that nobody uses: any values will do.

    Not for embeddings of words, which some owners search through: these are given token ids instead.
    """
    if isinstance(module, nn.Embedding) and module.num_embeddings > _MAX_SMALL_ROWS:
        return None
    shapes = {name: tensor.shape for name, tensor in module.named_parameters()}
    return lambda name: torch.zeros(()).expand(shapes[name])


def passed_on(*args: Any, **kwargs: Any) -> Any:
    """The call of what is not held and whose result nobody uses: a block of another peer, a norm, a head."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def _zeros_of(module: nn.Module) -> Callable[..., Any]:
    """A call that gives zeros of the shape that ``module`` would; owners reshape and add what they get."""
    if isinstance(module, nn.Embedding):
        width = module.embedding_dim

        def embed(*args: Any, **kwargs: Any) -> torch.Tensor:
            ids = args[0] if args else None
            if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
                return torch.zeros(())  # of a class with another call; it is added to something
            return torch.zeros((*ids.shape, width), device=ids.device)

        return embed
    if isinstance(module, nn.Linear):
        features = module.out_features
        return lambda inputs: inputs.new_zeros((*inputs.shape[:-1], features))
    return passed_on
