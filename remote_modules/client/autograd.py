"""The one autograd function: remote forward, remote backward.

Peers keep nothing between the two: the inputs of each hop stay here, and a peer recomputes its blocks from them in
backward. A hop that fails in backward is replaced, and the gradients are those of the failure-free run.
"""

from __future__ import annotations

from typing import Any

import torch

from remote_modules.client.chain import PassArguments, Segment, backward, forward
from remote_modules.client.swarm import Swarm
from remote_modules.errors import UnsupportedCallError
from remote_modules.net.loop import LoopThread
from remote_modules.spans import Span

__all__ = ["RemotePass", "refuse_backward"]


class RemotePass:
    """One stateless pass through ``blocks``, differentiable in its hidden states."""

    def __init__(self, swarm: Swarm, io: LoopThread, blocks: Span, arguments: PassArguments) -> None:
        self.swarm = swarm
        self.io = io
        self.blocks = blocks
        self.arguments = arguments

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output ``[B, T, D]`` of the input's dtype and device.

        Raises:
            PeerError, NoRouteError: the swarm could not do it within the deadline.
        """
        # Moved to the CPU outside of the function: its backward then runs on the caller's thread. A CUDA device has
        # one autograd thread, and a peer in this process would wait for the one that waits for it.
        output: torch.Tensor = _RemoteFunction.apply(hidden_states.to("cpu"), self)  # type: ignore[no-untyped-call]
        return output.to(hidden_states.device)

    def run(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, list[Segment]]:
        return self.io.run(
            forward(self.swarm, self.blocks, hidden_states.detach().to("cpu", copy=True), self.arguments)
        )


class _RemoteFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, remote: RemotePass) -> torch.Tensor:
        output, segments = remote.run(hidden_states)
        ctx.remote, ctx.segments = remote, segments
        ctx.dtype = hidden_states.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        remote: RemotePass = ctx.remote
        grad = grad_output.detach().to("cpu", ctx.dtype, copy=True)
        grad_input = remote.io.run(backward(remote.swarm, ctx.segments, grad, remote.arguments))
        return grad_input, None


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, None]:
        raise UnsupportedCallError(
            "backward through a call that used a KV cache is not carried; call the model without a cache to train"
        )


def refuse_backward(output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """``output`` of a session step, with a backward that says what is wrong: a silent stop would be worse."""
    result: torch.Tensor = _NoBackward.apply(output, hidden_states)  # type: ignore[no-untyped-call]
    return result
