"""`load(head="remote")`: the last peer's logits give what the local head gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import Speculation, load
from remote_modules.client.remote_head import TOP_K, HeadResults, RemoteHead
from remote_modules.model.shadow import ShadowTensor
from remote_modules.testing import LocalSwarm

from .conftest import VOCABULARY, generate, prompt


@pytest.fixture(scope="module")
def with_head(checkpoint: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(checkpoint, spans=["0:4", "4:8", "4:8"], orphan_session_s=1.0, head=True) as swarm:
        yield swarm


def headless(checkpoint: Path, swarm: LocalSwarm) -> Any:
    return load(checkpoint, trackers=swarm.trackers, mdns=False, head="remote")


@pytest.fixture
def model(checkpoint: Path, with_head: LocalSwarm) -> Iterator[Any]:
    model = headless(checkpoint, with_head)
    yield model
    model.model.layers.close()


def test_greedy_tokens_are_those_of_the_local_head_which_is_not_loaded(model: Any, local: PreTrainedModel) -> None:
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))
    assert torch.equal(generate(model, prompt(rows=3)), generate(local, prompt(rows=3)))
    assert torch.equal(generate(model, prompt(200)), generate(local, prompt(200)))
    assert model.lm_head.num_local == 0
    assert not any(isinstance(tensor, ShadowTensor) for tensor in model.parameters())
    assert sum(tensor.numel() for tensor in model.parameters()) == 64 * (VOCABULARY + 1)  # embeddings and norm


def test_logits_are_those_of_the_local_head_to_the_last_bit_or_minus_infinity(
    model: Any, local: PreTrainedModel
) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True}
    got: Any = generate(model, prompt(), **options)
    expected: Any = generate(local, prompt(), **options)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        kept = ours.isfinite()
        assert kept.sum() == TOP_K < VOCABULARY
        assert torch.equal(ours[kept], theirs[kept])
        assert theirs[~kept].max() <= theirs[kept].min()


def test_sampling_within_the_logits_that_travel_draws_the_same_tokens(model: Any, local: PreTrainedModel) -> None:
    drawn = []
    for each in (model, local):
        torch.manual_seed(4)
        drawn.append(generate(each, prompt(), 16, do_sample=True, top_k=50))
    assert torch.equal(*drawn)
    assert model.lm_head.num_local == 0


def test_blocks_of_guesses_get_their_logits_too(model: Any, local: PreTrainedModel) -> None:
    speculation = Speculation(local)
    assert torch.equal(generate(model, prompt(), 24, custom_generate=speculation), generate(local, prompt(), 24))
    assert model.lm_head.num_local == 0


def test_a_copy_of_the_model_has_a_head_of_its_own(model: Any, local: PreTrainedModel) -> None:
    copied = copy.deepcopy(model)
    assert copied.lm_head.results is copied.model.layers.head_results is not model.lm_head.results
    assert torch.equal(generate(copied, prompt()), generate(local, prompt()))
    assert copied.lm_head.num_local == 0


def test_losses_and_gradients_take_the_head_itself(model: Any, local: PreTrainedModel) -> None:
    tokens = prompt(9)
    loss, expected = (each(tokens, labels=tokens, use_cache=False).loss for each in (model, local))
    assert torch.equal(loss, expected)
    assert model.lm_head.num_local == 1


def test_lost_peer_with_the_head_changes_no_token(checkpoint: Path, local: PreTrainedModel) -> None:
    with LocalSwarm(checkpoint, spans=["0:4", "4:8", "4:8"], orphan_session_s=1.0, head=True) as swarm:
        model = headless(checkpoint, swarm)
        lost: list[str] = []

        def lose(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            hop = model.model.layers.stats().route[-1]
            if input_ids.shape[1] == 10:
                next(peer for peer in swarm.peers if peer.peer_id == hop.peer_id).kill()
                lost.append(hop.peer_id)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        assert torch.equal(generate(model, prompt(), 16, stopping_criteria=[lose]), generate(local, prompt(), 16))
        assert model.model.layers.stats().failovers >= len(lost) == 1
        assert model.lm_head.num_local == 0
        model.model.layers.close()


def test_where_no_peer_has_the_head_it_is_loaded_here(
    checkpoint: Path, swarm: LocalSwarm, local: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = headless(checkpoint, swarm)
    assert isinstance(model.lm_head, RemoteHead)
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))
    assert model.lm_head.num_local == 8
    assert [record.message for record in caplog.records if "--head" in record.message] == [
        "logits are not at hand; loading the LM head here, do peers serve it with --head?"
    ]
    model.model.layers.close()


@pytest.mark.parametrize("lie", ["values", "tokens"])
def test_logits_that_cannot_be_true_are_not_used(
    model: Any, local: PreTrainedModel, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = HeadResults.take, []

    def take(results: HeadResults, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        told.append(lie)
        wrong = {"values": torch.nan, "tokens": VOCABULARY}[lie]
        name = f"record.head.{lie}"
        return real(results, {**outputs, name: torch.full_like(outputs[name], wrong)})

    monkeypatch.setattr(HeadResults, "take", take)
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))
    assert model.lm_head.num_local == len(told) == 8


def test_unknown_head_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="head must be one of remote, int8, got 'nearby'"):
        load("nowhere", head="nearby")
