from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import nn

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.adapter_content import AdapterContent, content_of, part_digest
from remote_modules.model.adapter_entries import Entry, Ia3, LoHa, LoKr, Lora, Oft, Prompt
from remote_modules.model.adapter_files import FrozenAdapter
from remote_modules.model.adapters import Adapter, encode_entries
from remote_modules.server.adapter_store import OFFLOAD_BYTES, REPLACED_LEASE_S, AdapterStore, Found
from remote_modules.server.checks import RequestTensors
from remote_modules.wire.messages import CallMeta

SIZE, RANK = 8, 2
ENTRIES_BYTES = len(encode_entries([Lora(1, "proj", 0.5)]))
BYTES = 2 * SIZE * RANK * 4 + ENTRIES_BYTES  # of one LoRA, float32
MISSING = "this peer does not have the adapter, or dropped it"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(SIZE, SIZE)
        self.norm = nn.LayerNorm(SIZE)
        self.wide = nn.Linear(OFFLOAD_BYTES // 4, 1, bias=False)


BLOCKS: Mapping[int, nn.Module] = {1: Block(), 2: Block()}
ENTRY = Lora(1, "proj", 0.5)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Sent(NamedTuple):
    """A request that brings an adapter, or a part of it."""

    call: CallMeta
    tensors: RequestTensors

    @property
    def name(self) -> str:
        return self.call.adapter


def sent(content: AdapterContent, only: set[int] | None = None) -> Sent:
    """With all parts, or some of them by number."""
    named = {f"adapter.{n}": t for n, t in enumerate(content.tensors) if only is None or n in only}
    return Sent(
        CallMeta(1, 1, adapter=content.name, adapter_parts=content.parts), RequestTensors(adapter_tensors=named)
    )


def lora(seed: int = 0, entry: Lora = ENTRY, down: torch.Tensor | None = None) -> AdapterContent:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, SIZE, generator=generator) if down is None else down
    return content_of(Adapter((entry,), (down, torch.randn(SIZE, RANK, generator=generator))))


def raw(entries: bytes, tensors: list[torch.Tensor]) -> AdapterContent:
    """With true digests, whatever it holds."""
    parts = [torch.frombuffer(bytearray(entries), dtype=torch.uint8), *tensors]
    return AdapterContent(tuple(map(part_digest, parts)), tuple(parts))


def refusal_of(work: Callable[[], object]) -> tuple[RefusalReason, str]:
    with pytest.raises(PeerRefused) as caught:
        work()
    text = str(caught.value)
    assert text.splitlines() == [text]
    return caught.value.reason, text


def new_store(max_bytes: int = 100 * BYTES, lease_s: float = 60.0, clock: Clock | None = None) -> AdapterStore:
    return AdapterStore(max_bytes=max_bytes, lease_s=lease_s, clock=clock or Clock())


def take(store: AdapterStore, request: Sent, connection_id: int = 1) -> Adapter:
    adapter = asyncio.run(store.of(*request, BLOCKS, connection_id))
    assert adapter is not None
    return adapter


def use(store: AdapterStore, name: str, connection_id: int = 1) -> Adapter:
    return take(store, Sent(CallMeta(1, 1, adapter=name), RequestTensors()), connection_id)


def is_held(store: AdapterStore, name: str, connection_id: int = 1) -> bool:
    try:
        use(store, name, connection_id)
    except PeerRefused as exc:
        if exc.reason is not RefusalReason.ADAPTER_MISSING:
            raise
        return False
    return True


def test_request_without_an_adapter_has_none() -> None:
    assert asyncio.run(new_store().of(CallMeta(1, 1), RequestTensors(), BLOCKS, 1)) is None


def test_adapter_is_sent_once_for_all_connections() -> None:
    store, content = new_store(), lora()
    assert refusal_of(lambda: use(store, content.name)) == (RefusalReason.ADAPTER_MISSING, MISSING)
    adapter = take(store, sent(content))
    assert adapter.entries == (ENTRY,)
    assert all(map(torch.equal, adapter.tensors, content.tensors[1:]))
    assert use(store, content.name) is adapter
    assert use(store, content.name, connection_id=2) is adapter
    assert (store.num_received, store.bytes_received, store.num_bytes) == (1, BYTES, BYTES)


