from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.adapter_entries import Entry, LoHa, LoKr, Lora, Oft, Prompt
from remote_modules.model.adapters import Adapter, encode_entries
from remote_modules.server.adapter_store import AdapterStore
from remote_modules.server.checks import RequestTensors
from remote_modules.wire.messages import CallMeta

SIZE, RANK = 8, 2
BYTES = 2 * SIZE * RANK * 4  # of the two factors of one LoRA, float32
MISSING = "this adapter was not sent on this connection, or was dropped"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(SIZE, SIZE)
        self.norm = nn.LayerNorm(SIZE)


BLOCKS: Mapping[int, nn.Module] = {1: Block(), 2: Block()}
ENTRY = Lora(1, "proj", 0.5)


def brought(*entries: Entry, tensors: list[torch.Tensor] | None = None, seed: int = 0) -> RequestTensors:
    """A request with an adapter; by default a LoRA whose tensors fit."""
    generator = torch.Generator().manual_seed(seed)
    if tensors is None:
        tensors = [torch.randn(RANK, SIZE, generator=generator), torch.randn(SIZE, RANK, generator=generator)]
    data = bytearray(encode_entries(entries or [ENTRY]))
    named = {f"adapter.{number}": tensor for number, tensor in enumerate(tensors)}
    return RequestTensors(adapter=torch.frombuffer(data, dtype=torch.uint8), adapter_tensors=named)


def named(digest: str) -> CallMeta:
    return CallMeta(1, 1, adapter=digest)


NOTHING = RequestTensors()


def refusal_of(work: Callable[[], object]) -> tuple[RefusalReason, str]:
    with pytest.raises(PeerRefused) as caught:
        work()
    text = str(caught.value)
    assert text.splitlines() == [text]
    return caught.value.reason, text


def of(store: AdapterStore, digest: str, tensors: RequestTensors = NOTHING, connection_id: int = 1) -> Adapter | None:
    return store.of(named(digest), tensors, BLOCKS, connection_id)


def is_held(store: AdapterStore, digest: str, connection_id: int = 1) -> bool:
    try:
        return of(store, digest, connection_id=connection_id) is not None
    except PeerRefused as exc:
        if exc.reason is not RefusalReason.ADAPTER_MISSING:
            raise
        return False


def test_request_without_an_adapter_has_none() -> None:
    assert of(AdapterStore(max_bytes=10 * BYTES), "") is None


def test_adapter_is_sent_once() -> None:
    store = AdapterStore(max_bytes=10 * BYTES)
    assert refusal_of(lambda: of(store, "a")) == (RefusalReason.ADAPTER_MISSING, MISSING)
    request = brought()
    adapter = of(store, "a", request)
    assert adapter is not None
    assert adapter.entries == (ENTRY,)
    assert all(map(torch.equal, adapter.tensors, request.adapter_tensors.values()))
    assert of(store, "a") is adapter


def test_adapter_does_not_keep_the_request_alive() -> None:
    request = brought()
    adapter = of(AdapterStore(max_bytes=10 * BYTES), "a", request)
    assert adapter is not None
    kept = {tensor.untyped_storage().data_ptr() for tensor in adapter.tensors}
    assert not kept & {tensor.untyped_storage().data_ptr() for tensor in request.adapter_tensors.values()}


def test_connection_sees_only_what_came_over_it() -> None:
    store = AdapterStore(max_bytes=10 * BYTES)
    mine, theirs = of(store, "a", brought(seed=1), 1), of(store, "a", brought(seed=2), 2)
    assert of(store, "a", connection_id=1) is mine
    assert of(store, "a", connection_id=2) is theirs
    assert mine is not theirs
    assert not is_held(store, "a", connection_id=3)


def test_lost_connection_takes_its_adapters_along() -> None:
    store = AdapterStore(max_bytes=10 * BYTES)
    for digest, connection_id in (("a", 1), ("b", 1), ("a", 2)):
        of(store, digest, brought(), connection_id)
    store.forget(1)
    store.forget(7)
    assert [is_held(store, digest, n) for digest, n in (("a", 1), ("b", 1), ("a", 2))] == [False, False, True]


def test_adapter_that_comes_again_replaces_the_one_before_and_counts_once() -> None:
    store = AdapterStore(max_bytes=2 * BYTES)
    of(store, "a", brought(seed=1))
    of(store, "b", brought())
    again = of(store, "a", brought(seed=2))
    assert of(store, "a") is again
    assert is_held(store, "b")


