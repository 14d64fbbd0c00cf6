from __future__ import annotations

from collections.abc import Iterator

import pytest

from remote_modules.cli.conversation import Conversation, common_prefix
from remote_modules.cli.options import Sources
from remote_modules.cli.text import Sampling, Source, StopWatch, TextModel
from remote_modules.testing import LocalSwarm

from .program import NAMES
from .reference import encode, generate_here, text_of

SAMPLING = Sampling(max_new_tokens=6)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'].strip() }}\n{% endfor %}assistant:"
)

FORGETFUL = (
    "{% for message in messages if message['role'] == 'user' %}user: {{ message['content'] }}\n{% endfor %}assistant:"
)


@pytest.fixture
def text(swarm: LocalSwarm) -> Iterator[TextModel]:
    sources = Sources(trackers=tuple(swarm.trackers), peers=(), mdns=False)
    with TextModel.open(Source(model=NAMES.model, sources=sources, dtype="float32")) as text:
        yield text


def _ask(conversation: Conversation, line: str) -> str:
    parts: list[str] = []
    answer = conversation.ask(line, SAMPLING, write=parts.append, watch=StopWatch())
    assert "".join(parts) == answer
    return answer


def test_second_turn_sends_only_what_is_new_and_answers_the_same(text: TextModel) -> None:
    conversation = Conversation(text)
    _ask(conversation, "The function returns")
    first_ids = list(conversation._ids)
    sent = text.stats().bytes_sent
    answer = _ask(conversation, "If the file")
    new = encode("\n\nIf the file")
    assert answer == text_of(generate_here([*first_ids, *new], SAMPLING.max_new_tokens))
    hidden_bytes = 4 * text.model.config.hidden_size
    num_tokens = len(new) + SAMPLING.max_new_tokens  # the last new token of each turn is fed by the next one
    assert text.stats().bytes_sent - sent < len(text.stats().route) * (num_tokens + 1) * (hidden_bytes + 512)


def test_template_may_rewrite_earlier_turns(text: TextModel) -> None:
    text.tokenizer.chat_template = TEMPLATE  # strips answers, so that their ids differ from those generated
    conversation = Conversation(text)
    assert conversation.has_template
    first = _ask(conversation, "The function")
    second = _ask(conversation, "If the file")
    rendered = f"user: The function\nassistant: {first.strip()}\nuser: If the file\nassistant:"
    assert second == text_of(generate_here(encode(rendered), SAMPLING.max_new_tokens))


def test_template_that_drops_answers_cuts_the_cache(text: TextModel) -> None:
    text.tokenizer.chat_template = FORGETFUL
    conversation = Conversation(text)
    _ask(conversation, "The function")
    rendered = "user: The function\nuser: If the file\nassistant:"
    kept = common_prefix(conversation._cached, encode(rendered))
    assert 0 < kept < len(conversation._cached)
    cache = conversation._cache
    assert _ask(conversation, "If the file") == text_of(generate_here(encode(rendered), SAMPLING.max_new_tokens))
    assert conversation._cache is cache
    conversation._keep(kept)
    assert (cache.get_seq_length(), len(conversation._cached)) == (kept, kept)


def test_interrupted_turn_is_forgotten_and_the_next_one_works(text: TextModel) -> None:
    def interrupt(part: str) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(text)
    _ask(conversation, "The function returns")
    before = list(conversation._ids)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("If the file does", SAMPLING, write=interrupt, watch=StopWatch())
    assert conversation._ids == before
    answer = _ask(conversation, "If the file")
    assert answer == text_of(generate_here([*before, *encode("\n\nIf the file")], SAMPLING.max_new_tokens))


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9], 1), ([5], [6], 0)]
)
def test_common_prefix_is_counted(first: list[int], second: list[int], length: int) -> None:
    assert common_prefix(first, second) == length