def test_only_what_changed_is_sent_again() -> None:
    store, first = new_store(), lora(1)
    second = lora(2, down=first.tensors[1])
    take(store, sent(first))
    adapter = take(store, sent(second, only={2}))
    assert all(map(torch.equal, adapter.tensors, second.tensors[1:]))
    assert (store.num_received, store.bytes_received) == (2, BYTES + SIZE * RANK * 4)
    assert store.num_bytes == BYTES + SIZE * RANK * 4


def test_part_that_is_not_there_is_said_to_be_missing_and_nothing_is_kept() -> None:
    store, content = new_store(), lora()
    missing = (RefusalReason.ADAPTER_MISSING, MISSING)
    assert refusal_of(lambda: take(store, sent(content, only={0, 2}))) == missing
    assert store.num_bytes == len(store) == 0


def test_parts_that_are_all_there_make_another_adapter() -> None:
    store, first, second = new_store(), lora(1), lora(2, Lora(2, "proj", 0.5))
    take(store, sent(first))
    take(store, sent(second))
    both = AdapterContent(first.parts + second.parts, first.tensors + second.tensors)
    assert len(take(store, sent(both, only=set())).entries) == 2
    assert store.num_bytes == 2 * BYTES


def test_adapter_does_not_keep_the_request_alive() -> None:
    content = lora()
    adapter = take(new_store(), sent(content))
    kept = {tensor.untyped_storage().data_ptr() for tensor in adapter.tensors}
    assert not kept & {tensor.untyped_storage().data_ptr() for tensor in content.tensors}


def test_adapter_of_a_lost_connection_stays_for_others() -> None:
    store, content = new_store(), lora()
    take(store, sent(content), 1)
    store.forget(1)
    store.forget(7)
    assert is_held(store, content.name, 2)


def test_adapter_is_dropped_when_nobody_used_it_for_the_lease() -> None:
    clock = Clock()
    store, first, second = new_store(lease_s=60.0, clock=clock), lora(1), lora(2)
    take(store, sent(first))
    take(store, sent(second))
    clock.now_s = 40.0
    use(store, first.name, 2)
    clock.now_s = 60.0
    store.expire()
    assert [is_held(store, content.name) for content in (first, second)] == [True, False]
    clock.now_s = 120.0
    store.expire()
    assert store.num_bytes == len(store) == 0


def test_replaced_version_is_dropped_sooner() -> None:
    clock = Clock()
    store, other = new_store(lease_s=600.0, clock=clock), lora(3, Lora(1, "proj", 0.25))
    for content in (lora(1), other, lora(2)):
        take(store, sent(content))
    clock.now_s = REPLACED_LEASE_S
    store.expire()
    assert [is_held(store, content.name) for content in (lora(1), other, lora(2))] == [False, True, True]


def test_newer_versions_push_out_older_ones_of_the_same_client_only() -> None:
    store, other = new_store(max_bytes=3 * BYTES), lora(99)
    take(store, sent(other), 2)
    versions = [lora(seed) for seed in range(20)]
    for version in versions:
        take(store, sent(version), 1)
    assert is_held(store, other.name, 2)
    assert [is_held(store, versions[number].name) for number in (0, 15, 19)] == [False, False, True]
    assert store.num_bytes <= 3 * BYTES


def test_replaced_version_that_is_used_again_is_as_good_as_the_newer_one() -> None:
    store = new_store(max_bytes=2 * (BYTES + 1))
    old, new, third = lora(1), lora(2), lora(3, Lora(1, "proj", 0.25))
    take(store, sent(old))
    take(store, sent(new))
    use(store, old.name)
    take(store, sent(third))
    assert [is_held(store, content.name) for content in (old, new, third)] == [True, False, True]


def test_client_that_brought_the_most_loses_its_oldest_first() -> None:
    store, other = new_store(max_bytes=3 * (BYTES + 2)), lora(99)
    take(store, sent(other), 2)  # the least recently used of all
    mine = [lora(number, Lora(1, "proj", 0.5 + number)) for number in range(4)]  # no versions of each other
    for content in mine:
        take(store, sent(content), 1)
    assert is_held(store, other.name, 2)
    assert [is_held(store, content.name) for content in mine] == [False, False, True, True]


