"""What users of peft do, on a model whose blocks are on peers and on the same model here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, Trainer, TrainingArguments

from remote_modules import RemoteSequential, UnsupportedCallError
from remote_modules.model.stack import find_stack
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm
from remote_modules.testing.inline_swarm import InlineSwarm

from .conftest import (
    SPANS,
    adapted,
    assert_equal,
    crash,
    gradients,
    layers_of,
    logits,
    lora,
    shake,
    table,
    train_step,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def pair(swarm: InlineSwarm, local: PreTrainedModel) -> tuple[PeftModel, PeftModel]:
    """Equal adapters in remote and in local blocks."""
    return adapted(swarm.load()), adapted(local)


def test_disabled_adapters_leave_the_base_model(pair: tuple[PeftModel, PeftModel], checkpoint: Path) -> None:
    remote, local = pair
    base = logits(whole(checkpoint))
    assert torch.equal(logits(remote), logits(local))
    assert not torch.equal(logits(remote), base)
    with remote.disable_adapter():
        assert torch.equal(logits(remote), base)
    assert torch.equal(logits(remote), logits(local))


def test_adapters_can_be_added_switched_combined_and_deleted(pair: tuple[PeftModel, PeftModel]) -> None:
    seen = []
    changes: list[Any] = [
        lambda model: None,
        lambda model: model.add_adapter("second", lora(r=2, target_modules=["o_proj", "down_proj", "q_proj"])),
        lambda model: model.set_adapter("second"),
        lambda model: shake(model),
        lambda model: model.base_model.set_adapter(["default", "second"]),
        lambda model: model.delete_adapter("default"),
    ]
    for number, change in enumerate(changes):
        for model in pair:
            torch.manual_seed(number)
            change(model)
        ours, theirs = map(logits, pair)
        assert torch.equal(ours, theirs), number
        seen.append(ours)
    # One that was only added is not active, and does nothing until its weights change.
    assert [torch.equal(*both) for both in zip(seen, seen[1:], strict=False)] == [True, False, False, False, False]


def test_weights_changed_in_the_middle_of_a_generation_take_effect(pair: tuple[PeftModel, PeftModel]) -> None:
    outputs = []
    for model in pair:
        tokens = table.prompt()
        with torch.no_grad():
            first = model(input_ids=tokens, use_cache=True)
            torch.manual_seed(5)
            shake(model)
            second = model(input_ids=tokens[:, :1], past_key_values=first.past_key_values, use_cache=True)
            tuner: Any = model.base_model
            tuner.disable_adapter_layers()
            third = model(input_ids=tokens[:, 1:3], past_key_values=second.past_key_values, use_cache=True)
        outputs.append((first.logits, second.logits, third.logits))
    assert all(map(torch.equal, *outputs))


def test_merging_is_refused_by_name(pair: tuple[PeftModel, PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # it would leave a thread
    remote, local = pair
    with pytest.raises(UnsupportedCallError, match=r"weight 'self_attn\.q_proj\.weight' is on remote peers"):
        remote.merge_adapter()
    assert torch.equal(logits(remote), logits(local))
    with pytest.raises(UnsupportedCallError, match=r"weight 'self_attn\.q_proj\.weight' is on remote peers"):
        remote.merge_and_unload()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about what is done here
def test_two_methods_at_one_layer_are_refused_by_name(swarm: InlineSwarm) -> None:
    model = adapted(swarm.load())
    inner: Any = model.base_model
    twice = adapted(inner.model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(UnsupportedCallError, match=r"adapters of two methods at 'self_attn\.q_proj' of block 0"):
        logits(twice)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_with_inputs_that_require_gradients(
    pair: tuple[PeftModel, PeftModel], is_reentrant: bool
) -> None:
    for model in pair:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        model.enable_input_require_grads()
        model.train()
    assert_equal(*map(train_step, pair))


def test_autocast_reaches_the_peers(pair: tuple[PeftModel, PeftModel]) -> None:
    plain = train_step(pair[1])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        remote, local = map(train_step, pair)
    assert_equal(remote, local)
    assert local[0] != plain


def test_trainer_of_transformers(pair: tuple[PeftModel, PeftModel], tmp_path: Path) -> None:
    losses = []
    for number, model in enumerate(pair):
        tokens = table.prompt(rows=6)
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2}
        arguments = TrainingArguments(
            str(tmp_path / str(number)), report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, **options
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(tmp_path / f"saved{number}"))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    ours, theirs = (table.trainable(model) for model in pair)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    files = [(tmp_path / f"saved{number}" / "adapter_config.json").read_text() for number in (0, 1)]
    assert files[0] == files[1]


def test_copied_model_has_adapters_of_its_own(pair: tuple[PeftModel, PeftModel]) -> None:
    remote, local = pair
    twin = copy.deepcopy(remote)
    before = logits(local)
    assert torch.equal(logits(twin), before)
    shake(twin)
    assert torch.equal(logits(remote), before)
    changed = logits(twin)
    assert not torch.equal(changed, before)
    train_step(twin)
    assert all(parameter.grad is None for parameter in remote.parameters())


def test_unchanged_adapters_travel_once(pair: tuple[PeftModel, PeftModel], swarm: InlineSwarm) -> None:
    remote, _ = pair
    layers = layers_of(remote)
    sent = [layers.stats().bytes_sent]
    for change in (False, False, True):
        if change:
            shake(remote)
        logits(remote)
        sent.append(layers.stats().bytes_sent)
    first, again, changed = (after - before for before, after in zip(sent, sent[1:], strict=False))
    size = sum(parameter.nbytes for parameter in table.trainable(remote).values())
    assert first - again > size
    assert changed - again > size


def test_adapter_that_a_peer_dropped_is_sent_again(pair: tuple[PeftModel, PeftModel], swarm: InlineSwarm) -> None:
    remote, local = pair
    expected = train_step(local)
    loss = remote(input_ids=table.prompt(), labels=table.prompt()).loss
    for peer in swarm.peers:
        assert peer.handler is not None
        assert len(peer.handler.adapters._held) == 1
        peer.handler.adapters._held.clear()
    loss.backward()
    assert_equal((loss.item(), gradients(remote)), expected)
    layers = layers_of(remote)
    assert layers.stats().failovers == 0


def test_peer_lost_between_forward_and_backward(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    config = lora(lora_dropout=0.25, target_modules="all-linear")
    remote, oracle = adapted(doubled.load(), config).train(), adapted(local, config).train()
    with table.same_dropout(oracle, seed=9):
        expected = train_step(oracle)
        loss = remote(input_ids=table.prompt(), labels=table.prompt()).loss
    layers = layers_of(remote)
    route = layers.stats().route
    for hop in route:
        crash(doubled, hop.peer_id)
    loss.backward()
    assert_equal((loss.item(), gradients(remote)), expected)
    assert layers.stats().reroutes == len(route) == len(SPANS)


def test_manual_seed_makes_dropout_repeatable(doubled: InlineSwarm) -> None:
    config = lora(lora_dropout=0.25, target_modules="all-linear")
    remote = adapted(doubled.load(), config).train()

    def loss_of() -> float:
        return float(remote(input_ids=table.prompt(), labels=table.prompt()).loss.detach())

    torch.manual_seed(4)
    first, second = loss_of(), loss_of()
    torch.manual_seed(4)
    assert (loss_of(), loss_of()) == (first, second)
    assert first != second
    remote.eval()
    before = torch.get_rng_state()
    loss_of()
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn where nothing is dropped


def test_peer_lost_in_a_generation(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    outputs = []
    for model in (adapted(doubled.load()), adapted(local)):
        with torch.no_grad():
            first = model(input_ids=table.prompt(), use_cache=True)
            layers = layers_of(model)
            if isinstance(layers, RemoteSequential):  # else it is the oracle
                crash(doubled, layers.stats().route[1].peer_id)
            second = model(input_ids=table.prompt()[:, :1], past_key_values=first.past_key_values, use_cache=True)
        outputs.append(second.logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)  # replay feeds the same tokens in other portions


@pytest.mark.parametrize("blocks", ["0:2", "1:3", "2:4"])
def test_adapters_in_local_and_remote_blocks_of_one_model(
    swarm: InlineSwarm, local: PreTrainedModel, checkpoint: Path, blocks: str
) -> None:
    model: Any = whole(checkpoint)
    stack = find_stack(model, model.config)
    model.model.layers = RemoteSequential(
        swarm.layers()._handle, Span.parse(blocks), local=copy.deepcopy(stack.blocks(model))
    )
    config = lora(target_modules="all-linear")
    remote, oracle = adapted(model, config).train(), adapted(local, config).train()
    assert_equal(train_step(remote), train_step(oracle))
    assert list(remote.state_dict()).count("base_model.model.model.norm.weight") == 1
    assert table.trainable(remote).keys() == table.trainable(oracle).keys()
    remote.eval(), oracle.eval()
    assert torch.equal(table.generated(remote), table.generated(oracle))


def test_over_sockets(checkpoint: Path, local: PreTrainedModel) -> None:
    config = lora(target_modules="all-linear", use_dora=True)
    oracle = adapted(local, config)
    with LocalSwarm(checkpoint, spans=["0:2", "2:4"], mode="thread") as swarm:
        model: Any = whole(checkpoint)
        with RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False) as layers:
            model.model.layers = layers
            remote = adapted(model, config)
            for _ in range(2):
                assert_equal(train_step(remote), train_step(oracle))
                for peft_model in (remote, oracle):
                    torch.manual_seed(2)
                    shake(peft_model)
            assert torch.equal(table.generated(remote, num_beams=3), table.generated(oracle, num_beams=3))


def test_clients_with_and_without_adapter_take_turns(swarm: InlineSwarm, checkpoint: Path) -> None:
    """What peers keep of one's forward is there while the other's runs, which needs other gradients."""
    sides = [(adapted(swarm.load()), swarm.load()), (adapted(whole(checkpoint)), whole(checkpoint))]
    results = []
    for trained, frozen in sides:
        inputs = frozen.get_input_embeddings()(table.prompt()).detach().requires_grad_()
        first = trained(input_ids=table.prompt(), labels=table.prompt()).loss
        second = frozen(inputs_embeds=inputs, labels=table.prompt()).loss
        third = trained(input_ids=table.prompt(), labels=table.prompt()).loss
        for loss in (second, third, first):
            loss.backward()
        results.append(((first + second + third).item(), gradients(trained) | {"inputs": inputs.grad}))
    assert_equal(*results)
    for model in sides[0]:
        blocks = layers_of(model) if isinstance(model, PeftModel) else model.model.layers
        stats = blocks.stats()
        assert (stats.kept_backwards > 0, stats.recomputed_backwards) == (True, 0)
