from __future__ import annotations

import asyncio
from random import Random

import pytest
from transformers import LlamaConfig

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.kv import MIN_CAPACITY_TOKENS, SpanCache
from remote_modules.model.stack import StackSpec
from remote_modules.server.sessions import KVBudget, KVCost, Session, SessionTable
from remote_modules.spans import Span

CONFIG = LlamaConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2)
COSTS = {1: KVCost(0, 10), 2: KVCost(0, 30)}
SPAN = Span(1, 3)
ROW_BYTES = MIN_CAPACITY_TOKENS * 40  # of one row at the least capacity


def table(*, total_bytes: int = 100 * ROW_BYTES, max_sessions: int = 100) -> SessionTable:
    budget = KVBudget(total_bytes, COSTS)
    return SessionTable(budget, max_sessions=max_sessions, idle_s=600.0, orphan_s=30.0)


def session(name: str, *, span: Span = SPAN, used_s: float = 0.0, connection_id: int | None = 1) -> Session:
    cache = SpanCache(CONFIG, StackSpec("model.layers", 4), span)
    return Session(session_id=name, span=span, cache=cache, rows=1, used_s=used_s, connection_id=connection_id)


def opened(sessions: SessionTable, name: str, *, rows: int = 1, tokens: int = 1) -> Session:
    new = session(name)
    sessions.open(new)
    sessions.reserve(new, rows=rows, tokens=tokens)
    return new


# -------------------------------------------------------------------------------- bytes


def test_needed_bytes_count_rows_capacity_and_the_blocks_used() -> None:
    budget = KVBudget(1000, COSTS)
    assert budget.needed_bytes(SPAN, rows=3, capacity=5) == 3 * 5 * 40
    assert budget.needed_bytes(Span(2, 3), rows=3, capacity=5) == 3 * 5 * 30


def test_free_tokens_are_those_of_one_row_through_all_blocks() -> None:
    budget = KVBudget(1000, COSTS)
    assert budget.free_tokens == 25
    budget.resize(0, 961)
    assert budget.free_tokens == 0


STATES = {1: KVCost(100, 0), 2: KVCost(50, 30)}


def test_needed_bytes_count_what_does_not_grow_once_for_each_row() -> None:
    budget = KVBudget(1000, STATES)
    assert budget.needed_bytes(SPAN, rows=3, capacity=64) == 3 * (150 + 64 * 30)
    assert budget.needed_bytes(Span(1, 2), rows=3, capacity=64) == budget.needed_bytes(Span(1, 2), rows=3, capacity=1)


def test_free_tokens_leave_room_for_what_does_not_grow() -> None:
    budget = KVBudget(1000, STATES)
    assert budget.free_tokens == (1000 - 150) // 30
    budget.resize(0, 850)
    assert budget.free_tokens == 0
    budget.resize(0, 100)
    assert budget.free_tokens == 0


def test_caches_that_do_not_grow_have_room_for_any_text_or_for_none() -> None:
    budget = KVBudget(1000, {1: KVCost(100, 0)})
    assert budget.free_tokens == 2**31
    budget.resize(0, 901)
    assert budget.free_tokens == 0
    assert KVBudget(1000, {1: KVCost(0, 0)}).free_tokens == 2**31


def test_reservation_beyond_the_budget_is_refused_and_changes_nothing() -> None:
    budget = KVBudget(1000, COSTS)
    budget.resize(0, 600)
    with pytest.raises(PeerRefused, match=r"^KV cache needs 401 more bytes, 400 of 1000 are free$") as caught:
        budget.resize(100, 501)
    assert (caught.value.reason, caught.value.retry_after_s) == (RefusalReason.OUT_OF_MEMORY, 5.0)
    assert budget.used_bytes == 600
    budget.resize(100, 500)
    assert budget.used_bytes == 1000


def test_reservation_doubles_with_the_tokens() -> None:
    sessions = table()
    new = opened(sessions, "a", rows=2)
    assert (new.capacity, new.rows, new.reserved_bytes) == (64, 2, 2 * ROW_BYTES)
    for tokens, factor in ((64, 1), (65, 2), (128, 2), (129, 4)):
        sessions.reserve(new, rows=2, tokens=tokens)
        assert sessions.budget.used_bytes == new.reserved_bytes == 2 * factor * ROW_BYTES


def test_reservation_shrinks_with_the_rows() -> None:
    sessions = table()
    new = opened(sessions, "a", rows=8)
    sessions.reserve(new, rows=2, tokens=10)
    assert sessions.budget.used_bytes == 2 * ROW_BYTES


