"""Forwards that a backward follows: their graphs, what these hold in memory, and the gradients that come out of them.

A backward recomputes the forward, or uses the graph that was kept of it; both come through `Graph`, so the numbers are
the same. Where the graph of a whole span has no room, the span is done block by block, last one first: then one block's
graph is in memory at a time, and each block is run twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import saved_tensors_hooks

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import SpanCache
from remote_modules.model.past import fill, select_layers
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.server.checks import RequestTensors
from remote_modules.server.transfers import to_cpu
from remote_modules.spans import Span

__all__ = ["Graph", "answer_by_block", "forgetting", "given_cache", "is_out_of_memory", "leaf_of"]

Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Graph:
    """A forward that was done, ready for one backward.

    Attributes:
        blocks, num_tokens: what was run; rows x tokens.
        outputs: of the last block, and what was recorded; with their history.
        leaves: what gradients are wanted of, by name: inputs, ``past``, and ``adapter.<n>``.
        dtypes: in which those gradients are answered.
        num_bytes: held by what the backward needs, without the weights; 0 if that was not counted.
    """

    blocks: Span
    num_tokens: int
    outputs: Named
    leaves: Named
    dtypes: Mapping[str, torch.dtype]
    num_bytes: int = 0

    @classmethod
    def run(
        cls,
        model: SpanModel,
        blocks: Span,
        tensors: RequestTensors,
        arguments: OwnerArguments,
        *,
        is_counted: bool = False,
    ) -> Graph:
        """Do the forward. The adapter's tensors must be leaves on the device of ``model``."""
        inputs = {name: leaf_of(model, tensor) for name, tensor in tensors.inputs.items()}
        past = {name: leaf_of(model, tensor) for name, tensor in tensors.past.items()}
        trained = _trained(arguments)
        saved = _Saved(_weights(model)) if is_counted else None
        with torch.enable_grad():
            if saved is None:
                outputs = model.run(inputs, blocks, arguments, given_cache(model, blocks, past))
            else:
                with saved_tensors_hooks(saved.note, _same):
                    outputs = model.run(inputs, blocks, arguments, given_cache(model, blocks, past))
                for tensor in (*outputs.values(), *inputs.values(), *past.values(), *trained.values()):
                    saved.note(tensor)
        leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad} | past | trained
        num_tokens = arguments.rows * arguments.num_tokens
        num_bytes = 0 if saved is None else saved.num_bytes
        return cls(blocks, num_tokens, outputs, leaves, _dtypes(tensors, arguments), num_bytes)

    def answer(self, grads: Named) -> Named:
        """``grad.<name>`` of all leaves, on the CPU. Uses the graph up. Raises as `gradients`."""
        return _answer(self.gradients(grads), self.dtypes)

    def gradients(self, grads: Named) -> Named:
        """Of all leaves, in their own dtype on their device; zeros where nothing depends on one. Uses the graph up.

        Raises:
            UnsupportedCallError: a gradient that came is of no output, or of another shape.
        """
        pairs = [(self.outputs[name], grad) for name, grad in _fitting(grads, self.outputs).items()]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(self.leaves.values()),
            [grad.to(output.device, output.dtype) for output, grad in pairs],
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(self.leaves.items(), found, strict=True)
        }


