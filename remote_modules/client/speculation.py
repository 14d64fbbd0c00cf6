"""Speculative decoding over slow links: one pass verifies many guessed tokens.

    model.generate(**inputs, custom_generate=Speculation())             # guesses what the text said before
    model.generate(**inputs, custom_generate=Speculation(draft=small))  # and what a small model would say

Each round guesses a block of tokens, runs the model over all of it at once, and keeps the guesses up to the first that
the model does not confirm, with one more token of the model's own; the rest of the KV cache is taken back. How long the
block is, and whether to guess at all, is decided anew for each round (`plan.speculation`).

Greedy: the tokens are the greatest of the model's own scores. Their logits come from passes over several tokens, whose
sums may be rounded in another order than in passes over one: where two are equal to within that, either may come.
Sampling: each token has the distribution that plain sampling gives it, whatever is guessed (`accept`); which are drawn
for a seed depends on the blocks, and so on the time that passes took.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from remote_modules.client.drafting import Draft, DraftModel, Lookup, can_go_back
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.stack import CACHE_ARGUMENTS
from remote_modules.plan.speculation import PLAIN, Choice, Offer, SpeculationPolicy

__all__ = ["Speculation", "SpeculationStats", "accept"]

MAX_BLOCK = 128  # tokens from a lookup
MAX_DRAFT = 16  # tokens from a draft model
FIRST_DRAFT = 2  # before one was timed
# Share of guesses accepted before any was tried, by the tokens that matched, at least.
LOOKUP_PRIORS = {24: 0.98, 12: 0.95, 6: 0.85, 4: 0.7, 3: 0.5, 2: 0.3}
DRAFT_PRIOR = 0.6
# They keep a state of their own from one call to the next, so that they cannot look at guesses.
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


@dataclass(slots=True)
class SpeculationStats:
    """Counted since the `Speculation` was made.

    Attributes:
        passes: through the model, without those over prompts.
        plain: of these, without guesses.
        guessed, accepted: tokens.
    """

    passes: int = 0
    plain: int = 0
    guessed: int = 0
    accepted: int = 0


class Speculation:
    """For ``generate(custom_generate=...)``; keep it for more generations of the model, it learns what pays.

    Args:
        draft: a small model with the same vocabulary, best of the same tokenizer, on this machine.
        lookup: whether to guess that the text repeats what it said before.
        streamer: gets the prompt and the tokens, one by one. One that is given to `generate` gets the prompt only:
            transformers does not pass it on.
    """

    def __init__(self, draft: PreTrainedModel | None = None, *, lookup: bool = True, streamer: Any = None) -> None:
        if draft is not None and draft.config.is_encoder_decoder:
            raise ValueError(f"a draft model must be a decoder, got {type(draft).__name__}")
        self.draft = draft
        self.lookup = lookup
        self.streamer = streamer
        self.stats = SpeculationStats()
        self.policy = SpeculationPolicy()
        self._draft_s: float | None = None  # for one token

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """What transformers calls in place of its own loop.

        Raises:
            ValueError: several rows, beams, or a draft model of another vocabulary.
            UnsupportedCallError: an output was asked for that is not made.
        """
        self._check(model, input_ids, generation_config)
        text = _Text(model, input_ids, logits_processor, stopping_criteria, generation_config, self.streamer)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        with ExitStack() as stack:
            drafter = None
            if self.draft is not None and text.may_guess:
                scores = logits_processor if len(logits_processor) else None
                drafter = DraftModel(
                    self.draft, scores=scores, draws=generation_config.do_sample, token_s=self._draft_s
                )
                stack.enter_context(drafter)
            self._generate(text, drafter, model_kwargs)
        if self.streamer is not None:
            self.streamer.end()
        return text.result()

    def _check(self, model: PreTrainedModel, input_ids: torch.Tensor, config: Any) -> None:
        if config.num_beams != 1:
            raise ValueError(f"speculation is for generation without beams, got num_beams={config.num_beams}")
        if len(input_ids) != 1:
            raise ValueError(f"speculation is for one row, got {len(input_ids)}")
        if model.config.is_encoder_decoder or not config.use_cache:
            raise UnsupportedCallError("speculation is for decoders with use_cache=True")
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            raise UnsupportedCallError("speculation does not collect attentions and hidden states; leave these off")
        if self.draft is not None:
            size, own = self.draft.config.get_text_config().vocab_size, model.config.get_text_config().vocab_size
            if size != own:
                raise ValueError(f"the draft model has a vocabulary of {size} tokens, the model one of {own}")

    def _generate(self, text: _Text, drafter: DraftModel | None, model_kwargs: dict[str, Any]) -> None:
        text.prefill(model_kwargs)
        lookup = Lookup() if self.lookup and text.may_guess else None
        while not text.is_done:
            began_s = time.perf_counter()
            choice, draft = self._guess(text, lookup, drafter)
            guessed_s = time.perf_counter()
            if drafter is not None and drafter.token_s is not None:
                self._draft_s = drafter.token_s
                if choice.source == "draft" and self.policy.is_worth(2 * MAX_DRAFT * self._draft_s):
                    drafter.draft_ahead(2 * MAX_DRAFT)
            accepted = text.verify(draft)
            done_s = time.perf_counter()
            self.policy.note(choice, accepted, done_s - guessed_s, guessed_s - began_s)
            self.stats.passes += 1
            self.stats.plain += choice == PLAIN
            self.stats.guessed += len(draft.tokens)
            self.stats.accepted += accepted

    def _guess(self, text: _Text, lookup: Lookup | None, drafter: DraftModel | None) -> tuple[Choice, Draft]:
        """The next block, as long as the policy says."""
        room = text.room - 1  # the model adds a token itself
        if room < 1 or not text.may_guess:
            return PLAIN, Draft([])
        offers = []
        found = Draft([]) if lookup is None else lookup.guess(text.tokens, min(MAX_BLOCK, room))
        if lookup is not None and found.tokens:
            least = next(least for least in LOOKUP_PRIORS if lookup.match >= least)
            offers.append(Offer(f"lookup {least}", len(found.tokens), LOOKUP_PRIORS[least]))
        if drafter is not None:
            length = MAX_DRAFT if self._draft_s is not None else FIRST_DRAFT
            offers.append(Offer("draft", min(length, room), DRAFT_PRIOR, self._draft_s or 0.0))
        choice = self.policy.choose(offers)
        if choice.source != "draft" or drafter is None:
            return choice, found.first(choice.length)
        return choice, drafter.guess(text.tokens, choice.length)


class _Text:
    """One generation: the tokens so far, and the KV cache of all but the last."""

    def __init__(
        self, model: Any, input_ids: torch.Tensor, processors: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.tokens: list[int] = input_ids[0].tolist()
        self.is_done = False
        self.may_guess = not any(type(processor).__name__ in STATEFUL for processor in processors)
        self._model = model
        self._ids = input_ids
        self._processors = processors
        self._criteria = criteria
        self._config = config
        self._streamer = streamer
        self._kwargs: dict[str, Any] = {}
        self._confirmed = 0
        self._scores: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return int(self._config.max_length) - len(self.tokens)

    @property
    def cache(self) -> Any:
        return next(self._kwargs[name] for name in CACHE_ARGUMENTS if self._kwargs.get(name) is not None)

    def prefill(self, model_kwargs: dict[str, Any]) -> None:
        """Run the prompt as plain generation does, and add the first token."""
        outputs = self._model._prefill(self._ids, self._config, model_kwargs)
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, model_kwargs)
        self.may_guess = self.may_guess and can_go_back(self.cache)
        self._take(outputs.logits[:, -1:], Draft([]))

    def verify(self, draft: Draft) -> int:
        """Run the last token and the guesses after it; how many of these were confirmed and kept."""
        model, number = self._model, len(draft.tokens)
        block = torch.tensor([draft.tokens], dtype=self._ids.dtype, device=self._ids.device)
        kwargs = self._kwargs
        if number:
            kwargs = model._update_model_kwargs_for_generation({}, dict(kwargs), num_new_tokens=number)
        inputs = model.prepare_inputs_for_generation(
            torch.cat([self._ids, block], 1), next_sequence_length=number + 1, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = number + 1
        outputs = model(**inputs, return_dict=True)
        kept = self._take(outputs.logits[:, -number - 1 :], draft)
        if kept <= number or hasattr(self.cache, "activate_past_recording"):  # it drops what it recorded, then
            self.cache.crop(kept - number - 1)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs, num_new_tokens=kept)
        return min(kept, self._confirmed)

    def _take(self, logits: torch.Tensor, draft: Draft) -> int:
        """Add what the model confirms of the draft and a token of its own; how many there were before it was done."""
        raw = logits[0].to(dtype=torch.float32, device=self._ids.device, copy=True)
        block = torch.tensor([draft.tokens], dtype=self._ids.dtype, device=self._ids.device)
        ids = torch.cat([self._ids, block], 1)
        length = len(self.tokens)
        scores = raw
        if len(self._processors):
            rows = [self._processors(ids[:, : length + at], raw[at : at + 1].clone()) for at in range(len(raw))]
            scores = torch.cat(rows)
        if self._config.do_sample:
            new = accept(scores.softmax(-1), draft)
        else:
            best = scores.argmax(-1).tolist()
            right = [one == other for one, other in zip(best, draft.tokens, strict=False)]
            new = best[: (right.index(False) if False in right else len(right)) + 1]
        self._confirmed = len(new) - 1
        for at, token in enumerate(new):
            self._add(token, scores[at : at + 1], raw[at : at + 1])
            if self.is_done:
                return at + 1
        return len(new)

    def _add(self, token: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        new = torch.tensor([token], dtype=self._ids.dtype, device=self._ids.device)
        self.tokens.append(token)
        self._ids = torch.cat([self._ids, new[None]], 1)
        if self._config.return_dict_in_generate:
            if self._config.output_scores:
                self._scores.append(scores)
            if self._config.output_logits:
                self._logits.append(logits)
        if self._streamer is not None:
            self._streamer.put(new.cpu())
        self.is_done = bool(self._criteria(self._ids, tuple(self._scores) or None).all())

    def result(self) -> Any:
        config = self._config
        if not config.return_dict_in_generate:
            return self._ids
        name = next(name for name in CACHE_ARGUMENTS if name in GenerateDecoderOnlyOutput.__dataclass_fields__)
        output: Any = GenerateDecoderOnlyOutput  # its fields are annotated more narrowly than transformers fills them
        return output(
            sequences=self._ids,
            scores=tuple(self._scores) if config.output_scores else None,
            logits=tuple(self._logits) if config.output_logits else None,
            **{name: self.cache},
        )


def accept(shares: torch.Tensor, draft: Draft) -> list[int]:
    """Tokens drawn so that each has the distribution of the model, whatever was guessed.

    A guess ``x`` drawn from ``q`` is kept with probability ``min(1, p(x) / q(x))``; else a token is drawn from what
    remains of ``p``, ``max(0, p - q)`` scaled to one, and the guesses after it are of no use (Leviathan et al., 2023).

    Args:
        shares: ``p`` ``[n + 1, V]`` of the model, at each guess and after the last one.
        draft: ``n`` guesses.
    """
    tokens, number = draft.tokens, len(draft.tokens)
    if number:
        wanted = shares[range(number), tokens]
        guesses = None if draft.shares is None else torch.stack(draft.shares).to(shares.device)
        guessed = torch.ones(()) if guesses is None else guesses[range(number), tokens]
        is_kept = (torch.rand(number, device=shares.device) * guessed < wanted).tolist()
        if not all(is_kept):
            at = is_kept.index(False)
            rest = rest_of(shares[at], tokens[at], None if guesses is None else guesses[at])
            return [*tokens[:at], int(torch.multinomial(rest, 1))]
    return [*tokens, int(torch.multinomial(shares[-1], 1))]


def rest_of(share: torch.Tensor, token: int, guess: torch.Tensor | None) -> torch.Tensor:
    """What a token is drawn from in place of a guess that was refused, not scaled; ``guess`` None: it was certain."""
    if guess is None:
        rest = share.clone()
        rest[token] = 0
        return rest
    rest = (share - guess).clamp(min=0)
    return rest if float(rest.sum()) > 0 else share  # equal to within rounding: nothing remains
