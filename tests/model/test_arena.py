"""KV caches in one piece of memory: regions of it, and caches that lie there give what others give."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from remote_modules.model.arena import SPARE_TOKENS, Arena, LayerShape, Region, Rooms
from remote_modules.model.kv import MIN_CAPACITY_TOKENS, GrowingLayer

ROWS, HEADS, SIZE = 2, 3, 8


def arena(num_tokens: int = 4096, layers: int = 2) -> Arena:
    shapes = {index: LayerShape(HEADS, SIZE) for index in range(layers)}
    return Arena(shapes, num_tokens, device=torch.device("cpu"), dtype=torch.float32)


def states(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, HEADS, num_tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def test_regions_do_not_overlap_and_are_free_again_when_dropped() -> None:
    memory = arena(100)
    taken: list[Region | None] = [memory.take(30) for _ in range(4)]
    assert taken[3] is None
    starts = [region.start for region in taken if region is not None]
    assert starts == [SPARE_TOKENS, SPARE_TOKENS + 30, SPARE_TOKENS + 60]
    assert memory.free_tokens == 100 - SPARE_TOKENS - 90
    taken[1] = None
    assert memory.take(31) is None
    taken[0] = None  # joins the one beside it
    region = memory.take(60)
    assert region is not None
    assert region.start == SPARE_TOKENS
    del region
    taken.clear()
    assert memory.free_tokens == 100 - SPARE_TOKENS


def test_all_layers_of_a_session_move_to_the_same_region() -> None:
    memory = arena()
    rooms = Rooms(memory)
    layers = [GrowingLayer(index=index, rooms=rooms) for index in range(2)]
    for num_tokens in (3, MIN_CAPACITY_TOKENS, 3 * MIN_CAPACITY_TOKENS):
        for layer in layers:
            layer.update(states(num_tokens), states(num_tokens))
        region = layers[0].region
        assert region is not None
        assert region is layers[1].region
    assert memory.num_tokens - SPARE_TOKENS - memory.free_tokens == ROWS * 8 * MIN_CAPACITY_TOKENS
    region = None
    for layer in layers:
        layer.reset()
    assert memory.free_tokens == memory.num_tokens - SPARE_TOKENS


def test_layers_in_an_arena_hold_what_others_hold() -> None:
    rooms = Rooms(arena())
    layer, other = GrowingLayer(index=1, rooms=rooms), GrowingLayer()
    for seed, num_tokens in enumerate((5, 1, MIN_CAPACITY_TOKENS, 1)):
        given = states(num_tokens, seed), states(num_tokens, seed + 100)
        for found, expected in zip(layer.update(*given), other.update(*given), strict=True):
            assert torch.equal(found, expected)
        for each in (layer, other):
            each.crop(2)
            each.batch_select_indices(torch.tensor([1, 1] if seed == 1 else [1, 0]))
    assert layer.region is not None
    one = states(1, 7)
    for found, expected in zip(layer.update(one, one), other.update(one, one), strict=True):
        assert torch.equal(found, expected)
    assert layer.get_seq_length() == other.get_seq_length()


def test_a_full_arena_leaves_layers_with_memory_of_their_own() -> None:
    memory = arena(ROWS * MIN_CAPACITY_TOKENS + SPARE_TOKENS)
    layer = GrowingLayer(index=0, rooms=Rooms(memory))
    first, more = states(3), states(MIN_CAPACITY_TOKENS, 1)
    layer.update(first, first)
    assert memory.free_tokens == 0
    keys, _ = layer.update(more, more)
    assert torch.equal(keys, torch.cat([first, more], dim=2))
    assert memory.free_tokens == memory.num_tokens - SPARE_TOKENS


def test_a_region_may_end_while_another_is_looked_for() -> None:
    memory = arena(100)
    first, second = [memory.take(40)], memory.take(40)

    class Ending(list[tuple[int, int]]):
        """Free ranges; while they are gone through, a session ends in another thread."""

        def __iter__(self) -> Iterator[tuple[int, int]]:
            first.clear()
            return super().__iter__()

    memory._free = Ending(memory._free)
    third = memory.take(10)
    assert not first
    assert second is not None
    assert third is not None
    assert third.start == SPARE_TOKENS + 80
    assert memory.free_tokens == 99 - 40 - 10
