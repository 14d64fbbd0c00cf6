"""Inputs of passes without a session on their way to an accelerator, ahead of their turn there.

A copy begins once its request has a place in the queue, and counts against a budget until the request is over. Where
the budget has no room, or the turn comes before the copy has begun, the request takes its inputs from the host; the
device thread copies them then, one request at a time. So requests that wait hold no more than the budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import torch

from remote_modules.server.transfers import uploaded

__all__ = ["Upload", "Uploads"]

MAX_WAIT_S = 60.0  # of the device thread, for a copy that has begun

Named = dict[str, torch.Tensor]
Groups = tuple[Named, ...]


class Upload:
    """The inputs of one request, in groups."""

    def __init__(self, uploads: Uploads, groups: Groups) -> None:
        self._uploads = uploads
        self._groups = groups
        self._copy: Future[Groups] = Future()
        self._num_bytes = 0
        self._is_over = False

    def begin(self) -> None:
        """The request was admitted: copy, if there is room. On the event loop."""
        num_bytes = sum(tensor.nbytes for group in self._groups for tensor in group.values())
        if self._is_over or self._num_bytes or not self._uploads.reserve(num_bytes):
            return
        self._num_bytes = num_bytes
        copied = asyncio.get_running_loop().run_in_executor(None, self._run)
        copied.add_done_callback(lambda _: self._settle())

    def take(self) -> Groups:
        """What there is for the device thread, which asks when the request's turn has come."""
        if self._copy.cancel():
            return self._groups
        try:
            return self._copy.result(MAX_WAIT_S)
        except FutureTimeout:
            return self._groups

    def end(self) -> None:
        """The request is over. On the event loop."""
        self._is_over = True
        self._copy.cancel()
        self._settle()

    def _run(self) -> None:
        if not self._copy.set_running_or_notify_cancel():
            return
        try:
            found = tuple(self._uploads.copy(group, self._uploads.device) for group in self._groups)
        except RuntimeError as exc:  # of the accelerator: the request's answer
            self._copy.set_exception(exc)
        else:
            self._copy.set_result(found)

    def _settle(self) -> None:
        """Count no longer, once the request is over and no copy is being made."""
        if self._is_over and self._num_bytes and self._copy.done():
            self._uploads.used_bytes -= self._num_bytes
            self._num_bytes = 0


class Uploads:
    """Of one peer.

    Args:
        max_bytes: of all requests together.
        copy: makes the copies of a group; not on the event loop.

    Attributes:
        used_bytes: of copies that were made or are being made.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_bytes: int,
        copy: Callable[[Mapping[str, torch.Tensor], torch.device], Named] = uploaded,
    ) -> None:
        self.device = device
        self.copy = copy
        self.used_bytes = 0
        self._max_bytes = 0 if device.type == "cpu" else max_bytes

    def of(self, *groups: Named) -> Upload:
        """For one request; `Upload.end` must be called."""
        return Upload(self, groups)

    def reserve(self, num_bytes: int) -> bool:
        """Whether there is room, which is taken then."""
        if not 0 < num_bytes <= self._max_bytes - self.used_bytes:
            return False
        self.used_bytes += num_bytes
        return True