def test_what_lost_connections_brought_goes_before_what_open_ones_use() -> None:
    store, lost, kept = new_store(max_bytes=2 * (BYTES + 2)), lora(1, Lora(1, "proj", 1.5)), lora(2)
    take(store, sent(kept), 2)
    take(store, sent(lost), 1)
    store.forget(1)
    take(store, sent(lora(3, Lora(2, "proj", 1.5))), 2)
    assert [is_held(store, content.name, 3) for content in (kept, lost)] == [True, False]


@pytest.mark.parametrize(
    ("entry", "shapes", "text"),
    [
        (LoHa(1, "proj", 1.0), [[9, 1], [1, 8], [9, 1], [1, 8]], "is for sizes [9, 8], expected [8, 8]"),
        (LoHa(1, "proj", 1.0), [[8, 1], [1, 8], [8, 2], [1, 8]], "claims shapes"),
        (LoHa(1, "norm", 1.0), [[8, 1], [1, 8], [8, 1], [1, 8]], "'norm' of block 1 is a LayerNorm"),
        (LoKr(1, "proj", 1.0), [[4, 4], [4, 1], [1, 2]], "is for sizes [16, 8], expected [8, 8]"),
        (LoKr(1, "proj", 1.0, is_w2_whole=True), [[60_000, 1], [60_000, 8]], "is for sizes [3600000000, 8]"),
        (Oft(1, "proj", 2, 16), [[8, 1]], "is for sizes [16], expected [8]"),
        (Oft(1, "proj", 2, 8), [[8, 1]], "claims shapes [[8, 1]]"),
        (Oft(1, "proj", 1, 8), [[8, 1]], "malformed"),
        (Prompt(1), [[2, 8, 1]], "claims shapes [[2, 8, 1]]"),
    ],
)
def test_entries_that_do_not_fit_are_refused_before_anything_is_computed(
    entry: Entry, shapes: list[list[int]], text: str
) -> None:
    request = sent(raw(encode_entries([entry]), [torch.ones(shape) for shape in shapes]))
    reason, got = refusal_of(lambda: take(new_store(max_bytes=1 << 22), request))
    assert reason is RefusalReason.BAD_REQUEST
    assert text in got


def test_adapter_larger_than_the_store_is_refused_and_drives_nobody_out() -> None:
    store, first, second = new_store(max_bytes=BYTES), lora(1), lora(2, Lora(2, "proj", 0.5))
    take(store, sent(first))
    both = AdapterContent(first.parts + second.parts, first.tensors + second.tensors)
    reason, text = refusal_of(lambda: take(store, sent(both, only={3, 4, 5})))
    assert (reason, text) == (
        RefusalReason.OUT_OF_MEMORY,
        f"the adapter has {2 * BYTES} bytes, this peer keeps {BYTES} at most",
    )
    assert is_held(store, first.name)
    assert store.num_bytes == BYTES


def test_parts_that_are_named_again_and_again_count_each_time() -> None:
    store, content = new_store(max_bytes=3 * BYTES), lora()
    take(store, sent(content))
    often = AdapterContent(content.parts * 4, content.tensors * 4)
    assert refusal_of(lambda: take(store, sent(often, only=set())))[0] is RefusalReason.OUT_OF_MEMORY


def test_private_name_of_another_connection_is_nobodys() -> None:
    store = new_store()
    take(store, whole(), 1)
    assert is_held(store, "a", 1)
    assert not is_held(store, "1 a", 2)


def test_preloaded_adapter_stays_and_its_parts_need_not_be_sent() -> None:
    clock = Clock()
    store, content = new_store(max_bytes=2 * BYTES, clock=clock), lora()
    preloaded = FrozenAdapter((ENTRY,), content.tensors[1:])
    store.preload(preloaded, "agreed")
    clock.now_s = 1e6
    store.expire()
    agreed, named = use(store, "agreed"), use(store, content.name)
    assert (agreed.entries, named.entries) == (preloaded.entries, preloaded.entries)
    assert take(store, sent(content, only=set())) is named
    assert [t.requires_grad for t in agreed.leaves("cpu", requires_grad=True).tensors] == [False, False]
    assert [t.requires_grad for t in named.leaves("cpu", requires_grad=True).tensors] == [True, True]
    take(store, sent(lora(2, down=content.tensors[1]), only={0, 2}))
    assert store.bytes_received == BYTES - SIZE * RANK * 4


