"""Hidden states and gradients in codecs on the wire: lost peers, and peers too old for it, change no bit of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model

from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId
from remote_modules.server.handler import Handler

from .models import HOP_S, Kill, Stage, opened
from .test_kill_modes import COMPUTING_S, KILLS, MODES, Result, assert_equal, check_loss, tokens_of

NUM_PASSES = 3  # of `trained`
MAY_BE_CODED = ("hidden_states", "state.", "grad.hidden_states", "grad.state.")


def trained(model: Any) -> Result:
    """Losses, gradients and values of a soft prompt, step by step."""
    generator = torch.Generator().manual_seed(1)
    soft = torch.randn(1, 4, model.config.hidden_size, generator=generator).requires_grad_()
    results: Result = []
    for number in range(NUM_PASSES):
        tokens = tokens_of(2, 7, seed=number)
        embedded = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(tokens)], dim=1)
        labels = torch.cat([torch.full((2, 4), -100), tokens], dim=1)
        loss = model(inputs_embeds=embedded, labels=labels, use_cache=False).loss
        (grad,) = torch.autograd.grad(loss, soft)
        results += [loss.detach(), grad]
        soft = (soft - 0.1 * grad).detach().requires_grad_()
    return [*results, soft.detach()]


@contextmanager
def old(is_old: Callable[[PeerId], bool], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PeerId]]:
    """Some peers speak the version before; whom requests went to."""
    met: list[PeerId] = []

    def knows_thin_wire(connection: ClientConnection) -> bool:
        met.append(connection.peer_id)
        return not is_old(connection.peer_id)

    with monkeypatch.context() as patch:
        patch.setattr(ClientConnection, "knows_thin_wire", property(knows_thin_wire))
        yield met


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Codecs by the names of the tensors that came to peers, and of those in their answers."""
    codecs: dict[str, set[str]] = {}
    answer: Any = Handler.answer

    async def note(handler: Handler, request: Any, body: bytearray, connection_id: int) -> Any:
        output, parts = await answer(handler, request, body, connection_id)
        for meta in (*request.tensors, *output.tensors):
            codecs.setdefault(meta.name, set()).add(meta.codec)
        return output, parts

    monkeypatch.setattr(Handler, "answer", note)
    return codecs


def run_of(stage: Stage, mode: str) -> Result:
    return trained(stage.model) if mode == "training" else MODES[mode][0](stage.model)


CASES = [("training", "llama"), ("training", "gemma3n_text"), ("beam", "llama"), ("greedy", "gemma3n_text")]
CASES += [("padded", "qwen3_next"), ("two-turns", "mamba2"), ("greedy", "deepseek_v4")]


@pytest.mark.parametrize(("mode", "family"), CASES)
def test_run_is_near_the_plain_one_and_moves_less(mode: str, family: str, seen: dict[str, set[str]]) -> None:
    results, sizes = [], []
    for wire in ("compute", "int8"):
        seen.clear()
        with opened(family, wire=wire, exact_replay=True) as stage:
            results.append(run_of(stage, mode))
            sizes.append(stage.stats.bytes_sent + stage.stats.bytes_received)
    coded = {name for name, codecs in seen.items() if codecs != {""}}
    assert seen["hidden_states"] == {"int8o"}
    assert all(name.startswith(MAY_BE_CODED) for name in coded)
    if mode == "training":
        assert seen["grad.hidden_states"] == {"int8o"}
    if (mode, family) == ("training", "llama"):  # others of these random models have thresholds that a little crosses
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(results[1], results[0], strict=True)]
        assert 0 < max(errors) < 0.1
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("kill", ["last-hop-computing", "first-hop-answering", "spare-too"])
@pytest.mark.parametrize(("mode", "family"), CASES[2:])
def test_lost_peer_changes_no_bit_of_a_session(mode: str, family: str, kill: str) -> None:
    with opened(family, wire="int8", exact_replay=True) as stage:
        expected = run_of(stage, mode)
    with opened(family, wire="int8", exact_replay=True) as stage:
        with stage.killing(KILLS[kill]):
            found = run_of(stage, mode)
        check_loss(stage, KILLS[kill])
        assert_equal(found, expected)
        del found
        stage.check_end()


