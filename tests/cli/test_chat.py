from __future__ import annotations

import pytest

from remote_modules.cli.chat import PRIVACY
from remote_modules.testing import LocalSwarm

from .program import NAMES, invoke
from .reference import encode, generate_here, text_of


@pytest.mark.parametrize("end", ["/quit\nnever read\n", ""], ids=["/quit", "end of input"])
def test_chat_answers_until_the_end(swarm: LocalSwarm, end: str) -> None:
    options = ("--tracker", swarm.trackers[0], "--no-mdns", "--max-new-tokens", "5")
    prompt = "The function returns a"
    outcome = invoke("chat", NAMES.model, *options, stdin=f"{prompt}\n\n{end}")
    assert outcome.code == 0
    assert outcome.out.rstrip("\n") == text_of(generate_here(encode(prompt), 5)).rstrip("\n")
    assert outcome.err.startswith(PRIVACY)
    assert outcome.err.count("tokens/s over 0:3") == 1
