"""Adapters that clients sent, kept for as long as their connection: a request names one that it sent before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from remote_modules.errors import RefusalReason, RemoteProtocolError, UnsupportedCallError, first_line
from remote_modules.model.adapted import check_fit
from remote_modules.model.adapters import Adapter, decode_entries
from remote_modules.server.checks import RequestTensors, refuse
from remote_modules.wire.messages import CallMeta

__all__ = ["AdapterStore"]

Key = tuple[int, str]


class AdapterStore:
    """The adapters of all connections, least recently used first.

    A connection sees only what came over it, so nobody can put an adapter under another one's name.

    Args:
        max_bytes: of all together.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[Key, tuple[Adapter, int]] = OrderedDict()

    def of(
        self, call: CallMeta, tensors: RequestTensors, blocks: Mapping[int, nn.Module], connection_id: int
    ) -> Adapter | None:
        """The adapter of a request, from what it brings or from an earlier one.

        Raises:
            PeerRefused: ``adapter_missing``, or ``bad_request`` for one that is none or does not fit ``blocks``.
        """
        if not call.adapter:
            return None
        key = (connection_id, call.adapter)
        if tensors.adapter is None:
            if key not in self._held:
                refuse("this adapter was not sent on this connection, or was dropped", RefusalReason.ADAPTER_MISSING)
            self._held.move_to_end(key)
            return self._held[key][0]
        adapter = _read(tensors, blocks)
        num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in adapter.tensors)
        self._held.pop(key, None)
        self._held[key] = (adapter, num_bytes)
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self._max_bytes:
            self._held.popitem(last=False)
        return adapter

    def forget(self, connection_id: int) -> None:
        """The connection is lost."""
        for key in [key for key in self._held if key[0] == connection_id]:
            del self._held[key]


def _read(tensors: RequestTensors, blocks: Mapping[int, nn.Module]) -> Adapter:
    assert tensors.adapter is not None
    try:
        entries = decode_entries(tensors.adapter.numpy().tobytes())
        names = [f"adapter.{number}" for number in range(len(tensors.adapter_tensors))]
        missing = [name for name in names if name not in tensors.adapter_tensors]
        if missing:
            raise RemoteProtocolError(f"adapter tensors must be numbered from 0, '{missing[0]}' is missing")
        adapter = Adapter.of(entries, [_own(tensors.adapter_tensors[name]) for name in names])
        check_fit(blocks, adapter)
    except (RemoteProtocolError, UnsupportedCallError) as exc:
        refuse(f"adapter is not usable: {first_line(exc)}")
    return adapter


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Apart from the request's body, which also holds the hidden states."""
    return tensor.clone()