def test_large_adapter_is_verified_elsewhere_while_followers_wait() -> None:
    """1. A request brings an adapter. 2. One that names it comes before it is verified. 3. Both are served."""
    verifying = asyncio.Event()

    async def later(verify: Callable[[], Found]) -> Found:
        verifying.set()
        await asyncio.sleep(0)
        return verify()

    async def main() -> None:
        store = AdapterStore(max_bytes=1 << 30, lease_s=1.0, clock=Clock(), offload=later)
        entry = Lora(1, "wide", 0.5)
        large = content_of(Adapter((entry,), (torch.ones(1, OFFLOAD_BYTES // 4), torch.ones(1, 1))))
        first = asyncio.create_task(store.of(*sent(large), BLOCKS, 1))
        await verifying.wait()
        named = Sent(CallMeta(1, 1, adapter=large.name), RequestTensors())
        listed = sent(large, only=set())
        assert not len(store)
        work: list[Awaitable[Adapter | None]] = [store.of(*named, BLOCKS, 1), store.of(*listed, BLOCKS, 2), first]
        found = await asyncio.gather(*work)
        assert found[0] is found[1] is found[2] is not None

    asyncio.run(main())


def test_follower_of_an_adapter_that_turns_out_unusable_is_told_that_it_is_missing() -> None:
    async def later(verify: Callable[[], Found]) -> Found:
        await asyncio.sleep(0)
        return verify()

    async def main() -> list[object]:
        store = AdapterStore(max_bytes=1 << 30, lease_s=1.0, clock=Clock(), offload=later)
        request = sent(raw(b"[]", [torch.ones(OFFLOAD_BYTES)]))
        named = Sent(CallMeta(1, 1, adapter=request.name), RequestTensors())
        both = (store.of(*request, BLOCKS, 1), store.of(*named, BLOCKS, 1))
        return list(await asyncio.gather(*both, return_exceptions=True))

    reasons = [error.reason for error in asyncio.run(main()) if isinstance(error, PeerRefused)]
    assert reasons == [RefusalReason.BAD_REQUEST, RefusalReason.ADAPTER_MISSING]


# -------------------------------------------------------------------------------- in several messages


def piece(content: AdapterContent, *numbers: int) -> tuple[tuple[bytes, ...], dict[str, torch.Tensor]]:
    return tuple(content.parts[n] for n in numbers), {
        f"adapter.{at}": content.tensors[n] for at, n in enumerate(numbers)
    }


def test_parts_may_come_ahead_of_the_request_that_names_them() -> None:
    store, content = new_store(), lora()
    for numbers in ((0, 1), (2,)):
        asyncio.run(store.bring(*piece(content, *numbers), 1))
    assert store.num_bytes == BYTES
    assert refusal_of(lambda: use(store, content.name))[0] is RefusalReason.ADAPTER_MISSING
    adapter = take(store, sent(content, only=set()))
    assert all(map(torch.equal, adapter.tensors, content.tensors[1:]))
    assert (len(store), store.num_bytes, store.bytes_received) == (1, BYTES, BYTES)


def test_parts_that_nothing_names_go_with_their_connection_and_after_a_minute() -> None:
    clock = Clock()
    store, content = new_store(lease_s=600.0, clock=clock), lora()
    for connection_id in (1, 2):
        asyncio.run(store.bring(*piece(content, 0, 1, 2), connection_id))
    store.forget(1)
    assert (len(store), store.num_bytes) == (1, BYTES)
    clock.now_s = REPLACED_LEASE_S
    store.expire()
    assert (len(store), store.num_bytes) == (0, 0)


def test_parts_that_came_ahead_are_no_adapter_and_make_way() -> None:
    """Bounded, and nothing that is in use goes for them."""
    store, used = new_store(max_bytes=2 * BYTES), lora(1)
    take(store, sent(used), connection_id=2)
    asyncio.run(store.bring(*piece(lora(2), 0, 1, 2), 1))
    name = next(name for name in store._held if name.startswith("1 ")).removeprefix("1 ")
    assert refusal_of(lambda: use(store, name))[0] is RefusalReason.ADAPTER_MISSING
    asyncio.run(store.bring(*piece(lora(3), 0, 1, 2), 1))
    assert is_held(store, used.name, connection_id=2)
    assert store.num_bytes <= 2 * BYTES


def test_bad_parts_ahead_of_a_request_are_refused() -> None:
    store, content = new_store(), lora()
    parts, tensors = piece(content, 1, 2)
    bad = [
        ((parts[1], parts[0]), tensors, "does not have the digest"),
        (parts, {"adapter.0": tensors["adapter.0"]}, "2 parts are named, 1 came"),
        (parts, {**tensors, "adapter.2": tensors["adapter.0"]}, "'adapter.2' is none of them"),
    ]
    for named, brought, expected in bad:
        reason, text = refusal_of(lambda named=named, brought=brought: asyncio.run(store.bring(named, brought, 1)))  # type: ignore[misc]
        assert reason is RefusalReason.BAD_REQUEST
        assert expected in text
    small = new_store(max_bytes=8)
    assert refusal_of(lambda: asyncio.run(small.bring(parts, tensors, 1)))[0] is RefusalReason.OUT_OF_MEMORY
    assert len(store) == len(small) == 0


# -------------------------------------------------------------------------------- older clients


def whole(*entries: Lora | Ia3, tensors: list[torch.Tensor] | None = None, seed: int = 0) -> Sent:
    """As clients before 1.3 send it, under a name of their own."""
    content = lora(seed)
    data = bytearray(encode_entries(entries or [ENTRY]))
    named = {f"adapter.{n}": t for n, t in enumerate(content.tensors[1:] if tensors is None else tensors)}
    found = RequestTensors(adapter=torch.frombuffer(data, dtype=torch.uint8), adapter_tensors=named)
    return Sent(CallMeta(1, 1, adapter="a"), found)


def test_name_of_an_older_client_holds_for_its_connection() -> None:
    store = new_store()
    mine, theirs = take(store, whole(seed=1), 1), take(store, whole(seed=2), 2)
    assert use(store, "a", connection_id=1) is mine
    assert use(store, "a", connection_id=2) is theirs
    assert not is_held(store, "a", connection_id=3)
    store.forget(1)
    assert [is_held(store, "a", connection_id=number) for number in (1, 2)] == [False, True]


def test_adapter_of_an_older_client_that_comes_again_replaces_the_one_before() -> None:
    store = new_store()
    take(store, whole(seed=1))
    again = take(store, whole(seed=2))
    assert use(store, "a") is again
    assert (len(store), store.num_bytes) == (1, BYTES)


def test_large_adapter_of_an_older_client_is_verified_elsewhere_while_followers_wait() -> None:
    verified: list[Found] = []

    async def later(verify: Callable[[], Found]) -> Found:
        await asyncio.sleep(0)
        verified.append(verify())
        return verified[-1]

    async def main() -> None:
        store = AdapterStore(max_bytes=1 << 30, lease_s=1.0, clock=Clock(), offload=later)
        large = whole(Lora(1, "wide", 0.5), tensors=[torch.ones(1, OFFLOAD_BYTES // 4), torch.ones(1, 1)])
        named = Sent(CallMeta(1, 1, adapter="a"), RequestTensors())
        found = await asyncio.gather(store.of(*large, BLOCKS, 1), store.of(*named, BLOCKS, 1))
        assert found[0] is found[1] is verified[0][1]

    asyncio.run(main())


def without(name: str) -> Sent:
    request = whole()
    request.tensors.adapter_tensors["adapter.9"] = request.tensors.adapter_tensors.pop(name)
    return request


def test_tensors_of_an_older_client_must_be_numbered() -> None:
    reason, text = refusal_of(lambda: take(new_store(), without("adapter.0")))
    assert reason is RefusalReason.BAD_REQUEST
    assert text.endswith("adapter tensors must be numbered from 0, 'adapter.0' is missing")


# -------------------------------------------------------------------------------- bad ones


def pair(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, fill: float = 0.0) -> list[torch.Tensor]:
    return [torch.full(shape, fill, dtype=dtype) for shape in shapes]


def with_tensors(tensors: list[torch.Tensor], entry: Lora | Ia3 = ENTRY) -> Sent:
    return sent(raw(encode_entries([entry]), tensors))


def with_entries(data: bytes) -> Sent:
    return sent(raw(data, pair(*GOOD_SHAPES)))


def renamed() -> Sent:
    request = sent(lora())
    return Sent(CallMeta(1, 1, adapter="0" * 64, adapter_parts=request.call.adapter_parts), request.tensors)


def forged() -> Sent:
    request = sent(lora())
    request.tensors.adapter_tensors["adapter.1"] = torch.zeros(RANK, SIZE)
    return request


def beyond() -> Sent:
    request = sent(lora())
    request.tensors.adapter_tensors["adapter.3"] = torch.zeros(1)
    return request


GOOD_SHAPES = ((RANK, SIZE), (SIZE, RANK))
UNUSABLE: dict[str, tuple[Sent, str]] = {
    "another-name": (renamed(), "its name is not that of its parts"),
    "another-content": (forged(), "a part does not have the digest that it is named by"),
    "more-parts": (beyond(), "it has 3 parts, 'adapter.3' is none of them"),
    "no-entries": (sent(AdapterContent(lora().parts[1:], lora().tensors[1:])), "part 0 of the adapter must be entries"),
    "no-json": (with_entries(b"\x00\xff"), "adapter entries are malformed: "),
    "no-list": (with_entries(b'{"a": 1}'), "adapter entries are malformed: "),
    "no-entry": (with_entries(b"[]"), "adapter has 0 entries, expected 1 to "),
    "unknown-kind": (with_entries(b'[{"type": "exec"}]'), "adapter entries are malformed: "),
    "one-tensor": (with_tensors(pair((RANK, SIZE))), "adapter has 1 tensors, its 1 entries need 2"),
    "three-tensors": (with_tensors(pair(*GOOD_SHAPES, (1,))), "part 3 of the adapter must be entries as uint8, got "),
    "ranks": (with_tensors(pair((2, SIZE), (SIZE, 3))), "adapter of 'proj' of block 1 claims shapes [[2, 8], [8, 3]]"),
    "scalar": (with_tensors(pair((), ())), "adapter of 'proj' of block 1 claims shapes [[], []]"),
    "sizes": (with_tensors(pair((2, 9), (9, 2))), "adapter of 'proj' of block 1 is for sizes [9, 9], expected [8, 8]"),
    "integers": (with_tensors(pair(*GOOD_SHAPES, dtype=torch.int64)), "adapter of 'proj' has dtype torch.int64, "),
    "infinite": (with_tensors(pair(*GOOD_SHAPES, fill=float("inf"))), "adapter holds values that are not finite"),
    "no-module": (with_tensors(pair(*GOOD_SHAPES), Lora(1, "nothing", 1.0)), "block 1 has no module 'nothing' to "),
    "module-of-two-lines": (with_tensors(pair(*GOOD_SHAPES), Lora(1, "a\nb", 1.0)), ""),
    "no-linear": (
        with_tensors(pair(*GOOD_SHAPES), Lora(1, "norm", 1.0)),
        "'norm' of block 1 is a LayerNorm, ",
    ),
}


@pytest.mark.parametrize(("request_sent", "text"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_adapter_is_refused_and_not_kept(request_sent: Sent, text: str) -> None:
    store = new_store()
    reason, found = refusal_of(lambda: take(store, request_sent))
    assert reason is RefusalReason.BAD_REQUEST
    assert found.startswith(f"adapter is not usable: {text}")
    assert store.num_bytes == len(store) == 0


def test_entries_of_blocks_that_are_elsewhere_are_left_alone() -> None:
    assert take(new_store(), with_tensors(pair(*GOOD_SHAPES), Lora(7, "nothing", 1.0))) is not None
