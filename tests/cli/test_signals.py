from __future__ import annotations

import signal
import threading
import time

import pytest

from remote_modules.cli.signals import SAME_S, StopSignals


def _raise_soon(number: signal.Signals) -> None:
    threading.Timer(0.05, signal.raise_signal, [number]).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_wait_returns_the_signal(number: signal.Signals) -> None:
    with StopSignals() as signals:
        signals.keep()
        _raise_soon(number)
        assert signals.wait() is number


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_signal_before_waiting_raises(number: signal.Signals, kind: type[BaseException]) -> None:
    with StopSignals(), pytest.raises(kind):
        signal.raise_signal(number)


def test_deferred_signal_raises_when_that_has_ended() -> None:
    reached = []

    def go_on() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")

    with StopSignals() as signals, pytest.raises(KeyboardInterrupt), signals.deferred():
        go_on()
    assert reached == ["the end"]


def test_second_interrupt_raises_but_not_at_once() -> None:
    with StopSignals() as signals:
        signals.keep()
        _raise_soon(signal.SIGINT)
        signals.wait()
        signal.raise_signal(signal.SIGINT)  # the same one, sent to the group too
        time.sleep(SAME_S)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_second_terminate_says_nothing_new() -> None:
    with StopSignals() as signals:
        signals.keep()
        _raise_soon(signal.SIGTERM)
        signals.wait()
        time.sleep(SAME_S)
        signal.raise_signal(signal.SIGTERM)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
