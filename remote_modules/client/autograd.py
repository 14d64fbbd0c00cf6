"""The one autograd function: remote forward, remote backward.

What peers keep between the two they may lose: the inputs of each hop stay here, and a peer recomputes its blocks from
them in backward, unless it kept its graph. A hop that fails in backward is replaced, and the gradients are those of the
failure-free run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from remote_modules.client.call import CallArguments, Named
from remote_modules.client.passes import backward, forward
from remote_modules.client.swarm import Swarm
from remote_modules.client.traces import Segment, Wanted, release
from remote_modules.errors import UnsupportedCallError
from remote_modules.net.loop import LoopThread
from remote_modules.spans import Span

__all__ = ["RemotePass", "refuse_backward"]


class RemotePass:
    """One stateless pass through ``blocks``, differentiable in its floating-point inputs and in adapters."""

    def __init__(self, swarm: Swarm, io: LoopThread, blocks: Span, call: CallArguments) -> None:
        self.swarm = swarm
        self.io = io
        self.blocks = blocks
        specs = swarm.stack.side_specs(blocks)  # a call of the model may bring what other blocks take
        self.call = replace(call, sides={name: side for name, side in call.sides.items() if name in specs})

    def __call__(self, inputs: Named) -> Named:
        """Outputs on the device of the hidden states: of the last block, and ``record.<kind>.<block>``.

        Raises:
            PeerError, NoRouteError: the swarm could not do it within the deadline.
        """
        # Moved to the CPU outside of the function: its backward then runs on the caller's thread. A CUDA device has
        # one autograd thread, and a peer in this process would wait for the one that waits for it.
        device = inputs["hidden_states"].device
        tensors = {name: tensor.to("cpu") for name, tensor in (inputs | self.call.sides | self.call.past).items()}
        adapter = self.call.adapter
        parameters = [] if adapter is None else [parameter.to("cpu") for parameter in adapter.adapters.parameters]
        needs_grad = any(tensor.requires_grad for tensor in (*tensors.values(), *parameters))
        self.call = replace(self.call, with_grad=torch.is_grad_enabled() and needs_grad)
        plan = _Plan(self, tuple(tensors), frozenset(inputs))
        outputs: tuple[torch.Tensor, ...] = _RemoteFunction.apply(  # type: ignore[no-untyped-call]
            plan, *tensors.values(), *parameters
        )
        return {name: tensor.to(device) for name, tensor in zip(plan.outputs, outputs, strict=True)}


@dataclass(slots=True)
class _Plan:
    """What the tensors of one call of the autograd function are.

    Attributes:
        names: of the first tensors; the rest are adapters'.
        carried: names of those that cross from block to block.
        outputs: names of what the function returns, known once it ran.
    """

    remote: RemotePass
    names: tuple[str, ...]
    carried: frozenset[str]
    outputs: tuple[str, ...] = ()


class _RemoteFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        remote, count = plan.remote, len(plan.names)
        named = {name: tensor.detach().clone() for name, tensor in zip(plan.names, tensors, strict=False)}
        past = {name: named[name] for name in remote.call.past}
        sides = {n: t for n, t in named.items() if n not in plan.carried and n not in past}
        call = replace(remote.call, sides=sides, past=past)
        if call.adapter is not None:  # the optimizer may change it before the backward
            call = replace(call, adapter=call.adapter.taken(tensors[count:]))
        inputs = {name: tensor for name, tensor in named.items() if name in plan.carried}
        wanted = _wanted(ctx, plan, len(tensors))
        outputs, recorded, ctx.trace = remote.io.run(forward(remote.swarm, remote.blocks, inputs, call, wanted))
        if ctx.trace.is_kept:  # this graph may be dropped without a backward
            weakref.finalize(ctx.trace, _release, remote.io, ctx.trace.segments).atexit = False
        outputs = outputs | recorded
        plan.outputs = tuple(outputs)
        ctx.plan, ctx.num_tensors = plan, len(tensors)
        ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in outputs.values()]
        ctx.mark_non_differentiable(*(tensor for tensor in outputs.values() if not tensor.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = _RemoteFunction._gradients(ctx, grad_outputs)
        if torch.is_grad_enabled():  # create_graph=True
            found = tuple(None if grad is None else _refuse_double_backward(grad) for grad in found)
        return (None, *found)

    @staticmethod
    def _gradients(ctx: Any, grad_outputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
        plan: _Plan = ctx.plan
        grads = {}
        for name, (shape, dtype), grad in zip(plan.outputs, ctx.shapes, grad_outputs, strict=True):
            if grad is not None:
                grads[name] = grad.detach().to("cpu", dtype, copy=True)
            elif dtype.is_floating_point and not name.startswith("record."):
                grads[name] = torch.zeros(shape, dtype=dtype)
        remote, count = plan.remote, len(plan.names)
        numbers = range(ctx.num_tensors - count)
        wanted = _wanted(ctx, plan, ctx.num_tensors)
        found, of_adapters = remote.io.run(backward(remote.swarm, ctx.trace, grads, wanted))
        own = (found.get(name) if name in wanted.names else None for name in plan.names)
        return (*own, *(of_adapters.get(number) if number in wanted.adapters else None for number in numbers))


def _wanted(ctx: Any, plan: _Plan, num_tensors: int) -> Wanted:
    """What gradients are asked for: in the forward, the most that may be."""
    count, needs = len(plan.names), ctx.needs_input_grad[1:]  # the first is the plan
    names = frozenset(name for name, is_needed in zip(plan.names, needs, strict=False) if is_needed)
    return Wanted(names, frozenset(number for number in range(num_tensors - count) if needs[count + number]))


def _release(io: LoopThread, segments: Sequence[Sequence[Segment]]) -> None:
    """The graph is gone, on whatever thread: peers need not keep theirs."""
    if any(segment.kept is not None for own in segments for segment in own):
        io.call_soon(partial(release, segments))


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, None]:
        raise UnsupportedCallError(
            "backward through a call that used a KV cache is not carried; call the model without a cache to train"
        )


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, None]:
        raise UnsupportedCallError(
            "double backward (a gradient of gradients) through remote blocks is not carried; detach their gradients"
        )


def _refuse_double_backward(grad: torch.Tensor) -> torch.Tensor:
    """``grad``, with a backward that says what is wrong."""
    anchor = torch.zeros((), requires_grad=True)  # else nothing would ask for it
    result: torch.Tensor = _NoDoubleBackward.apply(grad, anchor)  # type: ignore[no-untyped-call]
    return result


def refuse_backward(output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """``output`` of a session step, with a backward that says what is wrong: a silent stop would be worse."""
    result: torch.Tensor = _NoBackward.apply(output, hidden_states)  # type: ignore[no-untyped-call]
    return result