@pytest.mark.parametrize("used", ["a", "b"])
def test_least_recently_used_adapter_is_dropped(used: str) -> None:
    store = AdapterStore(max_bytes=2 * BYTES)
    of(store, "a", brought())
    of(store, "b", brought(), 2)
    of(store, used, connection_id=1 if used == "a" else 2)
    of(store, "c", brought())
    assert (is_held(store, "a"), is_held(store, "b", 2), is_held(store, "c")) == (used == "a", used == "b", True)


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
    request = brought(entry, tensors=[torch.ones(shape) for shape in shapes])
    reason, got = refusal_of(lambda: of(AdapterStore(max_bytes=10 * BYTES), "a", request))
    assert reason is RefusalReason.BAD_REQUEST
    assert text in got


def test_adapter_larger_than_the_store_serves_its_request_and_the_next() -> None:
    store = AdapterStore(max_bytes=BYTES - 1)
    of(store, "a", brought())
    large = of(store, "b", brought())
    assert large is not None
    assert of(store, "b") is large
    assert not is_held(store, "a")


def with_entries(data: bytes) -> RequestTensors:
    request = brought()
    request.adapter = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return request


def without(name: str) -> RequestTensors:
    request = brought()
    request.adapter_tensors[f"adapter.{9}"] = request.adapter_tensors.pop(name)
    return request


def pair(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, fill: float = 0.0) -> list[torch.Tensor]:
    return [torch.full(shape, fill, dtype=dtype) for shape in shapes]


GOOD_SHAPES = ((RANK, SIZE), (SIZE, RANK))
UNUSABLE: dict[str, tuple[RequestTensors, str]] = {
    "no-json": (with_entries(b"\x00\xff"), "adapter entries are malformed: "),
    "no-list": (with_entries(b'{"a": 1}'), "adapter entries are malformed: "),
    "no-entry": (with_entries(b"[]"), "adapter has 0 entries, expected 1 to "),
    "unknown-kind": (with_entries(b'[{"type": "exec"}]'), "adapter entries are malformed: "),
    "unnumbered": (without("adapter.0"), "adapter tensors must be numbered from 0, 'adapter.0' is missing"),
    "one-tensor": (brought(tensors=pair((RANK, SIZE))), "adapter has 1 tensors, its 1 entries need 2"),
    "three-tensors": (brought(tensors=pair(*GOOD_SHAPES, (1,))), "adapter has 3 tensors, its 1 entries need 2"),
    "ranks": (
        brought(tensors=pair((2, SIZE), (SIZE, 3))),
        "adapter of 'proj' of block 1 claims shapes [[2, 8], [8, 3]]",
    ),
    "scalar": (brought(tensors=pair((), ())), "adapter of 'proj' of block 1 claims shapes [[], []]"),
    "sizes": (
        brought(tensors=pair((2, 9), (9, 2))),
        "adapter of 'proj' of block 1 is for sizes [9, 9], expected [8, 8]",
    ),
    "integers": (brought(tensors=pair(*GOOD_SHAPES, dtype=torch.int64)), "adapter of 'proj' has dtype torch.int64, "),
    "infinite": (brought(tensors=pair(*GOOD_SHAPES, fill=float("inf"))), "adapter holds values that are not finite"),
    "no-module": (brought(Lora(1, "nothing", 1.0)), "block 1 has no module 'nothing' to adapt"),
    "module-of-two-lines": (brought(Lora(1, "a\nb", 1.0)), ""),
    "no-linear": (brought(Lora(1, "norm", 1.0)), "'norm' of block 1 is a LayerNorm, adapters are carried for "),
}


@pytest.mark.parametrize(("request_tensors", "text"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_adapter_is_refused_and_not_kept(request_tensors: RequestTensors, text: str) -> None:
    store = AdapterStore(max_bytes=10 * BYTES)
    reason, found = refusal_of(lambda: of(store, "a", request_tensors))
    assert reason is RefusalReason.BAD_REQUEST
    assert found.startswith(f"adapter is not usable: {text}")
    assert not is_held(store, "a")


def test_unusable_adapter_leaves_the_one_before() -> None:
    store = AdapterStore(max_bytes=10 * BYTES)
    good = of(store, "a", brought())
    refusal_of(lambda: of(store, "a", UNUSABLE["sizes"][0]))
    assert of(store, "a") is good


def test_entries_of_blocks_that_are_elsewhere_are_left_alone() -> None:
    assert of(AdapterStore(max_bytes=10 * BYTES), "a", brought(Lora(7, "nothing", 1.0))) is not None
