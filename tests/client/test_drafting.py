from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from remote_modules.client.drafting import MAX_MATCH, Draft, DraftModel, Lookup, common_prefix

PROMPT = [5, 17, 3, 88, 41, 9]


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


def greedy(model: Any, tokens: list[int], length: int) -> list[int]:
    with torch.no_grad():
        for _ in range(length):
            tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens[-length:]


def slow_match(tokens: list[int], place: int) -> int:
    return next((n for n in range(min(place, MAX_MATCH)) if tokens[place - 1 - n] != tokens[-1 - n]), place)


def test_lookup_goes_on_as_the_text_did_after_its_longest_match() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], 2).tokens == [4, 9]  # not 7: that match is shorter
    assert lookup.match == 3


def test_lookup_repeats_what_repeats_itself() -> None:
    assert Lookup().guess([8, 1, 2, 3, 1, 2], 7).tokens == [3, 1, 2, 3, 1, 2, 3]


def test_lookup_of_a_new_text_guesses_nothing() -> None:
    lookup = Lookup()
    assert lookup.guess([1], 4).tokens == []
    assert lookup.guess([1, 2, 3, 4], 4) == Draft([])
    assert lookup.match == 0


@pytest.mark.parametrize("seed", range(5))
def test_lookup_finds_the_longest_of_all_matches(seed: int) -> None:
    dice = Random(seed)
    text = [dice.randrange(3) for _ in range(40)]
    lookup = Lookup()
    for end in range(1, len(text)):
        tokens = text[:end]
        guessed = lookup.guess(tokens, 1).tokens
        matches = {place: slow_match(tokens, place) for place in range(2, end)}
        longest = max([number for number in matches.values() if number >= 2], default=0)
        # only the newest places of a key are looked at
        assert lookup.match <= longest
        if guessed:
            assert guessed[0] in {tokens[place] for place, number in matches.items() if number == lookup.match}
        else:
            assert longest == 0


def test_draft_model_says_what_it_would_by_itself_whatever_was_drafted_before(small: Any) -> None:
    expected = greedy(small, PROMPT, 8)
    with DraftModel(small, scores=None, draws=False) as drafter:
        assert drafter.guess(PROMPT, 4).tokens == expected[:4]
        drafter.draft_ahead(8)
        assert drafter.guess([*PROMPT, *expected[:3]], 3).tokens == expected[3:6]  # three were accepted
        other = [*PROMPT, *expected[:2], 50]
        assert drafter.guess(other, 3).tokens == greedy(small, other, 3)  # the third was not
        assert drafter.guess(PROMPT[:3], 2).tokens == greedy(small, PROMPT[:3], 2)


def test_draft_ahead_is_used(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with DraftModel(small, scores=None, draws=False) as drafter:
        tokens = drafter.guess(PROMPT, 2).tokens
        drafter.draft_ahead(6)
        assert drafter._ahead is not None
        drafter._ahead.result(20)
        monkeypatch.setattr(drafter, "_draft_one", lambda tokens: pytest.fail("it was there already"))
        assert len(drafter.guess([*PROMPT, *tokens], 4).tokens) == 4
        assert drafter.token_s is not None
        assert drafter.token_s > 0


def test_draws_come_with_the_distribution_after_the_processors(small: Any) -> None:
    torch.manual_seed(0)

    def scores(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert ids.shape[1] >= len(PROMPT)
        return logits / 3

    with DraftModel(small, scores=scores, draws=True) as drafter:
        draft = drafter.guess(PROMPT, 3)
    assert draft.shares is not None
    assert [len(share) for share in draft.shares] == [96] * 3
    with torch.no_grad():
        logits = small(torch.tensor([[*PROMPT, *draft.tokens[:2]]])).logits[0, -3:]
    torch.testing.assert_close(torch.stack(draft.shares), (logits / 3).softmax(-1))
    assert draft.first(2).tokens == draft.tokens[:2]
    assert len(draft.first(2).shares or []) == 2


def test_draft_models_leave_no_thread_and_can_be_copied_over(small: Any) -> None:
    drafter = DraftModel(copy.deepcopy(small), scores=None, draws=False)
    drafter.draft_ahead(50)
    with drafter:
        pass
    assert drafter._ahead is not None
    assert drafter._ahead.done()


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
