"""Speculative generation equals plain generation. Models here are local; tests/swarm has those with remote blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from remote_modules.client.drafting import Draft
from remote_modules.client.speculation import Speculation, accept, rest_of
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.stack import CACHE_ARGUMENTS
from remote_modules.plan.speculation import PLAIN, Choice, Offer, SpeculationPolicy

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 5, 17, 3]])


class Always(SpeculationPolicy):
    """Guesses whenever there is something to guess, in blocks of random length.

    Args:
        drafts_ahead: whether the draft model goes on meanwhile.
    """

    def __init__(self, *, drafts_ahead: bool = False) -> None:
        super().__init__()
        self.drafts_ahead = drafts_ahead
        self.dice = Random(0)
        self.sources: set[str] = set()

    def choose(self, offers: Sequence[Offer]) -> Choice:
        if not offers:
            return PLAIN
        offer = self.dice.choice(offers)
        self.sources.add(offer.source.split()[0])
        return Choice(offer.source, self.dice.randint(1, min(6, offer.length)))

    def is_worth(self, share_s: float) -> bool:
        return self.drafts_ahead

    def note(self, choice: Choice, accepted: int, pass_s: float, guess_s: float = 0.0) -> None:
        assert 0 <= accepted <= choice.length


def make(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = tiny_config(family)
    config.eos_token_id = None
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


@pytest.fixture(scope="module")
def draft(model: Any) -> Any:
    """Right about every other time."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return other


def always(draft: Any = None, **options: Any) -> Speculation:
    speculation = Speculation(draft, **options)
    speculation.policy = Always()
    return speculation


def run(model: Any, tokens: torch.Tensor = PROMPT, **options: Any) -> Any:
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(tokens, **{"attention_mask": torch.ones_like(tokens), **options})


@pytest.mark.parametrize("source", ["lookup", "draft", "both", "ahead"])
def test_greedy_tokens_are_those_of_plain_generation(model: Any, draft: Any, source: str) -> None:
    speculation = always(None if source == "lookup" else draft, lookup=source in ("lookup", "both"))
    speculation.policy.drafts_ahead = source == "ahead"  # type: ignore[attr-defined]
    assert torch.equal(run(model, custom_generate=speculation), run(model))
    stats = speculation.stats
    assert stats.accepted > 0
    assert stats.passes + stats.accepted == 39  # the first token is the prompt's
    assert stats.passes < 39
    sources = {"both": {"lookup", "draft"}, "ahead": {"draft"}}.get(source, {source})
    assert speculation.policy.sources == sources  # type: ignore[attr-defined]


def test_left_padded_prompt_and_processors_give_the_tokens_of_plain_generation(model: Any, draft: Any) -> None:
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
    }
    assert torch.equal(run(model, custom_generate=always(draft), **options), run(model, **options))


def test_generation_ends_where_plain_generation_does(model: Any, draft: Any) -> None:
    plain = run(model)[0].tolist()
    for end in (10, 15, 22):
        options: dict[str, Any] = {"eos_token_id": plain[end]}
        assert torch.equal(run(model, custom_generate=always(draft), **options), run(model, **options))
    for number in (1, 2, 7):
        assert run(model, max_new_tokens=number, custom_generate=always(draft))[0].tolist() == plain[: 9 + number]


def test_cache_scores_and_logits_are_those_of_plain_generation(model: Any, draft: Any) -> None:
    options: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "temperature": 0.5,
    }
    got, expected = run(model, custom_generate=always(draft), **options), run(model, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.scores, expected.scores)
    torch.testing.assert_close(got.logits, expected.logits)
    name = next(name for name in CACHE_ARGUMENTS if name in got)
    assert got[name].get_seq_length() == expected[name].get_seq_length()
    more = torch.cat([got.sequences, PROMPT], 1)
    plain = run(model, more, **{name: expected[name]})
    assert torch.equal(run(model, more, custom_generate=always(draft), **{name: got[name]}), plain)


