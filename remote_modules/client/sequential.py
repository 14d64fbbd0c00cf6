"""`RemoteSequential`: an `nn.ModuleList` whose blocks run elsewhere.

Inside a call of its owner (``LlamaModel.forward``), all proxies but the last pass their input on, and the last one
runs all blocks, with what the owner itself was called with. Outside of one, a proxy runs its own block at once. Each
proxy checks that its input *is* what its predecessor returned: work between blocks would otherwise be lost silently.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, overload

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from remote_modules.client.adapters import AdapterWatch, CallAdapter, note_change
from remote_modules.client.autograd import RemotePass, refuse_backward
from remote_modules.client.call import CallArguments, Named
from remote_modules.client.connect import SwarmHandle, connect_swarm
from remote_modules.client.inference_session import InferenceSession, check_hidden_states
from remote_modules.client.owner_call import argument_of, call_arguments, own
from remote_modules.client.remote_head import HeadResults
from remote_modules.client.runs import has_wrapped, remote_blocks, run_at
from remote_modules.client.session import SessionState
from remote_modules.client.stats import ClientStats
from remote_modules.config import ClientConfig
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.adoption import RemoteLinearLayer, adopt_cache, link_of
from remote_modules.model.capture import (
    OwnerCall,
    OwnerCapture,
    keep_recording,
    plain_cache,
    record_once,
    watch_registrations,
)
from remote_modules.model.past import take
from remote_modules.model.recording import records_parts, show_router_logits
from remote_modules.model.shadow import is_shadow
from remote_modules.model.stack import find_stack
from remote_modules.spans import Span

__all__ = ["RemoteSequential"]

_WRAPPED = "some of these blocks are wrapped in other modules"


class RemoteSequential(nn.ModuleList):
    """Blocks of a model that live in a swarm; build one with `from_swarm`.

    Assign it where the model has its list of blocks (``model.model.layers = layers``), or call it with hidden states
    ``[B, T, D]``. Slices share the connection.
    """

    def __init__(self, handle: SwarmHandle, blocks: Span, *, local: nn.ModuleList | None = None) -> None:
        super().__init__()
        self._handle = handle
        self._blocks = blocks
        self._capture = OwnerCapture(handle.no_cache)
        self._adapters = AdapterWatch()
        self.head_results = HeadResults()
        self._adapter_name = handle.swarm.config.adapter
        if local is None:
            self.extend([self._new_block(index) for index in blocks])
        else:
            self.extend([self._new_block(i) if i in blocks else block for i, block in enumerate(local)])
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

    @property
    def hidden_size(self) -> int:
        """D of the hidden states."""
        return self._handle.hidden_size

    @property
    def hidden_dims(self) -> tuple[str, ...]:
        """What the dimensions of the hidden states are; see `TensorSpec`."""
        return self._handle.stack.hidden.dims

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Run all remote blocks, without a KV cache; differentiable.

        Args:
            hidden_states: ``[B, T, D]``, any float dtype and device.
            kwargs: ``attention_mask`` ``[B, T]`` and ``position_ids`` may be given.

        Raises:
            PeerError, NoRouteError: the swarm could not do it within the deadline.
        """
        self._check_unwrapped()
        return self._run_alone(self._blocks, hidden_states, kwargs)

    def session(self, *, max_tokens: int | None = None) -> InferenceSession:
        """A context manager for step-wise use without transformers' cache."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        self._handle.check_alone(self._blocks)
        self._check_unwrapped()
        state, handle = self._new_state(self._blocks), self._handle
        return InferenceSession(
            state, handle.io, hidden_size=handle.hidden_size, max_tokens=max_tokens, adapter=self._read_adapters
        )

    def set_adapter(self, name: str | None) -> None:
        """Compute with a LoRA that peers offer (``serve --adapter``) from now on; None: with the model alone.

        Args:
            name: or ``name@digest``, where peers offer different ones under that name. It is looked for at the next
                call, which raises `NoRouteError` if nobody offers it.
        """
        self._adapter_name = name

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
        if has_wrapped(modules):
            raise ValueError(f"{_WRAPPED}; take the slices before and after it")
        if step != 1 or not modules or not all(map(is_shadow, modules)):
            raise ValueError(f"a slice of remote blocks must be contiguous and not empty, got {index}")
        offset = self._blocks.start - next(i for i, module in enumerate(self) if is_shadow(module))
        part = RemoteSequential(self._handle, Span(first + offset, last + offset), local=nn.ModuleList())
        part.extend(modules)  # the same ones: adapters are in them
        part._capture, part._adapter_name = self._capture, self._adapter_name
        return part

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        """A copy that shares the connection; adapters and local blocks, if any, are copied."""
        copied = RemoteSequential(self._handle, self._blocks, local=nn.ModuleList())
        memo[id(self)] = copied
        copied.extend([copy.deepcopy(module, memo) for module in self])
        copied._capture, copied._adapter_name = copy.deepcopy(self._capture, memo), self._adapter_name
        copied.head_results = copy.deepcopy(self.head_results, memo)
        return copied

    def __repr__(self) -> str:
        return f"RemoteSequential({self._blocks} of '{self._handle.model_name}')"

    # what proxies call

    def _run_block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, stack = self._capture.current, self._handle.stack
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if call is None:
            return self._run_alone(Span(index, index + 1), hidden_states, {})
        if call.run is None or index in (self._blocks.start, call.run.end):
            call.run = run_at(self, self._blocks, index)
            if stack.hides_past and call.use_cache:
                raise UnsupportedCallError(self._handle.no_cache)
            call.entry = {"hidden_states": hidden_states}
            if index:
                states = {f"state.{k}": argument_of(args, kwargs, key) for k, key in stack.state_keys.items()}
                call.entry.update({name: state for name, state in states.items() if state is not None})
        elif call.passed is not hidden_states:
            raise UnsupportedCallError(
                f"the model changes hidden states between blocks {index - 1} and {index}; such models are not carried"
            )
        values = (*args, *kwargs.values())
        for side in stack.sides:
            call.sides[side.name(index)] = argument_of(args, kwargs, side.key)
        if call.record:
            return self._run_recording(call, index, values)
        if index < call.run.end - 1:
            call.passed = hidden_states
            return stack.pack({"hidden_states": hidden_states})
        return stack.pack(self._run_all(call, values, call.run))

    def _run_recording(self, call: OwnerCall, index: int, values: tuple[Any, ...]) -> Any:
        """All blocks run when the first is called, and each returns its true output, for transformers to record."""
        stack = self._handle.stack
        if call.outputs is None:
            skeleton, name = self._handle.skeleton, call.record[0]
            has_parts = name == "hidden_states" and records_parts(skeleton, stack.blocks(skeleton))
            if has_parts or any(side.is_per_block for side in stack.sides):
                why = (
                    "has states of parts of blocks" if has_parts else "has blocks that each take an input of their own"
                )
                kind = self._handle.model_config.model_type
                raise UnsupportedCallError(f"output_{name}=True is not carried for '{kind}', which {why}; leave it off")
            record_once(self)
            if call.run != self._blocks:
                raise UnsupportedCallError(f"output_{name}=True is not carried where remote blocks are wrapped")
            call.outputs = self._run_all(call, values, self._blocks)
        outputs = call.outputs
        if index < self._blocks.end - 1:
            outputs = {"hidden_states": outputs[f"record.hidden_states.{index}"]}
        call.passed = outputs["hidden_states"]
        logits = call.outputs.get(f"record.router_logits.{index}")
        if logits is not None:
            block = next(itertools.islice(filter(is_shadow, self), index - self._blocks.start, None))
            show_router_logits(self._handle.skeleton, block, logits)
        return stack.pack(outputs)

    def _run_all(self, call: OwnerCall, values: tuple[Any, ...], blocks: Span) -> Named:
        """Run all of ``blocks``; ``values`` are the arguments of one, among them the cache that the owner made."""
        cache, is_given = plain_cache(call.cache), call.cache is not None
        if cache is None:
            cache = next((plain_cache(value) for value in values if isinstance(value, Cache)), None)
            if cache is None or self._handle.stack.no_cache:
                return self._pass(blocks, call, self._arguments(call))
        state, past = self._state_of(cache, blocks)
        arguments = self._arguments(call)
        may_keep = is_given or arguments.rows * arguments.num_tokens <= self._handle.swarm.config.microbatch_tokens
        if (not torch.is_grad_enabled() and (may_keep or arguments.rows == 1)) or (is_given and not past):
            return self._step(call, state, arguments)
        # Training calls, and evaluations of large batches, leave the model's use_cache default on and drop the cache:
        # open nothing on the peers, but let a caller who does keep it go on from the history.
        state.needs_grad = any(tensor.requires_grad for tensor in past.values())
        output = self._pass(blocks, call, replace(arguments, past=past))
        state.needs_grad = output["hidden_states"].requires_grad
        state.remember(own(call.entry), replace(arguments, sides=own(call.sides)))
        return output

    def _arguments(self, call: OwnerCall) -> CallArguments:
        return call_arguments(call, self._handle.stack, self._read_adapters())

    def _read_adapters(self) -> CallAdapter | None:
        found, name = self._adapters.read(self.remote_blocks), self._adapter_name
        if name is None:
            return found
        if found is not None:
            text = f"the model has adapters of its own, and adapter='{name}' asks for one of the peers'"
            raise UnsupportedCallError(f"{text}; disable them, or call set_adapter(None) on the remote blocks")
        return CallAdapter.named(self._handle.io.run(self._handle.swarm.find_adapter(name)))

    def remote_blocks(self) -> dict[int, nn.Module]:
        """The modules that stand for the remote blocks, by index in the model."""
        return remote_blocks(self, self._blocks)

    def _pass(self, blocks: Span, call: OwnerCall, arguments: CallArguments) -> Named:
        self._handle.stack.check_cuts(blocks)
        return RemotePass(self._handle.swarm, self._handle.io, blocks, arguments)(call.entry)

    def _step(self, call: OwnerCall, state: SessionState, arguments: CallArguments) -> Named:
        hidden_states = call.entry["hidden_states"]
        is_differentiated = torch.is_grad_enabled() and hidden_states.requires_grad
        if state.needs_grad and torch.is_grad_enabled():
            raise UnsupportedCallError("this KV cache was made by a training call; go on from it under torch.no_grad()")
        if "encoder_hidden_states" in call.tensors:
            raise UnsupportedCallError("cross-attention is carried without a KV cache only; use use_cache=False")
        arguments = self.head_results.asked_of(replace(arguments, sides=own(call.sides)), state.position)
        outputs = self.head_results.take(self._handle.io.run(state.step(own(call.entry), arguments)))
        outputs = {name: tensor.to(hidden_states.device) for name, tensor in outputs.items()}
        if is_differentiated:
            outputs["hidden_states"] = refuse_backward(outputs["hidden_states"], hidden_states)
        return outputs

    def _run_alone(self, blocks: Span, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        unknown = set(kwargs) - {"attention_mask", "position_ids"}
        if unknown:
            raise TypeError(
                f"unexpected keyword arguments {sorted(unknown)}; attention_mask and position_ids are taken"
            )
        self._handle.check_alone(blocks)
        check_hidden_states(hidden_states, self._handle.hidden_size, self._handle.stack.hidden)
        call = OwnerCall(**kwargs)
        call.entry = {"hidden_states": hidden_states}
        return self._pass(blocks, call, self._arguments(call))["hidden_states"]

    def _check_unwrapped(self) -> None:
        self.remote_blocks()
        if has_wrapped(self):
            raise UnsupportedCallError(f"{_WRAPPED}; call them through the model")

    def _state_of(self, cache: Any, blocks: Span) -> tuple[SessionState, Named]:
        """The session that ``cache`` stands for; on its first use, also the keys and values that it began with."""
        stack = self._handle.stack
        if stack.no_cache:
            raise UnsupportedCallError(self._handle.no_cache)
        layers = stack.layers_of(blocks)
        link, past = link_of(cache, layers), {}
        if link is None:
            link, past = self._new_state(blocks), take(cache, layers)
            adopt_cache(cache, layers, stack.num_layers, link, is_taken=bool(past))
            link.begin_with(own(past))
            link.masks_may_end = all(isinstance(cache.layers[index], RemoteLinearLayer) for index in layers)
        if not isinstance(link, SessionState) or link.swarm is not self._handle.swarm or link.blocks != blocks:
            raise UnsupportedCallError("this KV cache belongs to another set of remote blocks; start with an empty one")
        return link, past

    def _new_state(self, blocks: Span) -> SessionState:
        self._handle.stack.check_cuts(blocks)
        return SessionState(self._handle.swarm, blocks, self._handle.io.call_soon)

    def _new_block(self, index: int) -> nn.Module:
        return self._handle.shadow(index, _Proxy(self, index).run)


class _Proxy:
    """What the call of a remote block does."""

    def __init__(self, sequence: RemoteSequential, index: int) -> None:
        self.sequence = sequence
        self.index = index

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.sequence._run_block(self.index, args, kwargs)


def _registered(parent: nn.Module, name: str, child: nn.Module) -> None:
    """A submodule was registered somewhere: if it is ours in a model, watch the model's calls."""
    if is_shadow(parent):
        note_change()
    elif isinstance(child, RemoteSequential) and not isinstance(parent, nn.ModuleList):
        child._capture.hook(parent)
        if keep_recording(parent._modules.get(name), child):
            return
        for module in parent.modules():  # the hooks went with the blocks that were there before
            if getattr(module, "_output_capturing_hooks_installed", False):
                module._output_capturing_hooks_installed = False  # type: ignore[assignment]
