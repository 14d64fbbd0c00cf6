"""Adapters that clients sent, kept by content for as long as they are used.

A request names an adapter, and brings those of its parts (`model.adapter_content`) that the client believes to be
missing here. What a name stands for is verified once, so that all connections share it: a step finds what a training
pass brought, and who knows the name of a content may use it. What nobody uses for the time of the lease is dropped, and
beyond ``max_bytes`` in this order: versions that their client replaced by newer ones; what was brought over connections
that are lost; the least recently used of the connection that brought the most.

Clients that speak less than protocol 1.3 send an adapter whole under a name that is their own; it holds for their
connection only.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from remote_modules.errors import RefusalReason, RemoteProtocolError, UnsupportedCallError, first_line
from remote_modules.model.adapted import check_fit
from remote_modules.model.adapter_content import AdapterContent, assemble, content_name, content_of, part_digest
from remote_modules.model.adapters import Adapter, decode_entries
from remote_modules.server.checks import RequestTensors, refuse
from remote_modules.wire.messages import CallMeta

__all__ = ["AdapterStore", "Offload"]

Found = tuple[AdapterContent, Adapter]
Offload = Callable[[Callable[[], Found]], Awaitable[Found]]

MAX_ADAPTERS = 4096  # of which the smallest take a KiB each
REPLACED_LEASE_S = 60.0  # a backward may still come for a version that is older than the optimizer's
OFFLOAD_BYTES = 1 << 20  # less is verified at once: about a millisecond
MISSING = "this peer does not have the adapter, or dropped it"


@dataclass(slots=True)
class _Held:
    """One adapter.

    Attributes:
        slot: digests of its entries: a newer one of the same is a newer version.
        owner: connection that brought it, or, once that is lost, the next one that uses it.
        num_bytes: of its parts, whether or not others have them too.
        is_replaced: whether its owner brought a newer version since it was last used.
    """

    adapter: Adapter
    parts: tuple[bytes, ...]
    slot: tuple[bytes, ...]
    owner: int | None
    used_s: float
    num_bytes: int
    is_replaced: bool = False


@dataclass(slots=True)
class _Part:
    tensor: torch.Tensor
    num_users: int = 0


class AdapterStore:
    """The adapters of all connections, least recently used first.

    Args:
        max_bytes: of all together, each part counted once.
        lease_s: time without use after which an adapter is dropped.
        clock: monotonic seconds.
        offload: runs the verification of a large adapter off the event loop; None: on it.

    Attributes:
        num_received, bytes_received: adapters of which something came, and that much of them.
    """

    def __init__(
        self, *, max_bytes: int, lease_s: float, clock: Callable[[], float], offload: Offload | None = None
    ) -> None:
        self.num_received = 0
        self.bytes_received = 0
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._lease_s = lease_s
        self._clock = clock
        self._offload = offload
        self._preloaded: dict[str, Adapter] = {}
        self._pinned: dict[bytes, torch.Tensor] = {}  # parts of preloaded ones
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._parts: dict[bytes, _Part] = {}
        self._latest: dict[tuple[int | None, tuple[bytes, ...]], str] = {}
        self._arriving: dict[bytes, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def preload(self, adapter: Adapter, name: str, *, device: torch.device | str = "cpu") -> None:
        """Keep an adapter for good on ``device``, under a name that is agreed upon.

        Clients that have the adapter name its content, and may train from there; that is kept in memory of the CPU.
        """
        content = content_of(adapter)
        self._preloaded[name] = adapter.leaves(device)
        if adapter.entries:
            self._preloaded[content.name] = Adapter(adapter.entries, adapter.tensors)
        self._pinned.update(zip(content.parts, content.tensors, strict=True))

    async def of(
        self, call: CallMeta, tensors: RequestTensors, blocks: Mapping[int, nn.Module], connection_id: int
    ) -> Adapter | None:
        """The adapter of a request, from what it brings and what is here already.

        Raises:
            PeerRefused: ``adapter_missing``, ``out_of_memory`` for one that is larger than all that is kept, or
                ``bad_request`` for one that is none or does not fit ``blocks``.
        """
        if not call.adapter:
            return None
        if call.adapter_parts:
            return await self._take(call, tensors, blocks, connection_id)
        if tensors.adapter is not None:
            return await self._take_whole(call, tensors, blocks, connection_id)
        await self._arrival({call.adapter.encode(), _private(connection_id, call.adapter).encode()})
        return self._use(call.adapter, connection_id)

    async def bring(self, parts: tuple[bytes, ...], tensors: Mapping[str, torch.Tensor], connection_id: int) -> None:
        """Keep parts for a request that will name them; not for long if none does.

        Raises:
            PeerRefused: as `of`.
        """
        brought = _brought(parts, tensors)
        if len(brought) != len(set(parts)):
            refuse(f"adapter is not usable: {len(parts)} parts are named, {len(tensors)} came")
        num_bytes = _size(brought.values())
        self._check_size(num_bytes)
        await self._arrival(set(brought))
        content, adapter = await self._verified(num_bytes, set(brought), lambda: (_owned(brought), Adapter((), ())))
        name = _private(connection_id, f"parts {content.name}")
        self._hold(name, content, adapter, connection_id)
        self._held[name].is_replaced = True
        self._count(tensors)

    def forget(self, connection_id: int) -> None:
        """The connection is lost; what came over it stays until its lease ends, but for private names."""
        for name, held in list(self._held.items()):
            if name.startswith(f"{connection_id} "):
                self._drop(name)
            elif held.owner == connection_id:
                self._latest.pop((held.owner, held.slot), None)
                held.owner = None

    def expire(self) -> None:
        """Drop what was not used for the time of the lease, which is short for versions that were replaced."""
        now_s = self._clock()
        for name, held in list(self._held.items()):
            lease_s = min(self._lease_s, REPLACED_LEASE_S) if held.is_replaced else self._lease_s
            if now_s - held.used_s >= lease_s:
                self._drop(name)

    def _use(self, name: str, connection_id: int) -> Adapter:
        if (preloaded := self._preloaded.get(name)) is not None:
            return preloaded
        is_public = name in self._held and " " not in name
        key = name if is_public else _private(connection_id, name)
        held = self._held.get(key)
        if held is None or not held.adapter.entries:
            refuse(MISSING, RefusalReason.ADAPTER_MISSING)
        held.used_s, held.is_replaced = self._clock(), False
        if held.owner is None:
            held.owner = connection_id
            self._latest[connection_id, held.slot] = key
        self._held.move_to_end(key)
        return held.adapter

    async def _arrival(self, keys: set[bytes]) -> None:
        """Wait for what is being verified."""
        while coming := [self._arriving[key] for key in keys if key in self._arriving]:
            await asyncio.wait(coming)

    async def _take_whole(
        self, call: CallMeta, tensors: RequestTensors, blocks: Mapping[int, nn.Module], connection_id: int
    ) -> Adapter:
        """As clients before 1.3 send it."""
        name = _private(connection_id, call.adapter)
        await self._arrival({name.encode()})
        num_bytes = _size(tensors.adapter_tensors.values())
        content, adapter = await self._verified(num_bytes, {name.encode()}, lambda: _read_whole(tensors, blocks))
        self._hold(name, content, adapter, connection_id)
        self._count(tensors.adapter_tensors)
        return adapter

    async def _take(
        self, call: CallMeta, tensors: RequestTensors, blocks: Mapping[int, nn.Module], connection_id: int
    ) -> Adapter:
        parts = call.adapter_parts
        if tensors.adapter is not None or content_name(parts) != call.adapter:
            refuse("adapter is not usable: its name is not that of its parts")
        keys = {*parts, call.adapter.encode()}
        await self._arrival(keys)
        if not tensors.adapter_tensors and (call.adapter in self._held or call.adapter in self._preloaded):
            return self._use(call.adapter, connection_id)
        brought = _brought(parts, tensors.adapter_tensors)
        known = {part: found for part in parts if (found := self._find(part)) is not None}
        if any(part not in brought and part not in known for part in parts):
            refuse(MISSING, RefusalReason.ADAPTER_MISSING)
        num_bytes = sum((brought if part in brought else known)[part].nbytes for part in parts)
        self._check_size(num_bytes)
        keys = {*brought, call.adapter.encode()}
        content, adapter = await self._verified(num_bytes, keys, lambda: _verify(parts, brought, known, blocks))
        self._hold(call.adapter, content, adapter, connection_id)
        for name, held in list(self._held.items()):  # what came before it has served its purpose
            if held.owner == connection_id and not held.adapter.entries and set(held.parts) <= set(parts):
                self._drop(name)
        self._count(tensors.adapter_tensors)
        return adapter

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            text = f"the adapter has {num_bytes} bytes, this peer keeps {self._max_bytes} at most"
            refuse(text, RefusalReason.OUT_OF_MEMORY)

    def _find(self, part: bytes) -> torch.Tensor | None:
        if part in self._pinned:
            return self._pinned[part]
        held = self._parts.get(part)
        return None if held is None else held.tensor

    async def _verified(self, num_bytes: int, keys: set[bytes], verify: Callable[[], Found]) -> Found:
        """Requests that name one of ``keys`` meanwhile wait, as it is there as soon as it was received."""
        if self._offload is None or num_bytes < OFFLOAD_BYTES:
            return verify()
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arriving.update(dict.fromkeys(keys, arrived))
        try:
            return await self._offload(verify)
        finally:
            for key in keys:
                self._arriving.pop(key, None)
            # after the caller has put it into the store, which it does without waiting again
            asyncio.get_running_loop().call_soon(_settle, arrived)

    def _count(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if tensors:
            self.num_received += 1
            self.bytes_received += _size(tensors.values())

    def _hold(self, name: str, content: AdapterContent, adapter: Adapter, connection_id: int) -> None:
        slot = tuple(p for p, t in zip(content.parts, content.tensors, strict=True) if t.dtype is torch.uint8)
        held = _Held(adapter, content.parts, slot, connection_id, self._clock(), _size(content.tensors))
        for part, tensor in zip(content.parts, content.tensors, strict=True):
            if part in self._pinned:
                continue
            if part not in self._parts:
                self._parts[part] = _Part(tensor)
                self.num_bytes += tensor.nbytes
            self._parts[part].num_users += 1
        if name in self._held:
            self._drop(name)
        before = self._latest.get((connection_id, slot))
        if before is not None and before in self._held:
            self._held[before].is_replaced = True
        self._latest[connection_id, slot] = name
        self._held[name] = held
        while (self.num_bytes > self._max_bytes or len(self._held) > MAX_ADAPTERS) and len(self._held) > 1:
            self._drop(self._least_needed(keep=name))

    def _least_needed(self, keep: str) -> str:
        """What to drop next; see the module's docstring."""
        sizes: Counter[int | None] = Counter()
        for held in self._held.values():
            sizes[held.owner] += held.num_bytes

        def rank(held: _Held) -> tuple[bool, bool, int]:
            return held.is_replaced, held.owner is None, sizes[held.owner]

        others = [name for name in self._held if name != keep]
        return max(others, key=lambda name: rank(self._held[name]))  # the first of equal ones: the oldest

    def _drop(self, name: str) -> None:
        held = self._held.pop(name)
        if self._latest.get((held.owner, held.slot)) == name:
            del self._latest[held.owner, held.slot]
        for part in held.parts:
            if (found := self._parts.get(part)) is None:
                continue  # of a preloaded adapter
            found.num_users -= 1
            if not found.num_users:
                del self._parts[part]
                self.num_bytes -= found.tensor.nbytes


