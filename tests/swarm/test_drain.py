"""Peers that leave, restart and move while clients generate: no request fails, and no token differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.client.stats import ClientStats
from remote_modules.testing import LocalSwarm

from .conftest import PATIENCE_S, VOCABULARY

NUM_CLIENTS = 4
EXIT_S = 15.0


def prompt(seed: int, length: int = 12) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, tokens: torch.Tensor, num_new: int) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        tokens, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0
    )
    return output


class Load:
    """Clients that generate again and again, each in a thread of its own, and compare with the local model."""

    def __init__(self, models: list[tuple[Any, RemoteSequential]], local: PreTrainedModel, num_new: int) -> None:
        self.num_done = 0
        self.failures: list[str] = []
        self._models = models
        self._num_new = num_new
        self._expected = [generated(local, prompt(number), num_new) for number in range(len(models))]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[number]) for number in range(len(models))]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                found = generated(self._models[number][0], prompt(number), self._num_new)
            except Exception as exc:  # a request that failed: what the test counts
                self.failures.append(repr(exc))
                return
            if not torch.equal(found, self._expected[number]):
                self.failures.append(f"client {number} generated other tokens")
            self.num_done += 1

    def stats(self) -> list[ClientStats]:
        return [layers.stats() for _, layers in self._models]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120.0)
        assert not any(thread.is_alive() for thread in self._threads)


def until(what: Callable[[], bool], text: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S} s: {text}"
        time.sleep(0.02)
