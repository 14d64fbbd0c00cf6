"""Real processes, SIGKILL and SIGSTOP: a sample of what `tests/simulation/test_every_step.py` does for all steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from remote_modules import ClientConfig, load
from remote_modules.client.answers import AnswerChecker
from remote_modules.model.checkpoint import built_in_path
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.plan.routing import Hop
from remote_modules.testing import LocalSwarm

transformers_logging.disable_progress_bar()  # else its thread stays

SPANS = ["0:3", "3:6", "6:8"]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm(built_in_path(), spans=SPANS * 2, mode="process", num_threads=1) as swarm:
        yield swarm


@pytest.fixture
def remote(swarm: LocalSwarm) -> Iterator[Any]:
    model: Any = load(built_in_path(), trackers=swarm.trackers, mdns=False)
    yield model
    model.model.layers.close()


@pytest.fixture(scope="module")
def local() -> Any:
    return AutoModelForCausalLM.from_pretrained(built_in_path()).eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    ids: torch.Tensor = AutoTokenizer.from_pretrained(built_in_path())(
        "The function returns a", return_tensors="pt"
    ).input_ids
    return ids


def generate(
    model: Any, tokens: torch.Tensor, at: int = -1, lose: Callable[[], None] | None = None, **options: Any
) -> torch.Tensor:
    """Tokens, greedy unless asked otherwise; ``lose`` is called after token ``at``."""
    count = 0

    def note(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == at and lose is not None:
            lose()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    output: torch.Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        stopping_criteria=[note],
        **options,
    )
    return output


def peer_of_hop(swarm: LocalSwarm, remote: Any, hop: int) -> Any:
    peer_id = remote.model.layers.stats().route[hop].peer_id
    return next(peer for peer in swarm.peers if peer.peer_id == peer_id)


@pytest.mark.parametrize(("hop", "step"), [(0, 1), (1, 5), (2, 11)])
def test_killed_process_changes_no_token(
    swarm: LocalSwarm, remote: Any, local: Any, prompt: torch.Tensor, hop: int, step: int
) -> None:
    lost: list[Any] = []

    def kill() -> None:
        lost.append(peer_of_hop(swarm, remote, hop))
        lost[0].kill()

    output = generate(remote, prompt, step, kill)
    stats = remote.model.layers.stats()
    assert lost
    assert stats.failovers >= 1
    assert stats.replayed_tokens > 0
    assert torch.equal(output, generate(local, prompt))
    lost[0].restart()


def test_frozen_process_changes_no_token_and_serves_again(
    swarm: LocalSwarm, remote: Any, local: Any, prompt: torch.Tensor
) -> None:
    frozen: list[Any] = []

    def freeze() -> None:
        frozen.append(peer_of_hop(swarm, remote, 1))
        frozen[0].freeze()

    expected = generate(local, prompt)
    try:
        assert torch.equal(generate(remote, prompt, 4, freeze), expected)
        assert remote.model.layers.stats().failovers >= 1
    finally:
        frozen[0].thaw()
    assert torch.equal(generate(remote, prompt), expected)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_killed_process_changes_no_gradient(
    swarm: LocalSwarm, remote: Any, local: Any, prompt: torch.Tensor, when: str
) -> None:
    def loss_and_grad(model: Any, between: Callable[[], None]) -> tuple[float, torch.Tensor]:
        inputs = model.get_input_embeddings()(prompt).detach().requires_grad_()
        loss = model(inputs_embeds=inputs, labels=prompt).loss
        between()
        loss.backward()
        grad: torch.Tensor = inputs.grad
        return float(loss.detach()), grad

    loss_and_grad(remote, lambda: None)  # meet the peers
    lost = [peer_of_hop(swarm, remote, 1)]
    if when == "forward":
        lost[0].kill()
    result = loss_and_grad(remote, lost[0].kill if when == "backward" else lambda: None)
    expected = loss_and_grad(local, lambda: None)
    assert remote.model.layers.stats().failovers >= 1
    assert result[0] == expected[0]
    assert torch.equal(result[1], expected[1])
    lost[0].restart()


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_process_killed_between_microbatches_changes_no_gradient(
    swarm: LocalSwarm, prompt: torch.Tensor, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer is lost at the seventh answer of the pass; others of its microbatches are under way or yet to be sent."""
    method = "check_outputs" if when == "forward" else "check_gradients"
    lost: list[Any] = []

    def run(lose: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        config = ClientConfig(microbatch_tokens=prompt.shape[1], max_microbatches_in_flight=4)
        remote: Any = load(built_in_path(), trackers=swarm.trackers, mdns=False, config=config)
        tokens = prompt.repeat(12, 1)
        tokens[:, 0] = torch.arange(12) + 5
        check, count = getattr(AnswerChecker, method), 0

        def counted(self: AnswerChecker, hop: Hop, *args: Any) -> Any:
            nonlocal count
            count += 1
            if count == 7 and lose:
                lost.append(next(peer for peer in swarm.peers if peer.peer_id == hop.peer_id))
                lost[0].kill()
            return check(self, hop, *args)

        monkeypatch.setattr(AnswerChecker, method, counted)
        try:
            inputs = remote.get_input_embeddings()(tokens).detach().requires_grad_()
            output = remote(inputs_embeds=inputs, labels=tokens)
            output.loss.backward()
            assert inputs.grad is not None
            return output.logits.detach(), inputs.grad, remote.model.layers.stats().failovers
        finally:
            monkeypatch.undo()
            remote.model.layers.close()

    logits, grad, _ = run(lose=False)
    ours, our_grad, failovers = run(lose=True)
    assert lost
    assert failovers >= 1
    assert torch.equal(ours, logits)
    assert torch.equal(our_grad, grad)
    lost[0].restart()


def test_killed_process_changes_no_beam_of_a_hybrid_model(tmp_path: Path) -> None:
    """Linear attention and mixtures of experts; the peer is lost between two reorderings of beams."""
    hybrid: Any = tiny_model(tiny_config("qwen3_next"))
    hybrid.save_pretrained(tmp_path)
    tokens = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": None, "pad_token_id": 0}
    expected = generate(hybrid, tokens, **options)
    with LocalSwarm(tmp_path, spans=["0:2", "2:4"] * 2, mode="process", num_threads=1) as swarm:
        remote: Any = load(tmp_path, trackers=swarm.trackers, mdns=False)
        try:
            for hop, step in ((0, 4), (1, 7)):
                lost: list[Any] = []

                def kill() -> None:
                    lost.append(peer_of_hop(swarm, remote, hop))  # noqa: B023 - called in this round only
                    lost[0].kill()  # noqa: B023

                failovers = remote.model.layers.stats().failovers
                assert torch.equal(generate(remote, tokens, step, kill, **options), expected)
                assert lost
                assert remote.model.layers.stats().failovers > failovers
                lost[0].restart()
        finally:
            remote.model.layers.close()
