"""`RemoteSequential`: an `nn.ModuleList` whose blocks run elsewhere.

Inside a call of its owner (``LlamaModel.forward``), all proxies but the last pass their input on, and the last one
runs all blocks, with what the owner itself was called with. Outside of one, a proxy runs its own block at once. Each
proxy checks that its input *is* what its predecessor returned: work between blocks would otherwise be lost silently.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, SupportsIndex, overload

import torch
from torch import nn
from transformers import PreTrainedModel

from remote_modules.client.autograd import RemotePass, refuse_backward
from remote_modules.client.chain import PassArguments
from remote_modules.client.connect import SwarmHandle, connect_swarm
from remote_modules.client.inference_session import InferenceSession, check_hidden_states
from remote_modules.client.session import SessionState
from remote_modules.client.stats import ClientStats
from remote_modules.config import ClientConfig
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adoption import adopt_cache, link_of
from remote_modules.model.capture import OwnerCall, OwnerCapture, watch_registrations
from remote_modules.model.stack import find_stack
from remote_modules.spans import Span

__all__ = ["RemoteSequential"]


class RemoteSequential(nn.ModuleList):
    """Blocks of a model that live in a swarm; build one with `from_swarm`.

    Assign it where the model has its list of blocks (``model.model.layers = layers``), or call it with hidden states
    ``[B, T, D]``. Slices share the connection.
    """

    def __init__(self, handle: SwarmHandle, blocks: Span, *, local: nn.ModuleList | None = None) -> None:
        super().__init__()
        self._handle = handle
        self._blocks = blocks
        self._capture = OwnerCapture()
        if local is None:
            self.extend([RemoteBlock(self, index) for index in blocks])
        else:
            self.extend([RemoteBlock(self, i) if i in blocks else block for i, block in enumerate(local)])
        watch_registrations(_registered)

    @classmethod
    def from_swarm(
        cls,
        model: object,
        *,
        trackers: Sequence[str] = (),
        mdns: bool = True,
        peers: Sequence[str] = (),
        invite: str | None = None,
        start: int = 0,
        end: int | None = None,
        revision: str | None = None,
        config: ClientConfig | None = None,
    ) -> RemoteSequential:
        """Remote blocks ``[start, end)`` of ``model``.

        Nothing is sent before the first use, and peers that join later are found then.

        Args:
            model: hub id, local checkpoint folder, `PreTrainedConfig`, or `PreTrainedModel` (whose other blocks stay
                local).
            trackers: HTTP(S) tracker URLs; default ``$REMOTE_MODULES_TRACKERS`` (comma separated).
            mdns: also look on the LAN.
            peers: static peer addresses ``host:port``.
            invite: not supported yet; swarms with a key come later.
            start, end: blocks to run remotely; ``end`` None means all.
            revision: of a hub model.
            config: timeouts and limits.

        Raises:
            ValueError, TypeError: bad arguments, before any I/O.
            CheckpointError: the model's config cannot be read.
            UnsupportedCallError: the architecture is not carried.
        """
        handle = connect_swarm(
            model, trackers=trackers, mdns=mdns, peers=peers, invite=invite, config=config, revision=revision
        )
        end = handle.num_blocks if end is None else end
        if not 0 <= start < end <= handle.num_blocks:
            raise ValueError(f"span {start}:{end} is outside the model's blocks 0:{handle.num_blocks}")
        local = None
        if isinstance(model, PreTrainedModel) and (start, end) != (0, handle.num_blocks):
            local = find_stack(model, model.config).blocks(model)
        return cls(handle, Span(start, end), local=local)

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put this list where ``model`` has its blocks, and return the model.

        Raises:
            UnsupportedCallError: no such list.
            ValueError: it has another length.
        """
        stack = find_stack(model, model.config)
        if stack.num_blocks != len(self):
            raise ValueError(f"{type(model).__name__} has {stack.num_blocks} blocks, this list has {len(self)}")
        setattr(stack.owner(model), stack.list_name, self)
        return model

    @property
    def blocks(self) -> Span:
        """The blocks that run remotely."""
        return self._blocks

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run all remote blocks, without a KV cache; differentiable.

        Args:
            hidden_states: ``[B, T, D]``, any float dtype and device.
            kwargs: ``attention_mask`` ``[B, T]`` and ``position_ids`` may be given.

        Raises:
            PeerError, NoRouteError: the swarm could not do it within the deadline.
        """
        return self._run_alone(self._blocks, hidden_states, kwargs)

    def session(self, *, max_tokens: int | None = None) -> InferenceSession:
        """A context manager for step-wise use without transformers' cache."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        state, handle = self._new_state(), self._handle
        return InferenceSession(state, handle.io, hidden_size=handle.hidden_size, max_tokens=max_tokens)

    def stats(self) -> ClientStats:
        """Counters since creation, the route, and the last steps' waterfall."""
        return self._handle.stats.snapshot()

    def close(self) -> None:
        """Close connections and discovery, slices' too; idempotent. Later use raises `SessionError`."""
        self._handle.close()

    def __enter__(self) -> RemoteSequential:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @overload
    def __getitem__(self, index: slice) -> RemoteSequential: ...
    @overload
    def __getitem__(self, index: SupportsIndex) -> nn.Module: ...
    def __getitem__(self, index: slice | SupportsIndex) -> RemoteSequential | nn.Module:
        if not isinstance(index, slice):
            return super().__getitem__(int(index))
        first, last, step = index.indices(len(self))
        if (first, last, step) == (0, len(self), 1):
            return self
        modules = list(self)[first:last]
        if step != 1 or not modules or not all(isinstance(module, RemoteBlock) for module in modules):
            raise ValueError(f"a slice of remote blocks must be contiguous and not empty, got {index}")
        offset = self._blocks.start - next(i for i, module in enumerate(self) if isinstance(module, RemoteBlock))
        part = RemoteSequential(self._handle, Span(first + offset, last + offset))
        part._capture = self._capture
        return part

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        """A copy that shares the connection; local blocks, if any, are copied."""
        if any(not isinstance(module, RemoteBlock) for module in self):
            local: nn.ModuleList | None = nn.ModuleList(
                [nn.Identity() if isinstance(module, RemoteBlock) else copy.deepcopy(module, memo) for module in self]
            )
        else:
            local = None
        copied = RemoteSequential(self._handle, self._blocks, local=local)
        copied._capture = copy.deepcopy(self._capture, memo)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        return f"RemoteSequential({self._blocks} of '{self._handle.model_name}')"

    # what proxies call

    def _run_block(self, index: int, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        call = self._capture.current
        if call is None:
            return self._run_alone(Span(index, index + 1), hidden_states, {})
        if index > self._blocks.start and call.passed is not hidden_states:
            raise UnsupportedCallError(
                f"the model changes hidden states between blocks {index - 1} and {index}; such models are not carried"
            )
        if index < self._blocks.end - 1:
            call.passed = hidden_states
            return hidden_states
        return self._run_all(call, hidden_states, kwargs)

    def _run_all(self, call: OwnerCall, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if hidden_states.dim() != 3:
            raise UnsupportedCallError(f"hidden states must be [B, T, D], got {list(hidden_states.shape)}")
        is_grad_on = torch.is_grad_enabled()
        if call.cache is not None:
            return self._step(call, self._state_of(call.cache), hidden_states)
        made_by_owner = next((value for value in kwargs.values() if hasattr(value, "layers")), None)
        if made_by_owner is None:
            return self._pass(self._blocks, hidden_states, call)
        state = self._state_of(made_by_owner)
        if not is_grad_on:
            return self._step(call, state, hidden_states)
        # Training calls leave the model's use_cache default on and drop the cache: open nothing on the peers, but let a
        # caller who does keep it go on from the history.
        output = self._pass(self._blocks, hidden_states, call)
        state.needs_grad = hidden_states.requires_grad
        state.remember(_to_cpu(hidden_states), _small(call.position_ids), _small(call.attention_mask))
        return output

    def _pass(self, blocks: Span, hidden_states: torch.Tensor, call: OwnerCall) -> torch.Tensor:
        arguments = PassArguments(
            position_ids=_small(call.position_ids),
            attention_mask=_small(call.attention_mask),
            use_cache=call.use_cache,
            autocast=_autocast_name(hidden_states),
        )
        return RemotePass(self._handle.swarm, self._handle.io, blocks, arguments)(hidden_states)

    def _step(self, call: OwnerCall, state: SessionState, hidden_states: torch.Tensor) -> torch.Tensor:
        is_differentiated = torch.is_grad_enabled() and hidden_states.requires_grad
        if state.needs_grad and torch.is_grad_enabled():
            raise UnsupportedCallError("this KV cache was made by a training call; go on from it under torch.no_grad()")
        work = state.step(
            _to_cpu(hidden_states),
            position_ids=_small(call.position_ids),
            attention_mask=_small(call.attention_mask),
            autocast=_autocast_name(hidden_states),
        )
        output = self._handle.io.run(work).to(hidden_states.device)
        return refuse_backward(output, hidden_states) if is_differentiated else output

    def _run_alone(self, blocks: Span, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        unknown = set(kwargs) - {"attention_mask", "position_ids"}
        if unknown:
            raise TypeError(
                f"unexpected keyword arguments {sorted(unknown)}; attention_mask and position_ids are taken"
            )
        check_hidden_states(hidden_states, self._handle.hidden_size)
        return self._pass(blocks, hidden_states, OwnerCall(**kwargs))

    def _state_of(self, cache: Any) -> SessionState:
        link = link_of(cache, self._blocks)
        if link is None:
            link = self._new_state()
            adopt_cache(cache, self._blocks, self._handle.num_blocks, link)
        if not isinstance(link, SessionState) or link.swarm is not self._handle.swarm or link.blocks != self._blocks:
            raise UnsupportedCallError("this KV cache belongs to another set of remote blocks; start with an empty one")
        return link

    def _new_state(self) -> SessionState:
        return SessionState(self._handle.swarm, self._blocks, self._handle.io.call_soon)


class RemoteBlock(nn.Module):
    """Stands for one remote block; has no parameters."""

    def __init__(self, sequence: RemoteSequential, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "sequence", sequence)  # not a submodule: it is our parent
        self.index = index

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sequence: RemoteSequential = self.__dict__["sequence"]
        return sequence._run_block(self.index, hidden_states, kwargs)

    def extra_repr(self) -> str:
        return f"block {self.index}"


def _registered(parent: nn.Module, name: str, child: nn.Module) -> None:
    """A submodule was registered somewhere: if it is ours in a model, watch the model's calls."""
    if isinstance(child, RemoteSequential) and isinstance(parent, PreTrainedModel):
        child._capture.hook(parent)


def _to_cpu(hidden_states: torch.Tensor) -> torch.Tensor:
    """A copy of one's own: the history keeps it, whatever the caller does to the original."""
    return hidden_states.detach().to("cpu", copy=True)


def _small(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu")


def _autocast_name(hidden_states: torch.Tensor) -> str:
    kind = hidden_states.device.type
    if not torch.is_autocast_enabled(kind):
        return ""
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
