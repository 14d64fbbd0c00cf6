"""Several adapters in one batch: peft's ``adapter_names``, on remote blocks as on local ones."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential, UnsupportedCallError
from remote_modules.errors import PeerRefused
from remote_modules.net.client_connection import ClientConnection
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.wire import messages

from .conftest import SPANS, adapted, assert_equal, crash, gradients, layers_of, logits, lora, shake, table, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BASE = "__base__"
NAMES = ["low", BASE, "wide", "first", "low"]
CONFIGS = {
    "low": lora(r=2),
    "wide": lora(r=8, lora_alpha=3, use_rslora=True, target_modules="all-linear", lora_dropout=0.5),
    "first": lora(r=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[0]),  # not at all in the last span
}


def mixed(model: PreTrainedModel, configs: dict[str, LoraConfig] = CONFIGS) -> PeftModel:
    """With adapters of different ranks and places, all of random values."""
    torch.manual_seed(1)
    (first, config), *others = configs.items()
    peft_model: Any = PeftModel(model, copy.deepcopy(config), adapter_name=first)
    for name, config in others:
        peft_model.add_adapter(name, copy.deepcopy(config))
    peft_model.base_model.set_requires_grad(list(configs))
    shake(peft_model)
    return peft_model.eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> PeftModel:
    return mixed(whole(checkpoint))


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[InlineSwarm]:
    with InlineSwarm(checkpoint, [*SPANS, *SPANS]) as swarm:
        yield swarm


@pytest.fixture
def remote(shared: InlineSwarm) -> PeftModel:
    return mixed(shared.load())


def ragged(num_tokens: int = 7) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded at the left."""
    tokens = table.prompt(len(NAMES), num_tokens)
    mask = torch.ones_like(tokens)
    for row in range(len(NAMES)):
        mask[row, :row] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def rowwise(model: Any, names: list[str]) -> torch.Tensor:
    inputs = ragged()
    return logits(model, inputs["input_ids"], attention_mask=inputs["attention_mask"], adapter_names=names)


