"""Where guesses of the next tokens come from: what the text said before, or a small model beside the large one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from remote_modules.model.length_layers import LengthLayer, LengthLinearLayer
from remote_modules.model.stack import cache_argument

__all__ = ["Draft", "DraftModel", "Lookup", "Scores", "can_go_back", "common_prefix"]

KEY_TOKENS = 2  # the shortest repetition that is noticed
MAX_MATCH = 32  # tokens that are compared; longer matches are no surer
MAX_PLACES = 8  # of one key that are looked at, the newest
MAX_TIMED = 2  # tokens that a guess ran over: more are a prompt, or text from elsewhere
DRAFT_TIMEOUT_S = 60.0  # for one token

Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From all tokens so far ``[1, P]`` and logits ``[1, V]`` to what is chosen from, as the model's own are."""


@dataclass(slots=True)
class Draft:
    """Guesses.

    Attributes:
        tokens: in order.
        shares: for each, the distribution ``[V]`` that it was drawn from; None: it was certain of each.
    """

    tokens: list[int]
    shares: list[torch.Tensor] | None = None

    def first(self, length: int) -> Draft:
        return Draft(self.tokens[:length], None if self.shares is None else self.shares[:length])


@dataclass(slots=True)
class Lookup:
    """Guesses that the text goes on as it did after the longest match of its end, the newest of several.

    Attributes:
        match: tokens that matched.
    """

    match: int = 0
    _places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # where a key ended; one for each token
    _known: int = 0  # tokens in the table

    def guess(self, tokens: Sequence[int], length: int) -> Draft:
        """Up to ``length`` tokens after ``tokens``, which may only grow from call to call."""
        for end in range(max(KEY_TOKENS, self._known), len(tokens)):  # the last key has nothing after it yet
            places = self._places.setdefault(tuple(tokens[end - KEY_TOKENS : end]), [])
            places.append(end)
            del places[:-MAX_PLACES]
        self._known = len(tokens)
        self.match = 0
        best = 0
        for place in reversed(self._places.get(tuple(tokens[-KEY_TOKENS:]), [])):
            match = _match(tokens, place)
            if match > self.match:
                self.match, best = match, place
        if not self.match:
            return Draft([])
        guessed = list(tokens[best:][:length])
        while len(guessed) < length:  # the text repeats itself with this period
            guessed += guessed[: length - len(guessed)]
        return Draft(guessed)


def _match(tokens: Sequence[int], place: int) -> int:
    """How many tokens before ``place`` are as those at the end."""
    most = min(MAX_MATCH, place)
    for number in range(1, most + 1):
        if tokens[place - number] != tokens[-number]:
            return number - 1
    return most


class DraftModel:
    """Guesses with a small model of the same vocabulary. A context manager, for one text.

    It may draft on in a thread of its own while a pass is under way: as if all it guessed will be accepted.

    Args:
        scores: what the large model's logits go through before a token is chosen.
        draws: whether tokens are drawn; else the greatest is taken.
        token_s: what a guess is known to take.

    Attributes:
        token_s: of late.
    """

    def __init__(
        self, model: PreTrainedModel, *, scores: Scores | None, draws: bool, token_s: float | None = None
    ) -> None:
        self.token_s = token_s
        self._model: Any = model
        self._scores = scores
        self._draws = draws
        self._cache_name = cache_argument(model) or "past_key_values"
        self._cached: list[int] = []
        self._empty()
        self._context: list[int] = []  # what the guesses follow
        self._ready = Draft([], [] if draws else None)
        self._dice = torch.Generator(model.device)
        if draws:
            self._dice.manual_seed(int(torch.randint(2**62, ())))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="remote-modules-draft")
        self._ahead: Future[None] | None = None
        self._stop = threading.Event()

    def __enter__(self) -> DraftModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.shutdown()

    def guess(self, tokens: Sequence[int], length: int) -> Draft:
        """``length`` tokens after ``tokens``; those that were drafted ahead cost nothing."""
        self._halt()
        self._follow(list(tokens))
        self._draft(length)
        return self._ready.first(length)

    def draft_ahead(self, length: int) -> None:
        """Go on until there are ``length`` guesses, without waiting; `guess` ends it."""
        self._halt()
        self._ahead = self._thread.submit(self._draft, length, self._stop)

    def _empty(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._can_go_back = can_go_back(self._cache)

    def _halt(self) -> None:
        if self._ahead is not None:
            self._stop.set()
            self._ahead.result(DRAFT_TIMEOUT_S)
            self._ahead = None
        self._stop.clear()

    def _follow(self, tokens: list[int]) -> None:
        """Keep the guesses that follow ``tokens``."""
        drafted = self._context + self._ready.tokens
        if len(tokens) >= len(self._context) and drafted[: len(tokens)] == tokens:
            used = len(tokens) - len(self._context)
            del self._ready.tokens[:used]
            if self._ready.shares is not None:
                del self._ready.shares[:used]
        else:
            self._ready = Draft([], [] if self._draws else None)
        self._context = tokens

    def _draft(self, length: int, stop: threading.Event | None = None) -> None:
        with torch.no_grad():
            while len(self._ready.tokens) < length and not (stop is not None and stop.is_set()):
                self._draft_one(self._context + self._ready.tokens)

    def _draft_one(self, tokens: list[int]) -> None:
        kept = common_prefix(self._cached, tokens[:-1])
        if kept < len(self._cached) and self._can_go_back:
            self._cache.crop(kept - len(self._cached))
        elif kept < len(self._cached):
            self._empty()
            kept = 0
        began_s = time.perf_counter()
        ids = torch.tensor([tokens], device=self._model.device)
        inputs = {"input_ids": ids[:, kept:], "use_cache": True, self._cache_name: self._cache}
        logits = self._model(**inputs).logits[:, -1].float()
        self._cached = tokens
        if self._scores is not None:
            logits = self._scores(ids, logits)
        if self._ready.shares is None:
            self._ready.tokens.append(int(logits.argmax()))
        else:
            share = logits.softmax(-1)
            self._ready.tokens.append(int(torch.multinomial(share, 1, generator=self._dice)))
            self._ready.shares.append(share[0])
        if len(tokens) - kept <= MAX_TIMED:
            took_s = time.perf_counter() - began_s
            self.token_s = took_s if self.token_s is None else self.token_s + 0.1 * (took_s - self.token_s)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))


def can_go_back(cache: Any) -> bool:
    """Whether tokens can be taken back from the cache without computing what came before them anew; prepares it."""
    layers = getattr(cache, "layers", ())
    if not all(hasattr(layer, "crop") and not isinstance(layer, LengthLinearLayer) for layer in layers):
        return False
    if hasattr(cache, "activate_past_recording"):
        if cache.is_croppable:
            cache.activate_past_recording()
        return bool(cache.is_croppable)
    # In older releases a layer with a window drops what is out of it; one of linear attention ignores a crop.
    return all(isinstance(layer, LengthLayer) or _keeps_all(layer) for layer in layers)


def _keeps_all(layer: Any) -> bool:
    return getattr(layer, "is_sliding", None) is False and hasattr(layer, "keys")