def test_session_that_does_not_fit_is_refused_and_nobody_is_hurt() -> None:
    sessions = table(total_bytes=3 * ROW_BYTES)
    first = opened(sessions, "a", rows=2)
    second = session("b")
    sessions.open(second)
    with pytest.raises(PeerRefused, match="KV cache needs"):
        sessions.reserve(second, rows=2, tokens=1)
    with pytest.raises(PeerRefused, match="KV cache needs"):
        sessions.reserve(first, rows=2, tokens=65)
    assert (first.capacity, first.rows, first.reserved_bytes) == (64, 2, 2 * ROW_BYTES)
    assert (second.capacity, second.rows, second.reserved_bytes) == (0, 1, 0)
    assert sessions.budget.used_bytes == 2 * ROW_BYTES
    sessions.reserve(second, rows=1, tokens=64)
    assert sessions.budget.used_bytes == sessions.budget.total_bytes


@pytest.mark.parametrize("seed", range(20))
def test_random_life_never_exceeds_the_budget_and_ends_at_zero(seed: int) -> None:
    rng = Random(seed)
    sessions = table(total_bytes=20 * ROW_BYTES, max_sessions=6)
    refused = 0
    for number in range(300):
        name = str(rng.randrange(10))
        try:
            match rng.randrange(4):
                case 0 if sessions.get(name) is None:
                    sessions.open(session(name, used_s=float(number), connection_id=rng.randrange(3)))
                case 1 | 2 if (found := sessions.get(name)) is not None:
                    sessions.reserve(found, rows=rng.randint(1, 5), tokens=rng.randint(1, 300))
                case 3 if rng.random() < 0.3:
                    sessions.close(name)
        except PeerRefused:
            refused += 1
        if number % 50 == 0:
            sessions.disown(rng.randrange(3))
            sessions.expire(float(number))
        open_sessions = [found for found in map(sessions.get, map(str, range(10))) if found is not None]
        assert len(open_sessions) == len(sessions) <= 6
        assert sessions.budget.used_bytes == sum(found.reserved_bytes for found in open_sessions)
        assert sessions.budget.used_bytes <= sessions.budget.total_bytes
    assert refused > 0
    sessions.close_all()
    assert (sessions.budget.used_bytes, len(sessions)) == (0, 0)


# -------------------------------------------------------------------------------- the table


def test_open_session_is_found_by_its_id_only() -> None:
    sessions = table()
    new = opened(sessions, "a")
    assert sessions.get("a") is new
    assert sessions.get("b") is None
    assert len(sessions) == 1


def test_too_many_sessions_are_refused_as_busy() -> None:
    sessions = table(max_sessions=2)
    opened(sessions, "a")
    opened(sessions, "b")
    with pytest.raises(PeerRefused, match=r"^2 sessions are open already$") as caught:
        sessions.open(session("c"))
    assert (caught.value.reason, caught.value.retry_after_s) == (RefusalReason.BUSY, 5.0)
    assert sessions.get("c") is None
    sessions.close("a")
    sessions.open(session("c"))


def test_closed_session_gives_its_bytes_back_once() -> None:
    sessions = table()
    first = opened(sessions, "a", rows=3)
    opened(sessions, "b")
    for _ in range(2):
        sessions.close("a")
        assert sessions.budget.used_bytes == ROW_BYTES
    sessions.close("unknown")
    assert first.is_closed
    assert (sessions.get("a"), len(sessions)) == (None, 1)


# -------------------------------------------------------------------------------- expiry


def test_idle_session_expires_at_its_time() -> None:
    sessions = table()
    sessions.open(session("old", used_s=100.0))
    sessions.open(session("new", used_s=101.0))
    assert sessions.expire(699.9) == []
    assert sessions.expire(700.0) == ["old"]
    assert sessions.expire(701.0) == ["new"]
    assert len(sessions) == 0


def test_orphan_expires_sooner_and_frees_its_bytes() -> None:
    sessions = table()
    orphan = opened(sessions, "orphan")
    other = opened(sessions, "other")
    other.connection_id = 2
    sessions.disown(1)
    assert (orphan.connection_id, other.connection_id) == (None, 2)
    assert sessions.expire(29.9) == []
    assert sessions.expire(30.0) == ["orphan"]
    assert sessions.budget.used_bytes == ROW_BYTES


def test_adopted_orphan_lives_on() -> None:
    sessions = table()
    orphan = opened(sessions, "orphan")
    sessions.disown(1)
    orphan.connection_id, orphan.used_s = 2, 20.0
    sessions.disown(1)
    assert sessions.expire(600.0) == []


def test_session_whose_step_runs_does_not_expire() -> None:
    async def main() -> None:
        sessions = table()
        busy = session("busy")
        sessions.open(busy)
        async with busy.lock:
            assert sessions.expire(1e6) == []
        assert sessions.expire(1e6) == ["busy"]

    asyncio.run(main())