def test_streamer_gets_the_tokens_one_by_one(model: Any, draft: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.put_shapes: list[tuple[int, ...]] = []
            self.is_ended = False

        def put(self, value: torch.Tensor) -> None:
            self.put_shapes.append(tuple(value.shape))

        def end(self) -> None:
            self.is_ended = True

    streamer = Streamer()
    run(model, custom_generate=always(draft, streamer=streamer))
    assert streamer.put_shapes == [(1, 9), *[(1,)] * 40]
    assert streamer.is_ended


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
def test_other_families_are_exact_or_plain(family: str) -> None:
    """With a window, with windows in some layers, without rotary tables."""
    model = make(family)
    assert torch.equal(run(model, custom_generate=always(make(family, seed=1))), run(model))


def test_sampling_of_a_certain_draft_is_as_of_the_model(model: Any) -> None:
    """The model as its own draft: every guess is kept."""
    torch.manual_seed(0)
    speculation = always(model, lookup=False)
    run(model, custom_generate=speculation, do_sample=True, temperature=0.9, top_k=10)
    assert speculation.stats.accepted == speculation.stats.guessed > 0


@pytest.mark.parametrize("kind", ["drawn", "certain"])
def test_sampled_tokens_have_the_distribution_of_the_model(kind: str) -> None:
    """12,000 tokens of four, after a guess: their total variation from the model's distribution."""
    torch.manual_seed(0)
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    guesses, number = torch.tensor([0.2, 0.2, 0.1, 0.5]), 12_000
    counts = [0] * 4
    for token in torch.multinomial(guesses, number, replacement=True).tolist():
        draft = Draft([token], [guesses]) if kind == "drawn" else Draft([1])
        counts[accept(shares, draft)[0]] += 1
    assert sum(abs(counts[token] / number - float(shares[0, token])) for token in range(4)) / 2 <= 0.01


@pytest.mark.parametrize("seed", range(5))
def test_kept_and_redrawn_tokens_add_up_to_the_model_exactly(seed: int) -> None:
    """By arithmetic, without draws: q(x) min(1, p/q) + P(refused) rest(x) = p(x)."""
    dice = torch.Generator().manual_seed(seed)
    share, guess = torch.rand(2, 7, generator=dice, dtype=torch.float64).pow(3).softmax(-1)
    kept = torch.minimum(share, guess)
    rest = rest_of(share, 0, guess)
    torch.testing.assert_close(kept + (1 - kept.sum()) * rest / rest.sum(), share)
    rest = rest_of(share, 2, None)
    kept = torch.zeros_like(share).index_fill(0, torch.tensor(2), 1) * share
    torch.testing.assert_close(kept + (1 - share[2]) * rest / rest.sum(), share)
    assert torch.equal(rest_of(share, 0, share), share)


def test_policy_that_is_measured_gives_the_same_tokens(model: Any, draft: Any) -> None:
    speculation = Speculation(draft)
    assert torch.equal(run(model, custom_generate=speculation), run(model))
    assert torch.equal(run(model, custom_generate=speculation), run(model))  # with what it learned
    assert 1 <= speculation.stats.plain <= speculation.stats.passes


def test_calls_that_cannot_be_made_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="speculation is for one row, got 2"):
        run(model, PROMPT.repeat(2, 1), custom_generate=Speculation())
    with pytest.raises(ValueError, match="got num_beams=2"):
        run(model, num_beams=2, custom_generate=Speculation())
    with pytest.raises(UnsupportedCallError, match="use_cache=True"):
        run(model, use_cache=False, custom_generate=Speculation())
    with pytest.raises(UnsupportedCallError, match="attentions and hidden states"):
        run(model, output_hidden_states=True, return_dict_in_generate=True, custom_generate=Speculation())
    with pytest.raises(ValueError, match="the draft model has a vocabulary of 50 tokens, the model one of 96"):
        run(model, custom_generate=Speculation(make(vocab_size=50)))


def test_guidance_is_not_guessed_at(model: Any) -> None:
    speculation = always()
    got = run(model, custom_generate=speculation, guidance_scale=1.5)
    assert torch.equal(got, run(model, guidance_scale=1.5))
    assert speculation.stats.plain == speculation.stats.passes == 39
