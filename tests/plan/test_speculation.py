"""What to guess: more where it pays, nothing where it does not, and never much lost by finding out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from remote_modules.plan import speculation
from remote_modules.plan.speculation import PLAIN, Choice, Offer, SpeculationPolicy, expected_tokens

LONG = Offer("copy", 128, 0.95)


def ready(plain_s: float = 1.0) -> SpeculationPolicy:
    policy = SpeculationPolicy()
    policy.note(PLAIN, 0, plain_s)
    return policy


def play(
    policy: SpeculationPolicy,
    offers: Sequence[Offer],
    shares: dict[str, float],
    pass_s: Callable[[int], float],
    *,
    tokens: int,
    seed: int = 0,
) -> tuple[float, list[Choice]]:
    """Seconds for so many tokens, each guess accepted with its source's share; and what was chosen."""
    dice, seconds, done, choices = Random(seed), 0.0, 0, []
    cost_s = {offer.source: offer.token_s for offer in offers}
    while done < tokens:
        choice = policy.choose(offers)
        accepted = 0
        while accepted < choice.length and dice.random() < shares[choice.source]:
            accepted += 1
        took_s, guess_s = pass_s(choice.length), choice.length * cost_s.get(choice.source, 0.0)
        policy.note(choice, accepted, took_s, guess_s)
        seconds += took_s + guess_s
        done += accepted + 1
        choices.append(choice)
    return seconds, choices


def test_expected_tokens_are_those_of_the_geometric_law() -> None:
    assert expected_tokens(0.7, 8) == pytest.approx(3.2, abs=0.01)
    assert expected_tokens(0.0, 8) == 1.0
    assert expected_tokens(0.7, 2) == pytest.approx(1 + 0.7 + 0.49)


def test_first_round_is_plain_and_so_is_one_without_offers() -> None:
    policy = SpeculationPolicy()
    assert policy.choose([LONG]) == PLAIN
    assert not policy.is_worth(0.0)
    policy.note(PLAIN, 0, 1.0)
    assert policy.choose([]) == PLAIN
    assert policy.choose([Offer("nothing", 0, 0.9)]) == PLAIN
    assert policy.choose([LONG]).source == "copy"
    assert policy.is_worth(0.2)
    assert not policy.is_worth(0.3)


def test_copied_text_over_a_slow_link_gets_long_blocks() -> None:
    seconds, choices = play(ready(0.3), [LONG], {"copy": 0.995}, lambda n: 0.3 + 0.001 * n, tokens=1000)
    assert max(choice.length for choice in choices) == 128
    assert 1000 * 0.3 / seconds > 20


def test_novel_text_over_a_slow_link_gets_blocks_of_a_draft() -> None:
    draft = Offer("draft", 16, 0.6, token_s=0.002)
    seconds, choices = play(ready(0.3), [draft], {"draft": 0.6}, lambda n: 0.3 + 0.001 * n, tokens=1000)
    assert 1000 * 0.3 / seconds > 2.2
    assert 4 <= choices[len(choices) // 2].length <= 16


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("token_share", [0.02, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_guesses_that_lose_are_left_off(share: float, token_share: float, seed: int) -> None:
    """Sources that are wrong and take time, over links of all kinds: 3 % may be lost."""
    offers = [Offer("lookup", 8, 0.5), Offer("draft", 8, 0.6, token_s=0.1)]
    shares = dict.fromkeys(("lookup", "draft"), share)
    seconds, _ = play(ready(), offers, shares, lambda n: 1 + token_share * n, tokens=600, seed=seed)
    assert seconds < 600 / 0.97


def test_guesses_that_are_always_wrong_end_though_they_take_next_to_nothing() -> None:
    offer = Offer("draft", 8, 0.6, token_s=0.001)
    _, choices = play(ready(), [offer], {"draft": 0.0}, lambda n: 1.0, tokens=200)
    assert choices[-50:].count(PLAIN) > 45


def test_guesses_that_lost_are_tried_again_and_taken_up_when_they_pay() -> None:
    policy, offer = ready(), Offer("draft", 8, 0.6, token_s=0.3)
    _, choices = play(policy, [offer], {"draft": 0.0}, lambda n: 1 + 0.3 * n, tokens=400)
    assert choices[-50:].count(PLAIN) > 45
    _, choices = play(policy, [Offer("draft", 8, 0.6)], {"draft": 0.9}, lambda n: 1 + 0.01 * n, tokens=2000)
    assert choices[-10:].count(PLAIN) == 0


def test_plain_passes_are_timed_again_where_the_gain_is_small() -> None:
    offer = Offer("draft", 1, 0.6)
    _, choices = play(ready(), [offer], {"draft": 0.6}, lambda n: 1 + 0.15 * n, tokens=300)
    rounds = [at for at, choice in enumerate(choices) if choice == PLAIN]
    assert rounds
    assert all(later - sooner > speculation.PLAIN_EVERY for sooner, later in zip(rounds, rounds[1:], strict=False))


def test_faster_link_is_noticed_though_no_pass_is_plain() -> None:
    policy = ready(plain_s=10.0)
    policy.choose([Offer("copy", 8, 0.9)])
    for _ in range(20):
        policy.note(Choice("copy", 8), 8, 1.0)
    assert not policy.is_worth(0.5)
    assert policy.is_worth(0.2)


def test_one_slow_plain_pass_counts_for_little() -> None:
    policy = ready()
    policy.note(PLAIN, 0, 1000.0)
    assert not policy.is_worth(0.5)


def test_trial_is_short_where_tokens_cost_much() -> None:
    policy, offers = ready(), [Offer("draft", 8, 0.6)]
    policy.choose(offers)
    for _ in range(6):
        policy.note(Choice("draft", 4), 0, 5.0)
    chosen = []
    for _ in range(600):
        chosen.append(policy.choose(offers))
        policy.note(chosen[-1], 0, 1.0 + chosen[-1].length)
    trials = [at for at, choice in enumerate(chosen) if choice != PLAIN]
    assert {chosen[at].length for at in trials} == {1}
    gaps = [later - sooner for sooner, later in zip(trials, trials[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 4 * gaps[0]


def test_cost_of_an_unknown_length_is_that_of_the_nearest_known_one() -> None:
    assert speculation._nearest({}, 3, 0.5) == 0.5
    assert speculation._nearest({1: 0.1, 5: 0.9}, 3, 0.5) == 0.1
    assert speculation._nearest({1: 0.1, 5: 0.9}, 4, 0.5) == 0.9