@pytest.fixture
def coarse(seen: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Steps of four tokens are long enough for 4 bits."""
    monkeypatch.setattr("remote_modules.client.coding.LEAST_COARSE_TOKENS", 4)
    return seen


@pytest.mark.parametrize(("mode", "family"), [("training", "llama"), ("beam", "llama"), ("greedy", "gemma3n_text")])
def test_lost_peer_changes_no_bit_of_a_run_in_4_bits(mode: str, family: str, coarse: dict[str, set[str]]) -> None:
    kill = Kill(hop=1, call=1, moment_s=COMPUTING_S) if mode == "training" else KILLS["last-hop-computing"]
    results = []
    for is_killed in (False, True):
        coarse.clear()
        with opened(family, wire="int4", exact_replay=True) as stage:
            with stage.killing(kill) if is_killed else nullcontext():
                results.append(run_of(stage, mode))
            assert bool(stage.lost) == is_killed
        found = coarse["hidden_states"] - {""}  # of a replay no outputs are wanted, and nothing is not coded
        assert found == ({"int4o"} if mode == "training" else {"int4o", "int8o"})
        assert coarse.get("grad.hidden_states", {"int8o"}) == {"int8o"}
    assert_equal(results[1], results[0])


def test_tokens_of_several_steps_that_are_fed_again_at_once_keep_eight_bits(coarse: dict[str, set[str]]) -> None:
    with opened("llama", wire="int4") as stage, stage.killing(KILLS["last-hop-computing"]):
        run_of(stage, "greedy")
        assert stage.lost
        assert stage.stats.replayed_tokens
    assert coarse["hidden_states"] >= {"int4o", "int8o"}


@pytest.mark.parametrize("moment_s", [0.0, COMPUTING_S, 2 * HOP_S + COMPUTING_S, 3 * HOP_S + COMPUTING_S])
@pytest.mark.parametrize("hop", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma3n_text"])
def test_lost_peer_changes_no_bit_of_a_training_run(family: str, hop: int, moment_s: float) -> None:
    """In forward, and in backward, where the peer that takes over computes from what the lost one had been sent."""
    with opened(family, wire="int8") as stage:
        expected = run_of(stage, "training")
    with opened(family, wire="int8") as stage:
        with stage.killing(Kill(hop=hop, call=1, moment_s=moment_s - hop * HOP_S)):
            found = run_of(stage, "training")
        assert stage.stats.failovers >= len(stage.lost) == 1
        assert_equal(found, expected)


@pytest.mark.parametrize(("mode", "family"), CASES)
def test_peers_without_codecs_give_the_same_bits(
    mode: str, family: str, seen: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, kinds = [], []
    for is_old in (lambda peer_id: False, lambda peer_id: True, lambda peer_id: peer_id < "m"):
        seen.clear()
        with old(is_old, monkeypatch) as met, opened(family, wire="int8", exact_replay=True) as stage:
            results.append(run_of(stage, mode))
            assert met
        kinds.append(seen["hidden_states"])
    assert kinds[:2] == [{"int8o"}, {""}]
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_adapters_masks_and_recorded_states_are_never_coded(seen: dict[str, set[str]]) -> None:
    tokens, mask = tokens_of(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :3] = 0
    with opened("llama", wire="int8") as stage:
        torch.manual_seed(0)
        model: Any = get_peft_model(stage.model, LoraConfig(r=32, target_modules=["q_proj"], init_lora_weights=False))
        output = model(tokens, attention_mask=mask, labels=tokens, use_cache=False, output_hidden_states=True)
        output.loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert grads
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    assert {"adapter.0", "grad.adapter.0", "attention_mask", "record.hidden_states.0"} < set(seen)
    coded = {name: codecs for name, codecs in seen.items() if codecs != {""}}
    assert coded == {"hidden_states": {"int8o"}, "grad.hidden_states": {"int8o"}}


def test_overflow_in_a_gradient_reaches_the_client(seen: dict[str, set[str]]) -> None:
    """A scaled loss may overflow, which its scaler looks for: then the gradient travels as it is."""
    with opened("llama", wire="int8") as stage:
        inputs = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (stage.model(inputs_embeds=inputs, use_cache=False).logits * torch.inf).sum().backward()
    assert inputs.grad is not None
    assert not bool(torch.isfinite(inputs.grad).all())
    assert seen["hidden_states"] == {"int8o"}
    assert seen["grad.hidden_states"] == {""}


def test_codec_that_a_peer_does_not_know_is_answered_plainly(
    seen: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client of the future; what it sends itself is coded as before."""
    with opened("llama", wire="int8") as stage:
        expected = trained(stage.model)
        replace: Any = msgspec.structs.replace

        def ask(struct: Any, **changes: Any) -> Any:
            return replace(struct, **(changes | ({"reply_codec": "int2"} if "reply_codec" in changes else {})))

        monkeypatch.setattr("remote_modules.client.coding.msgspec.structs.replace", ask)
        seen.clear()
        found = trained(stage.model)
    assert seen["hidden_states"] == {"int8o", ""}
    assert_equal(found, expected)
