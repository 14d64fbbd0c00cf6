"""How long the device waits for sessions that are about to come back, and who decodes."""

from __future__ import annotations

import pytest

from remote_modules.plan import batching
from remote_modules.plan.batching import (
    DECODING_S,
    LATENESS,
    LINGER_SHARE,
    MANY_STEPS,
    MAX_LINGER_S,
    SHORT_S,
    Decoders,
    LoneSession,
    Rounds,
)

STEP_S = 0.010
AWAY_S = 0.002


def rounds_of(**absences_s: float) -> Rounds:
    """Sessions that came at 0, were answered at 1, came back after these seconds, and are answered at 2."""
    rounds = Rounds()
    for who in absences_s:
        rounds.came(who, now_s=0.0)
    rounds.answered(absences_s, now_s=1.0, took_s=STEP_S)
    for who, absence_s in absences_s.items():
        rounds.came(who, now_s=1.0 + absence_s)
    rounds.answered(absences_s, now_s=2.0, took_s=STEP_S)
    return rounds


def test_nobody_is_waited_for_who_is_not_known_to_come_back() -> None:
    rounds = Rounds()
    assert rounds.wait_until(free_s=1.0, now_s=1.0) == 1.0
    rounds.came("a", now_s=0.0)
    rounds.answered(["a", "stranger"], now_s=1.0, took_s=STEP_S)
    assert rounds.wait_until(free_s=1.0, now_s=1.0) == 1.0


def test_a_session_that_is_due_is_waited_for_until_it_comes() -> None:
    rounds = rounds_of(a=AWAY_S, b=AWAY_S)
    rounds.came("a", now_s=2.0 + AWAY_S)
    assert rounds.wait_until(free_s=2.0, now_s=2.0 + AWAY_S) == pytest.approx(2.0 + LATENESS * AWAY_S)
    rounds.came("b", now_s=2.0 + AWAY_S)
    assert rounds.wait_until(free_s=2.0, now_s=2.0 + AWAY_S) == 2.0  # all are here


def test_a_session_that_is_alone_never_waits_for_itself() -> None:
    rounds = rounds_of(a=AWAY_S)
    rounds.came("a", now_s=2.0 + AWAY_S)
    assert rounds.wait_until(free_s=2.0 + AWAY_S, now_s=2.0 + AWAY_S) == 2.0 + AWAY_S


def test_a_session_that_does_not_come_is_waited_for_once() -> None:
    rounds = rounds_of(a=AWAY_S, gone=AWAY_S)
    late_s = 2.0 + LATENESS * AWAY_S
    rounds.came("a", now_s=2.001)
    assert rounds.wait_until(free_s=2.001, now_s=2.001) == pytest.approx(late_s)
    assert rounds.wait_until(free_s=2.001, now_s=late_s + 0.001) == 2.001
    assert rounds.wait_until(free_s=2.001, now_s=2.002) == 2.001  # it is not expected any more


@pytest.mark.parametrize(("took_s", "limit_s"), [(STEP_S, LINGER_SHARE * STEP_S), (10.0, MAX_LINGER_S)])
def test_no_session_is_waited_for_longer_than_its_company_may_save(took_s: float, limit_s: float) -> None:
    rounds = rounds_of(slow=limit_s * 0.9, slower=limit_s * 1.1)
    rounds.answered([], now_s=2.0, took_s=took_s)
    assert rounds.wait_until(free_s=2.0, now_s=2.0) == pytest.approx(2.0 + limit_s)
    rounds.came("slow", now_s=2.0)
    assert rounds.wait_until(free_s=2.0, now_s=2.0) == 2.0


def test_absences_are_smoothed() -> None:
    rounds = rounds_of(a=AWAY_S)
    rounds.came("a", now_s=2.0 + 2 * AWAY_S)
    rounds.answered(["a"], now_s=3.0, took_s=2 * STEP_S)
    usual_s = AWAY_S * (1 + batching.SMOOTHING)
    assert rounds.wait_until(free_s=3.0, now_s=3.0) == pytest.approx(3.0 + LATENESS * usual_s)


def test_the_table_of_sessions_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_KNOWN", 2)
    rounds = rounds_of(a=AWAY_S, b=AWAY_S)
    rounds.came("c", now_s=2.0)
    rounds.came("b", now_s=2.0)
    assert rounds.wait_until(free_s=2.0, now_s=2.0) == 2.0  # "a" was known longest, and is forgotten
    rounds.came("b", now_s=2.0)  # a second step of one that waits: nothing is learnt
    assert rounds.wait_until(free_s=2.0, now_s=2.0) == 2.0


def test_others_decode_that_came_lately_and_are_open() -> None:
    decoders, is_open = Decoders(), {"a", "b"}.__contains__
    assert not decoders.others("a", now_s=0.0, is_open=is_open)
    decoders.came("b", now_s=0.0)
    decoders.came("a", now_s=1.0)
    assert decoders.others("b", now_s=1.0, is_open=is_open)
    assert decoders.others("a", now_s=DECODING_S, is_open=is_open)
    assert not decoders.others("a", now_s=DECODING_S + 0.1, is_open=is_open)
    assert not decoders.others("b", now_s=1.0, is_open=lambda who: who == "b")
    decoders.came("b", now_s=1.0)
    assert decoders.others("a", now_s=1.0 + DECODING_S, is_open=is_open)


def test_the_table_of_decoders_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_KNOWN", 2)
    decoders = Decoders()
    for who in "abc":
        decoders.came(who, now_s=0.0)
    assert not decoders.others("c", now_s=0.0, is_open=lambda who: who == "a")
    assert decoders.others("c", now_s=0.0, is_open=lambda who: who == "b")


def test_lone_session_is_known_after_many_short_steps() -> None:
    lone = LoneSession()
    for _ in range(MANY_STEPS):
        assert not lone.came("a")
        lone.done(SHORT_S)
    assert lone.came("a")
    lone.done(2 * SHORT_S)
    assert not lone.came("a")


@pytest.mark.parametrize("other", ["b", None])
def test_session_is_not_alone_once_something_else_came(other: str | None) -> None:
    lone = LoneSession()
    for _ in range(MANY_STEPS):
        lone.came("a")
        lone.done(0.0)
    assert not lone.came(other)
    lone.done(0.0)
    assert not lone.came("a")
