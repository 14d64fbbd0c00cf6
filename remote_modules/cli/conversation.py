"""A conversation with one KV cache for all of its turns.

Imports torch and transformers: import it inside of a command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import DynamicCache

from remote_modules.cli.text import Sampling, StopWatch, TextModel

__all__ = ["Conversation"]

TURN_GAP = "\n\n"  # between turns of a model without a chat template


class Conversation:
    """Turns so far, and the cache of the tokens that the peers have seen.

    A turn sends only what is new: the cache is cut back to what the new text has in common with it (templates may
    rewrite old turns), and `generate` feeds the rest. An interrupted turn costs the cache, not the conversation.
    """

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self.has_template = bool(getattr(text.tokenizer, "chat_template", None))
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._cache = self._new_cache()
        self._cached: list[int] = []

    def ask(self, line: str, sampling: Sampling, *, write: Callable[[str], None], watch: StopWatch) -> str:
        """The answer to one more line of the user, also given to ``write`` as it comes."""
        messages = [*self._messages, {"role": "user", "content": line}]
        ids = self._template_ids(messages) if self.has_template else self._plain_ids(line)
        try:
            self._keep(common_prefix(self._cached, ids[:-1]))
            new = self.text.generate(ids, sampling, write=write, watch=watch, cache=self._cache)
        except BaseException:
            self._cache, self._cached = self._new_cache(), []  # it may be half-way through a step
            raise
        answer = self.text.decode(new)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        self._ids = [*ids, *new]
        self._cached = self._ids[: self._cache.get_seq_length()]
        return answer

    def _template_ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.text.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.text.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _plain_ids(self, line: str) -> list[int]:
        if not self._ids:
            first: list[int] = self.text.tokenizer(line)["input_ids"]
            return first
        gap = "" if self._ids[-1] == self.text.tokenizer.eos_token_id else TURN_GAP
        return [*self._ids, *self.text.tokenizer(gap + line, add_special_tokens=False)["input_ids"]]

    def _keep(self, length: int) -> None:
        if length < len(self._cached):
            self._cache.crop(length - len(self._cached))  # negative: how many to remove
            self._cached = self._cached[:length]

    def _new_cache(self) -> Any:
        return DynamicCache(config=self.text.model.config)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids are equal."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