class _Saved:
    """Adds up the storages that a graph holds, each once."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self.num_bytes = 0
        self._seen = {_key(weight) for weight in weights}

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _weights(model: SpanModel) -> Iterable[torch.Tensor]:
    for block in model.blocks.values():
        yield from block.parameters()
        yield from block.buffers()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def forgetting() -> saved_tensors_hooks:
    """Inside, a forward runs as one that a gradient is wanted of, and holds no memory for it."""
    return saved_tensors_hooks(_forget, _remember)


def _forget(tensor: torch.Tensor) -> None:
    """What a backward would need."""


def _remember(nothing: None) -> torch.Tensor:
    raise AssertionError("the forward of another request has no backward")


def answer_by_block(model: SpanModel, blocks: Span, tensors: RequestTensors, arguments: OwnerArguments) -> Named:
    """What `Graph.run` and `Graph.answer` give, with the graph of one block at a time.

    Blocks that may not be cut apart stay together.
    """
    parts = _parts(model, blocks)
    inputs = _inputs_of(model, parts, tensors, arguments)
    grads = {name: grad for name, grad in tensors.grads.items() if not name.startswith("record.")}
    total: Named = {}
    for part in reversed(parts):
        recorded = {n: grad for n, grad in tensors.grads.items() if n.startswith("record.") and _block_of(n) in part}
        graph = Graph.run(model, part, inputs.pop(part), arguments)
        found = graph.gradients(grads | recorded)
        carried = {name for name in found if name in model.stack.carried}
        grads = {name: found.pop(name) for name in carried}
        del graph
        for name, grad in found.items():
            total[name] = total[name] + grad if name in total else grad
    return _answer(grads | total, _dtypes(tensors, arguments))


def _block_of(name: str) -> int:
    number = name.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1


def _parts(model: SpanModel, blocks: Span) -> list[Span]:
    allowed = sorted(model.stack.cuts) or range(model.stack.num_blocks + 1)
    cuts = [cut for cut in allowed if blocks.start <= cut <= blocks.end]
    return [Span(start, end) for start, end in zip(cuts, cuts[1:], strict=False)]


def _inputs_of(
    model: SpanModel, parts: list[Span], tensors: RequestTensors, arguments: OwnerArguments
) -> dict[Span, RequestTensors]:
    """What enters each part, of one forward."""
    stack = model.stack
    carried = {name: tensor for name, tensor in tensors.inputs.items() if name in stack.carried}
    entering = {}
    for part in parts:
        sides = {name: tensors.inputs[name] for name in stack.side_specs(part)}
        past = select_layers(tensors.past, stack.layers_of(part))
        entering[part] = replace(tensors, inputs=carried | sides, past=past)
        if part == parts[-1]:
            break
        leaves = {name: leaf_of(model, tensor) for name, tensor in (carried | sides).items()}
        with torch.enable_grad(), forgetting():
            cache = given_cache(model, part, {name: leaf_of(model, tensor) for name, tensor in past.items()})
            outputs = model.run(leaves, part, arguments, cache)
        carried = {name: outputs[name].detach() for name in stack.carried if name in outputs}
    return entering


def leaf_of(model: SpanModel, tensor: torch.Tensor) -> torch.Tensor:
    """An input as a leaf of a new graph; integers just go to the device."""
    if not tensor.is_floating_point():
        return tensor.to(model.device)
    return tensor.to(model.device, model.dtype).detach().requires_grad_()


def given_cache(model: SpanModel, blocks: Span, past: Named) -> SpanCache | None:
    """The cache of a call without a session, where it begins with something."""
    if not past:
        return None
    cache = model.new_cache()
    cache.use(blocks)
    fill(cache, past, model.device, model.dtype, keeps_graph=True)
    return cache


def _trained(arguments: OwnerArguments) -> Named:
    tensors = arguments.adapter.tensors if arguments.adapter is not None else ()
    return {f"adapter.{number}": tensor for number, tensor in enumerate(tensors) if tensor.requires_grad}


def _dtypes(tensors: RequestTensors, arguments: OwnerArguments) -> dict[str, torch.dtype]:
    """Of the answered gradients."""
    dtypes = dict.fromkeys(tensors.inputs, tensors.inputs["hidden_states"].dtype)
    return dtypes | {name: t.dtype for name, t in (tensors.past | _trained(arguments)).items()}


def _answer(grads: Named, dtypes: Mapping[str, torch.dtype]) -> Named:
    found = to_cpu(grads, lambda name, grad: dtypes[name])
    return {f"grad.{name}": grad for name, grad in found.items()}


def _fitting(grads: Named, outputs: Named) -> Named:
    """The gradients of outputs that have one.

    Raises:
        UnsupportedCallError: one is of no output, or of another shape.
    """
    for name, grad in grads.items():
        output = outputs.get(name)
        if output is None or output.shape != grad.shape:
            got = "there is no such output" if output is None else f"the output is {list(output.shape)}"
            raise UnsupportedCallError(f"gradient {name!r} is {list(grad.shape)}, but {got}")
    return {name: grad for name, grad in grads.items() if outputs[name].requires_grad}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room; the CPU's error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
