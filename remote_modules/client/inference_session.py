"""`InferenceSession`: a session as a user holds it, synchronous and checked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from remote_modules.client.adapters import CallAdapter, row_names
from remote_modules.client.call import CallArguments
from remote_modules.client.session import SessionState
from remote_modules.errors import SessionError
from remote_modules.model.tensors import TensorSpec
from remote_modules.net.loop import LoopThread

__all__ = ["InferenceSession", "check_hidden_states"]

_PLAIN = TensorSpec(("B", "T", "1H"))


def check_hidden_states(hidden_states: torch.Tensor, hidden_size: int, spec: TensorSpec = _PLAIN) -> None:
    """Raise `ValueError` or `TypeError` unless it is floating point, shaped as ``spec`` says, with at least one token.

    ``spec`` defaults to ``[B, T, hidden_size]``.
    """
    if not isinstance(hidden_states, torch.Tensor):
        raise TypeError(f"hidden states must be a tensor, got {type(hidden_states).__name__}")
    rows, num_tokens = (
        1 if dim is None or dim >= hidden_states.dim() else hidden_states.shape[dim] for dim in (spec.batch, spec.time)
    )
    if not hidden_states.is_floating_point():
        raise ValueError(f"hidden states must be floating point, got {hidden_states.dtype}")
    if not spec.fits(hidden_states, rows, num_tokens, hidden_size):
        raise ValueError(f"hidden states must be {spec.text(hidden_size)}, got {list(hidden_states.shape)}")


class InferenceSession:
    """Step-wise use of remote blocks without transformers' cache; from `RemoteSequential.session`.

    Args:
        hidden_size: of the model.
        max_tokens: refuse to grow beyond; None for no limit of ours.
        adapter: those of the blocks, at each step.
    """

    def __init__(
        self,
        state: SessionState,
        io: LoopThread,
        *,
        hidden_size: int,
        max_tokens: int | None,
        adapter: Callable[[], CallAdapter | None] = lambda: None,
    ) -> None:
        self._state = state
        self._hidden_size = hidden_size
        self._io = io
        self._max_tokens = max_tokens
        self._adapter = adapter

    @property
    def position(self) -> int:
        """Tokens in the session."""
        return self._state.position

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run new tokens ``[B, T, D]`` through the blocks; output of the same shape, dtype and device.

        Args:
            position_ids: int64 ``[B, T]`` or ``[1, T]``; None: they follow the position.
            attention_mask: ``[B, P + T]``, all tokens so far and the new ones.

        Raises:
            ValueError, TypeError: hidden states of another shape or kind, before any I/O.
            UnsupportedCallError: position_ids or attention_mask of another shape.
            SessionError: closed, or full.
            PeerError, NoRouteError: the swarm could not do it within the deadline; the session is as before.
        """
        check_hidden_states(hidden_states, self._hidden_size)
        num_tokens = hidden_states.shape[1]
        if self._max_tokens is not None and self.position + num_tokens > self._max_tokens:
            raise SessionError(
                f"session is full: {self.position} of {self._max_tokens} tokens used, step needs {num_tokens}; "
                "open a session with larger max_tokens"
            )
        sides = [None if side is None else side.detach().cpu() for side in (position_ids, attention_mask)]
        adapter = self._adapter()
        call = CallArguments(
            rows=hidden_states.shape[0],
            num_tokens=num_tokens,
            position_ids=sides[0],
            attention_mask=sides[1],
            adapter=adapter,
            row_names=row_names(adapter, hidden_states.shape[0]),
        )
        work = self._state.step({"hidden_states": hidden_states.detach().to("cpu", copy=True)}, call)
        return self._io.run(work)["hidden_states"].to(hidden_states.device)

    def rollback(self, position: int) -> None:
        """Forget all tokens after ``position``.

        Raises:
            ValueError: it is not in 0..the current position.
        """
        if not 0 <= position <= self.position:
            raise ValueError(f"rollback position must be in 0..{self.position}, got {position}")
        self._state.crop(position)

    def close(self) -> None:
        """Free the KV caches on the peers; idempotent."""
        self._io.run(self._state.close())

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
