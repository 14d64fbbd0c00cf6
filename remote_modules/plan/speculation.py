"""Speculative decoding: how many guessed tokens a pass shall verify, from which source, or none.

A pass over several guessed tokens takes hardly longer than one over a single token where links are slow, and much
longer where they are not: what pays is measured, not assumed. Per source the policy keeps how many guesses were
accepted; per length of the block how much longer its pass took than a plain one. It takes what gives the most tokens a
second, and guesses nothing where that is less than plain decoding gives. From time to time it tries again, ever more
rarely while that loses.

The estimates decide on speed alone: which tokens come out is decided by the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["PLAIN", "Choice", "Offer", "SpeculationPolicy", "expected_tokens"]

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MAX_SHARE = 0.995  # of guesses accepted: nothing is certain
PRIOR_WEIGHT = 4.0  # guesses that the prior counts for, at first
MEMORY = 0.9  # what remains of older counts after a round
SMOOTHING = 0.3  # of a new time
FIRST_TOKEN_SHARE = 0.02  # of a plain pass, what a further token is thought to cost before one was timed
MAX_TOKEN_SHARE = 4.0  # of a plain pass: slower ones were something else, such as a peer that was lost
MIN_GAIN = 1.03  # over plain decoding
SURE_GAIN = 1.5  # from here on plain passes need no new timing
PLAIN_EVERY = 32  # rounds, where the gain is less
TRY_AFTER, MAX_TRY_AFTER = 8, 256  # plain rounds before guesses are tried again
TRIED_SHARE, MAX_TRIED = 0.25, 4  # a trial may cost that much of a plain pass, and guesses so many tokens
FIRST_LENGTH = 4  # of a block before any was timed


@dataclass(frozen=True, slots=True)
class Offer:
    """What a source can guess now.

    Attributes:
        source: estimates are kept by this name.
        length: most tokens.
        prior: share of guesses accepted, before any was tried.
        token_s: to make one guess.
    """

    source: str
    length: int
    prior: float
    token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Guess ``length`` tokens from ``source``; none: `PLAIN`."""

    source: str
    length: int


PLAIN = Choice("", 0)


@dataclass(slots=True)
class _Counts:
    accepted: float = 0.0
    refused: float = 0.0


def expected_tokens(share: float, length: int) -> float:
    """Of a pass: the guesses up to the first refused one, and the token that the model adds itself.

    Args:
        share: of guesses that are accepted, less than one.
    """
    return float((1 - share ** (length + 1)) / (1 - share))


class SpeculationPolicy:
    """The estimates of one model over one set of links; sources are a handful of names."""

    def __init__(self) -> None:
        self._counts: dict[str, _Counts] = {}
        self._plain_s: float | None = None
        self._token_shares: dict[int, float] = {}  # by size of the block, as a power of two
        self._since_plain = 0
        self._plain_rounds = 0
        self._try_after = TRY_AFTER

    def choose(self, offers: Sequence[Offer]) -> Choice:
        """What to guess now; at first nothing, since a plain pass is what others are compared with."""
        if self._plain_s is None:
            return PLAIN
        best, gain = PLAIN, 0.0
        for offer, length in _blocks(offers, LENGTHS[-1] if self._token_shares else FIRST_LENGTH):
            of_this = self._gain(offer, length)
            if of_this > gain:
                best, gain = Choice(offer.source, length), of_this
        if best == PLAIN:
            return PLAIN
        if gain < MIN_GAIN:
            return self._trial(best, offers)
        if gain < SURE_GAIN and self._since_plain >= PLAIN_EVERY:
            return PLAIN
        return best

    def is_worth(self, share_s: float) -> bool:
        """Whether ``share_s`` seconds are little beside a pass."""
        return self._plain_s is not None and share_s < TRIED_SHARE * self._plain_s

    def note(self, choice: Choice, accepted: int, pass_s: float, guess_s: float = 0.0) -> None:
        """A round is done.

        Args:
            accepted: guesses, of ``choice.length``.
            pass_s: what the pass took.
            guess_s: what it took to wait for the guesses before it.
        """
        if choice == PLAIN:
            self._note_plain(pass_s)
            return
        assert self._plain_s is not None, "the first round is plain"
        self._since_plain += 1
        counts = self._counts[choice.source]
        counts.accepted = MEMORY * counts.accepted + accepted
        counts.refused = MEMORY * counts.refused + (accepted < choice.length)
        if pass_s < self._plain_s:  # more tokens do not take less: plain passes have become faster
            self._plain_s += SMOOTHING * (pass_s - self._plain_s)
        share = min(MAX_TOKEN_SHARE, max(0.0, (pass_s / self._plain_s - 1) / choice.length))
        size = choice.length.bit_length()
        known = self._token_shares.get(size)
        self._token_shares[size] = share if known is None else known + SMOOTHING * (share - known)
        has_paid = (accepted + 1) * self._plain_s > MIN_GAIN * (pass_s + guess_s)
        if has_paid:
            self._try_after = TRY_AFTER
        elif self._plain_rounds >= self._try_after:
            self._try_after = min(MAX_TRY_AFTER, 2 * self._try_after)
        self._plain_rounds = 0

    def _note_plain(self, pass_s: float) -> None:
        self._since_plain = 0
        self._plain_rounds += 1
        if self._plain_s is None:
            self._plain_s = pass_s
        else:
            pass_s = min(pass_s, MAX_TOKEN_SHARE * self._plain_s)
            self._plain_s += SMOOTHING * (pass_s - self._plain_s)

    def _gain(self, offer: Offer, length: int) -> float:
        """Tokens a second, relative to plain decoding."""
        assert self._plain_s is not None
        pass_s = self._plain_s * (1 + length * self._token_share(length))
        tokens = expected_tokens(self._share(offer), length)
        return tokens * self._plain_s / (pass_s + length * offer.token_s)

    def _share(self, offer: Offer) -> float:
        """Of guesses of this source that are accepted."""
        counts = self._counts.get(offer.source)
        if counts is None:
            counts = _Counts(PRIOR_WEIGHT * offer.prior, PRIOR_WEIGHT * (1 - offer.prior))
            self._counts[offer.source] = counts
        return min(MAX_SHARE, counts.accepted / (counts.accepted + counts.refused))

    def _token_share(self, length: int) -> float:
        """Of a plain pass, what one more token costs in a block that long; as in the one of the nearest known size."""
        size = length.bit_length()
        return _nearest(self._token_shares, size, FIRST_TOKEN_SHARE)

    def _trial(self, best: Choice, offers: Sequence[Offer]) -> Choice:
        if self._plain_rounds < self._try_after:
            return PLAIN
        offer = next(offer for offer in offers if offer.source == best.source)
        share = self._token_share(1)
        length = MAX_TRIED if share * MAX_TRIED <= TRIED_SHARE else max(1, int(TRIED_SHARE / share))
        return Choice(best.source, min(length, offer.length))


def _blocks(offers: Sequence[Offer], most: int) -> Iterator[tuple[Offer, int]]:
    for offer in offers:
        longest = min(offer.length, most)
        yield from ((offer, length) for length in LENGTHS if length < longest)
        if longest:
            yield offer, longest


def _nearest(values: Mapping[int, float], key: int, default: float) -> float:
    """At the key, or else at the nearest one, the lower of two."""
    return values[min(values, key=lambda known: (abs(known - key), known))] if values else default
