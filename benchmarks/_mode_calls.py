"""The ways to call a model of `benchmarks/modes.py`: each a function of a model that returns what can be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from remote_modules.model.stack import cache_argument
from remote_modules.testing.inline_swarm import InlineSwarm

__all__ = ["MODES", "Results", "Side", "forked_by_prefill", "greedy"]

NUM_NEW = 6
PADDING = 0
COMMON = {
    "max_new_tokens": NUM_NEW,
    "pad_token_id": PADDING,
    "eos_token_id": None,  # else a generation ends when it likes
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
}

Results = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Side:
    """A model to call: the local one, or the remote one of ``swarm``.

    Attributes:
        draft: a local model whose guesses are often right.
    """

    model: PreTrainedModel
    draft: PreTrainedModel
    swarm: InlineSwarm | None = None

    def generate(self, ids: torch.Tensor | None, **changes: Any) -> Any:
        generate: Any = self.model.generate
        return generate(ids, **(COMMON | changes))

    def go_on(self, ids: torch.Tensor, cache: object, **changes: Any) -> Any:
        """Generate with a cache, by the name that it has in this release of transformers."""
        return self.generate(ids, **{cache_argument(self.model) or "past_key_values": cache}, **changes)


def tokens(num_tokens: int, *, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 120, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of three, and its mask."""
    ids, mask = tokens(9, rows=3, seed=2), torch.ones(3, 9, dtype=torch.int64)
    for row, excess in ((0, 4), (2, 1)):
        ids[row, :excess], mask[row, :excess] = PADDING, 0
    return ids, mask


def told(output: Any) -> Results:
    """What a generation returned."""
    named = {"tokens": output.sequences}
    for name in ("logits", "scores"):
        named.update((f"{name}.{step}", part) for step, part in enumerate(getattr(output, name, None) or ()))
    for name in ("sequences_scores", "beam_indices"):
        if getattr(output, name, None) is not None:
            named[name] = getattr(output, name)
    return named