def _private(connection_id: int, name: str) -> str:
    """The name of what holds for one connection only."""
    return f"{connection_id} {name}"


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _brought(parts: Sequence[bytes], tensors: Mapping[str, torch.Tensor]) -> dict[bytes, torch.Tensor]:
    """What came with the request, by the digest that it must have."""
    numbers = {f"adapter.{number}": part for number, part in enumerate(parts)}
    unknown = [name for name in tensors if name not in numbers]
    if unknown:
        refuse(f"adapter is not usable: it has {len(parts)} parts, '{unknown[0]}' is none of them")
    return {numbers[name]: tensor for name, tensor in tensors.items()}


def _owned(brought: Mapping[bytes, torch.Tensor]) -> AdapterContent:
    """Parts whose digests are right, apart from the request's body."""
    for part, tensor in brought.items():
        if part_digest(tensor) != part:
            refuse("adapter is not usable: a part does not have the digest that it is named by")
    return AdapterContent(tuple(brought), tuple(tensor.clone() for tensor in brought.values()))


def _verify(
    parts: tuple[bytes, ...],
    brought: dict[bytes, torch.Tensor],
    known: dict[bytes, torch.Tensor],
    blocks: Mapping[int, nn.Module],
) -> Found:
    owned = _owned(brought)
    own = dict(zip(owned.parts, owned.tensors, strict=True))
    content = AdapterContent(parts, tuple(known[part] if part in known else own[part] for part in parts))
    try:
        adapter = assemble(content.tensors)
        check_fit(blocks, adapter)
    except (RemoteProtocolError, UnsupportedCallError) as exc:
        refuse(f"adapter is not usable: {first_line(exc)}")
    return content, adapter


def _read_whole(tensors: RequestTensors, blocks: Mapping[int, nn.Module]) -> Found:
    """As clients before 1.3 send it."""
    assert tensors.adapter is not None
    try:
        entries = decode_entries(tensors.adapter.numpy().tobytes())
        names = [f"adapter.{number}" for number in range(len(tensors.adapter_tensors))]
        missing = [name for name in names if name not in tensors.adapter_tensors]
        if missing:
            raise RemoteProtocolError(f"adapter tensors must be numbered from 0, '{missing[0]}' is missing")
        adapter = Adapter.of(entries, [tensors.adapter_tensors[name].clone() for name in names])
        check_fit(blocks, adapter)
    except (RemoteProtocolError, UnsupportedCallError) as exc:
        refuse(f"adapter is not usable: {first_line(exc)}")
    return content_of(adapter), adapter