def scores(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and the logits that chose them."""
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**ragged(), adapter_names=NAMES, **settings, **options)
    return output.sequences, torch.stack(output.logits)


def test_each_row_has_its_own_adapter(remote: PeftModel, oracle: PeftModel) -> None:
    ours = rowwise(remote, NAMES)
    assert torch.equal(ours, rowwise(oracle, NAMES))
    for row, name in enumerate(NAMES):  # none of them is the same as without, or as another's
        alike = [n for n in CONFIGS if torch.equal(ours[row], rowwise(oracle, [n] * 5)[row])]
        assert alike == [n for n in CONFIGS if n == name]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_is_that_of_the_local_model(remote: PeftModel, oracle: PeftModel, options: dict[str, Any]) -> None:
    assert all(map(torch.equal, scores(remote, **options), scores(oracle, **options)))


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs = ragged()
    loss = model(**inputs, labels=inputs["input_ids"], adapter_names=NAMES).loss
    loss.backward()
    return loss.item(), gradients(model)


def test_gradients_are_those_of_the_local_model(remote: PeftModel, oracle: PeftModel) -> None:
    assert_equal(step(remote), step(oracle))


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.bfloat16), ("bloom", torch.float32)])
def test_other_families_and_bfloat16(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = table.save_family(tmp_path, family, dtype)
    attention = ["c_attn"] if family == "gpt2" else ["query_key_value"]
    configs = {
        "low": lora(r=2, target_modules=attention),
        "wide": lora(target_modules="all-linear"),
        "first": lora(target_modules=attention, layers_to_transform=[0]),
    }
    for config in configs.values():
        config.fan_in_fan_out = family == "gpt2"
    with InlineSwarm(folder, ["0:2", "2:4"]) as swarm:
        ours, theirs = (mixed(model, configs) for model in (swarm.load(), whole(folder)))
        assert_equal(step(ours), step(theirs))
        assert all(map(torch.equal, scores(ours), scores(theirs)))


def test_rows_that_are_cut_keep_their_adapters(checkpoint: Path, oracle: PeftModel) -> None:
    with InlineSwarm(checkpoint, SPANS, config=ClientConfig(microbatch_tokens=14)) as swarm:
        remote = mixed(swarm.load())
        ours, theirs = step(remote), step(oracle)
        assert layers_of(remote).stats().kept_backwards == 3 * len(SPANS)  # so many microbatches
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-4, atol=1e-6)


def test_peers_lost_between_forward_and_backward(doubled: InlineSwarm, oracle: PeftModel) -> None:
    remote = mixed(doubled.load())
    inputs = ragged()
    loss = remote(**inputs, labels=inputs["input_ids"], adapter_names=NAMES).loss
    for hop in layers_of(remote).stats().route:
        crash(doubled, hop.peer_id)
    loss.backward()
    assert_equal((loss.item(), gradients(remote)), step(oracle))
    assert layers_of(remote).stats().reroutes == len(SPANS)


def test_peer_lost_in_a_generation_whose_rows_were_reordered(checkpoint: Path, oracle: PeftModel) -> None:
    with InlineSwarm(checkpoint, [*SPANS, *SPANS], config=ClientConfig(exact_replay=True)) as swarm:
        remote = mixed(swarm.load())
        outputs = [continued(model, swarm) for model in (remote, oracle)]
        assert torch.equal(*outputs)
        assert layers_of(remote).stats().failovers >= len(SPANS)


def continued(model: Any, swarm: InlineSwarm) -> torch.Tensor:
    """Logits after a step, rows that change places, and the loss of all peers on the route, if there are some."""
    inputs, order = ragged(), torch.tensor([4, 2, 2, 0, 1, 3])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True, adapter_names=NAMES).past_key_values
        cache.batch_select_indices(order)
        layers = layers_of(model)
        if isinstance(layers, RemoteSequential):
            for hop in layers.stats().route:
                crash(swarm, hop.peer_id)
        mask = torch.cat([inputs["attention_mask"][order], torch.ones(6, 1, dtype=torch.int64)], dim=1)
        given = {"input_ids": inputs["input_ids"][order, :1], "attention_mask": mask, "past_key_values": cache}
        output: torch.Tensor = model(**given, adapter_names=[NAMES[row] for row in order]).logits
    return output


def test_other_adapters_in_the_middle_of_a_cache_are_refused(remote: PeftModel) -> None:
    tokens = table.prompt(2)
    with torch.no_grad():
        cache = remote(input_ids=tokens, use_cache=True, adapter_names=["low", BASE]).past_key_values
        for names in (["wide", BASE], None):
            with pytest.raises(UnsupportedCallError, match="adapter_names of this KV cache were low, __base__"):
                remote(input_ids=tokens[:, :1], past_key_values=cache, adapter_names=names)


def test_contents_travel_once_whichever_rows_have_them(remote: PeftModel) -> None:
    layers = layers_of(remote)
    rowwise(remote, NAMES)
    before = layers.stats()
    rowwise(remote, NAMES[::-1])
    assert layers.stats().adapter_bytes == before.adapter_bytes
    rowwise(remote, ["first", "wide", "wide", BASE, BASE])  # only the entries are others
    num_bytes = sum(parameter.nbytes for name, parameter in table.trainable(remote).items() if ".wide." in name)
    assert 0 < layers.stats().adapter_bytes - before.adapter_bytes < num_bytes / 3
    assert layers.stats().failovers == 0


def test_peers_of_an_older_protocol_are_avoided(
    shared: InlineSwarm, remote: PeftModel, oracle: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(remote)
    old = {hop.peer_id for hop in layers_of(remote).stats().route}
    minor = property(lambda self: 3 if self.peer_id in old else messages.VERSION_MINOR)
    monkeypatch.setattr(ClientConnection, "their_minor", minor)
    assert torch.equal(*(rowwise(model, NAMES) for model in (remote, oracle)))
    assert not old & {hop.peer_id for hop in layers_of(remote).stats().route}
    shared.io.run(asyncio.sleep(30.0))  # what failed is believed again by now, but the protocol is the same
    for _ in range(5):
        scores(remote)
        assert not old & {hop.peer_id for hop in layers_of(remote).stats().route}


@pytest.mark.parametrize("num_peers", [1, 2])
def test_swarm_of_an_older_protocol_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, num_peers: int) -> None:
    monkeypatch.setattr(messages, "VERSION_MINOR", 3)
    with InlineSwarm(checkpoint, ["0:4"] * num_peers) as swarm:
        model = mixed(swarm.load())
        logits(model)
        with pytest.raises(PeerRefused, match=r"speaks protocol 1\.3, this adapter needs 1\.4: update the peer"):
            rowwise(model, NAMES)


def test_what_peft_refuses_is_refused_by_name(shared: InlineSwarm, remote: PeftModel) -> None:
    with pytest.raises(UnsupportedCallError, match="one name for each of 5 rows, got 2"):
        rowwise(remote, ["low", BASE])
    with pytest.raises(ValueError, match="non-existing adapter"):
        rowwise(remote, ["lowe"] * 5)
    dora = adapted(shared.load(), lora(use_dora=True))
    with pytest.raises(UnsupportedCallError, match=r"DoRA at 'self_attn.q_proj' of block 0 does not go together"):
        logits(dora, adapter_names=["default", BASE])
    for model in (remote, dora):
        assert layers_of(model).stats().bytes_sent == 0