def gradients(model: PreTrainedModel) -> Results:
    """Of the parameters that a client has, which are some of those that a local model has."""
    found = {f"gradient.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# modes


def forward_padded(side: Side) -> Results:
    ids, mask = padded()
    with torch.no_grad():
        return {"logits": side.model(input_ids=ids, attention_mask=mask).logits}


def forward_packed(side: Side) -> Results:
    """Two texts in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        return {"logits": side.model(input_ids=tokens(12), position_ids=positions, use_cache=False).logits}


def forward_4d_mask(side: Side) -> Results:
    """A tree of tokens: causal, and some earlier tokens are hidden."""
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask[0, 0, 5:, 2:4] = False
    with torch.no_grad():
        return {"logits": side.model(input_ids=tokens(8, rows=2), attention_mask=mask).logits}


def backward(side: Side) -> Results:
    ids, mask = padded()
    output = side.model(input_ids=ids, attention_mask=mask, labels=ids)
    output.loss.backward()
    return {"loss": output.loss.detach()} | gradients(side.model)


def backward_to_inputs(side: Side) -> Results:
    ids, mask = padded()
    embedded = side.model.get_input_embeddings()(ids).detach().requires_grad_()
    output = side.model(inputs_embeds=embedded, attention_mask=mask, labels=ids)
    output.loss.backward()
    assert embedded.grad is not None
    return {"loss": output.loss.detach(), "inputs": embedded.grad} | gradients(side.model)


def greedy(side: Side) -> Results:
    return told(side.generate(tokens(7)))


def sampling(side: Side) -> Results:
    return told(side.generate(tokens(7), do_sample=True, temperature=0.8, top_k=20, top_p=0.95))


def beam_search(side: Side) -> Results:
    return told(side.generate(tokens(7, rows=2), num_beams=4, length_penalty=0.5))


def beam_sampling(side: Side) -> Results:
    return told(side.generate(tokens(7), num_beams=4, do_sample=True, num_return_sequences=2))


def padded_batch(side: Side) -> Results:
    ids, mask = padded()
    return told(side.generate(ids, attention_mask=mask))


def padded_beams(side: Side) -> Results:
    """Rows end at different times, beams are reordered across padding."""
    ids, mask = padded()
    return told(side.generate(ids, attention_mask=mask, num_beams=3, eos_token_id=list(range(3, 30))))


def chunked_prefill(side: Side) -> Results:
    return told(side.generate(tokens(11), prefill_chunk_size=4))


def embeds_prompt(side: Side) -> Results:
    embedded = side.model.get_input_embeddings()(tokens(7, rows=2)).detach()
    return told(side.generate(None, inputs_embeds=embedded))


def guidance(side: Side) -> Results:
    return told(side.generate(tokens(7), guidance_scale=1.5, negative_prompt_ids=tokens(5, seed=1)))


def no_cache(side: Side) -> Results:
    return told(side.generate(tokens(7, rows=2), use_cache=False))


def static_cache(side: Side) -> Results:
    return told(side.generate(tokens(7), cache_implementation="static"))


class Collected(BaseStreamer):
    """Keeps what it gets, in order."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().clone())

    def end(self) -> None:
        self.parts.append(torch.tensor([-1]))


def streamer(side: Side) -> Results:
    collected = Collected()
    return told(side.generate(tokens(7), streamer=collected)) | {"streamed": torch.cat(collected.parts)}


class AfterMultiple(StoppingCriteria):
    """A row ends after a token that is a multiple of three."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 3 == 0


def stopping(side: Side) -> Results:
    """A criterion of one's own, and strings: the token 17 is written as ``<17>``."""
    vocabulary = {f"<{number}>": number for number in range(128)} | {"abcdef": 128}  # what the criterion begins with
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    criteria = StoppingCriteriaList([AfterMultiple()])
    own = side.generate(tokens(7, rows=3), stopping_criteria=criteria, max_new_tokens=12)
    strings = side.generate(tokens(7), tokenizer=tokenizer, stop_strings=["5>", "7>", "<2"], max_new_tokens=12)
    return told(own) | {f"strings.{name}": tensor for name, tensor in told(strings).items()}


def multi_turn(side: Side) -> Results:
    """Three turns with one cache."""
    text, cache = tokens(6), None
    named: Results = {}
    for turn in range(3):
        output = side.go_on(text, cache, max_new_tokens=4)
        cache = output.past_key_values
        named.update((f"turn.{turn}.{name}", tensor) for name, tensor in told(output).items())
        text = torch.cat([output.sequences, tokens(3, seed=turn + 5)], dim=1)
    return named


def forked_cache(side: Side) -> Results:
    return _forked(side, copy.deepcopy)


def forked_by_prefill(side: Side) -> Results:
    """What a fork is to peers: a cache that is computed anew, from the whole text."""
    return _forked(side, lambda cache: None)


def _forked(side: Side, copied: Callable[[Any], Any]) -> Results:
    """A cache is copied; both copies go on, each with a text of its own, in turns."""
    first = side.generate(tokens(6), max_new_tokens=4)
    caches = [first.past_key_values, copied(first.past_key_values)]
    texts = [torch.cat([first.sequences, tokens(2 + branch, seed=branch + 5)], dim=1) for branch in range(2)]
    named: Results = {}
    for turn in range(2):
        for branch in range(2):
            output = side.go_on(texts[branch], caches[branch], max_new_tokens=3)
            caches[branch] = output.past_key_values
            named.update((f"{turn}.{branch}.{name}", tensor) for name, tensor in told(output).items())
            texts[branch] = torch.cat([output.sequences, tokens(1, seed=turn)], dim=1)
    return named


def prompt_lookup(side: Side) -> Results:
    return told(side.generate(tokens(4).repeat(1, 3), prompt_lookup_num_tokens=3, max_new_tokens=10))


def assisted(side: Side) -> Results:
    return told(side.generate(tokens(7), assistant_model=side.draft, max_new_tokens=12))


def assisted_by_itself(side: Side) -> Results:
    """Sampled, so that guesses are refused and both of its caches are rolled back."""
    return told(side.generate(tokens(7), assistant_model=side.model, do_sample=True, max_new_tokens=12))


def return_sequences(side: Side) -> Results:
    return told(side.generate(tokens(7, rows=2), do_sample=True, num_return_sequences=3))


def repetition_penalty(side: Side) -> Results:
    return told(side.generate(tokens(7), repetition_penalty=1.3, no_repeat_ngram_size=2))


def hidden_states(side: Side) -> Results:
    ids, mask = padded()
    with torch.no_grad():
        states = side.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    output = side.generate(tokens(7), output_hidden_states=True, max_new_tokens=3)
    named = {f"state.{index}": state for index, state in enumerate(states)}
    for step, parts in enumerate(output.hidden_states):
        named.update((f"step.{step}.{index}", state) for index, state in enumerate(parts))
    return named | told(output)


def router_logits(side: Side) -> Results:
    """With the auxiliary loss and its gradient."""
    ids, mask = padded()
    output = side.model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    output.loss.backward()
    named = {f"router.{index}": logits.detach() for index, logits in enumerate(output.router_logits)}
    return named | {"loss": output.loss.detach(), "auxiliary": output.aux_loss.detach()} | gradients(side.model)


def dropped_cache(side: Side) -> Results:
    """While a cache is held its peers hold one too, and nothing afterwards."""
    output = side.generate(tokens(7))
    held = torch.tensor(side.swarm is None or side.swarm.kv_bytes() > 0)
    named = told(output)
    del output
    freed = torch.tensor(side.swarm is None or side.swarm.kv_bytes() == 0)
    return named | {"held": held, "freed": freed}


MODES: dict[str, Callable[[Side], Results]] = {
    "forward, left padding": forward_padded,
    "packed position_ids": forward_packed,
    "4D bool mask": forward_4d_mask,
    "backward": backward,
    "backward to inputs_embeds": backward_to_inputs,
    "greedy": greedy,
    "sampling": sampling,
    "beam search": beam_search,
    "beam sampling": beam_sampling,
    "left-padded batch": padded_batch,
    "left-padded beams": padded_beams,
    "chunked prefill": chunked_prefill,
    "inputs_embeds": embeds_prompt,
    "guidance": guidance,
    "use_cache=False": no_cache,
    "static cache": static_cache,
    "streamer": streamer,
    "stopping criteria": stopping,
    "three turns": multi_turn,
    "forked cache": forked_cache,
    "prompt lookup": prompt_lookup,
    "assisted": assisted,
    "assisted by itself": assisted_by_itself,
    "return sequences": return_sequences,
    "repetition penalty": repetition_penalty,
    "hidden states": hidden_states,
    "router logits": router_logits,
    "dropped cache": dropped_cache,
}
