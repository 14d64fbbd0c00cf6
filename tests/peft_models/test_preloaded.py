"""Adapters that peers offer, and the same adapters at clients."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential, UnsupportedCallError
from remote_modules.errors import CheckpointError, NoRouteError
from remote_modules.model.adapter_content import content_of
from remote_modules.model.adapter_files import open_adapter
from remote_modules.model.adapter_reading import collect
from remote_modules.testing import LocalSwarm
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.testing.local_peer import ThreadPeer

from .conftest import adapted, assert_equal, layers_of, logits, lora, shake, table, train_step, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PATH = "model.layers"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.5},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.self_attn.v_proj": 5, "q_proj": 3}},
    "some-layers": {"layers_to_transform": [1, 3]},
}


def saved(model: PreTrainedModel, folder: Path, *, seed: int = 1, **options: Any) -> PeftModel:
    found = adapted(model, lora(**options), seed=seed)
    found.save_pretrained(str(folder))
    return found


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_files_have_the_content_of_the_model_that_they_load_into(
    checkpoint: Path, local: PreTrainedModel, swarm: InlineSwarm, tmp_path: Path, options: dict[str, Any]
) -> None:
    saved(local, tmp_path, **options)
    remote: Any = PeftModel.from_pretrained(swarm.load(), str(tmp_path)).eval()
    found = collect(dict(enumerate(layers_of(remote))))
    blocks: Any = whole(checkpoint)
    files = open_adapter(str(tmp_path), PATH).of_blocks(dict(enumerate(blocks.model.layers)))
    assert found is not None
    assert files.entries == found.entries
    assert content_of(files).name == content_of(found).name


def test_digest_is_of_the_content(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        saved(whole(checkpoint), tmp_path / name, seed=seed)
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    one, two, same = (open_adapter(str(tmp_path / name), PATH).digest for name in ("one", "two", "same"))
    assert one == same != two


# -------------------------------------------------------------------------------- bad files


def changed(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def with_head(folder: Path) -> None:
    for name, tensor in (("A", torch.ones(4, 32)), ("B", torch.ones(96, 4))):
        with_tensor(folder, f"base_model.model.lm_head.lora_{name}.weight", tensor)


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), name: tensor}, path)


LAYER = "base_model.model.model.layers"
BAD: dict[str, tuple[Any, str]] = {
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json; save it with "),
    "broken-config": (lambda f: (f / "adapter_config.json").write_text("{"), "has no readable adapter_config.json: "),
    "list-config": (lambda f: (f / "adapter_config.json").write_text("[]"), "has no readable adapter_config.json: "),
    "no-weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "has no adapter_model.safetensors; it has pickled weights, which are never loaded",
    ),
    "broken-weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"),
        "has no readable adapter_model.safetensors: ",
    ),
    "ia3": (lambda f: changed(f, peft_type="IA3"), "is of type 'IA3', only LORA can be preloaded"),
    "bias": (lambda f: changed(f, bias="all"), "has bias='all', which changes weights of the model"),
    "pissa": (lambda f: changed(f, init_lora_weights="pissa"), "has init_lora_weights='pissa', which changes weights"),
    "head": (lambda f: changed(f, modules_to_save=["score"]), "has modules_to_save=['score'], which cannot be"),
    "newer": (lambda f: changed(f, use_tomorrow=True), "has use_tomorrow=True, which cannot be preloaded"),
    "alpha": (lambda f: changed(f, lora_alpha="x"), "has lora_alpha='x'"),
    "pattern": (lambda f: changed(f, alpha_pattern={"(a+)+": 1}), "has an alpha_pattern with repetitions"),
    "half-pattern": (lambda f: changed(f, alpha_pattern={"(": 1}), "has an unreadable alpha_pattern"),
    "outside": (
        lambda f: with_tensor(f, "base_model.model.lm_head.lora_A.weight", torch.ones(4, 32)),
        "has ['lora_A'] at 'lm_head', expected matrices",
    ),
    "head-lora": (with_head, "changes 'lm_head', which is in no block of 'model.layers'"),
    "other-tensor": (lambda f: with_tensor(f, f"{LAYER}.0.mlp.weight", torch.ones(1)), "has a tensor 'base_model."),
    "not-finite": (
        lambda f: with_tensor(f, f"{LAYER}.0.self_attn.q_proj.lora_A.weight", torch.full((4, 32), torch.inf)),
        "is not usable: adapter holds values that are not finite",
    ),
    "other-rank": (
        lambda f: with_tensor(f, f"{LAYER}.0.self_attn.q_proj.lora_A.weight", torch.ones(3, 32)),
        "is not usable: adapter of 'self_attn.q_proj' of block 0 claims shapes",
    ),
}


@pytest.mark.parametrize(("spoil", "text"), BAD.values(), ids=BAD.keys())
def test_bad_folder_is_refused_in_one_line(checkpoint: Path, tmp_path: Path, spoil: Any, text: str) -> None:
    saved(whole(checkpoint), tmp_path)
    spoil(tmp_path)
    blocks: Any = whole(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(str(tmp_path), PATH).of_blocks(dict(enumerate(blocks.model.layers)))
    assert str(caught.value).startswith(f"adapter '{tmp_path}' {text}")
    assert len(str(caught.value).splitlines()) == 1


def test_adapter_of_another_model_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    saved(whole(checkpoint), tmp_path)
    with_tensor(tmp_path, f"{LAYER}.0.nothing.lora_A.weight", torch.ones(4, 32))
    with_tensor(tmp_path, f"{LAYER}.0.nothing.lora_B.weight", torch.ones(32, 4))
    blocks: Any = whole(checkpoint)
    with pytest.raises(CheckpointError, match="has 'nothing', which block 0 does not have"):
        open_adapter(str(tmp_path), PATH).of_blocks({0: blocks.model.layers[0]})


def test_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="adapter folder /nowhere does not exist"):
        open_adapter("/nowhere", PATH)


# -------------------------------------------------------------------------------- in a swarm


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("adapters") / name for name in ("pirate", "lawyer")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft asks
        for seed, folder in enumerate(found.values()):
            saved(whole(checkpoint), folder, seed=seed, target_modules="all-linear")
    return found


@pytest.fixture(scope="module")
def offering(checkpoint: Path, folders: dict[str, Path]) -> Iterator[LocalSwarm]:
    sources = (str(folders["pirate"]), f"law={folders['lawyer']}")
    with LocalSwarm(checkpoint, spans=["0:2", "2:4"], mode="thread", adapters=sources) as swarm:
        yield swarm


def oracle(checkpoint: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(whole(checkpoint), str(folder)).eval()


def client(checkpoint: Path, swarm: LocalSwarm, **config: Any) -> tuple[Any, RemoteSequential]:
    model: Any = whole(checkpoint)
    layers = RemoteSequential.from_swarm(
        checkpoint, trackers=swarm.trackers, mdns=False, config=ClientConfig(peer_cache=None, **config)
    )
    model.model.layers = layers
    return model, layers


def test_client_names_an_adapter_that_peers_offer(
    checkpoint: Path, offering: LocalSwarm, folders: dict[str, Path]
) -> None:
    pirate, lawyer, base = (
        oracle(checkpoint, folders["pirate"]),
        oracle(checkpoint, folders["lawyer"]),
        whole(checkpoint),
    )
    model, layers = client(checkpoint, offering, adapter="pirate")
    with layers:
        assert torch.equal(table.generated(model), table.generated(pirate))
        layers.set_adapter("law")
        assert torch.equal(logits(model), logits(lawyer))
        assert torch.equal(table.generated(model), table.generated(lawyer))
        layers.set_adapter(None)
        assert torch.equal(logits(model), logits(base))
        stats = layers.stats()
    assert (stats.adapters_sent, stats.adapter_bytes, stats.failovers) == (0, 0, 0)


def test_gradients_flow_through_an_adapter_that_peers_offer(
    checkpoint: Path, offering: LocalSwarm, folders: dict[str, Path]
) -> None:
    model, layers = client(checkpoint, offering, adapter="pirate")
    local = oracle(checkpoint, folders["pirate"])
    tokens = table.prompt()
    found = []
    with layers:
        for one in (model, local):
            embeddings = one.get_input_embeddings()(tokens).detach().requires_grad_()
            one(inputs_embeds=embeddings).logits.square().mean().backward()
            assert embeddings.grad is not None
            found.append(embeddings.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_session_of_its_own_computes_with_the_adapter(checkpoint: Path, offering: LocalSwarm) -> None:
    _, layers = client(checkpoint, offering, adapter="pirate")
    hidden_states = torch.randn(1, 3, 32)
    with layers:
        with layers.session() as session:
            found = session.step(hidden_states)
        with torch.no_grad():
            expected = layers(hidden_states)
            layers.set_adapter(None)
            plain = layers(hidden_states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)


def test_client_that_has_the_adapter_sends_nothing_and_may_train_on(
    checkpoint: Path, offering: LocalSwarm, folders: dict[str, Path]
) -> None:
    model, layers = client(checkpoint, offering)
    with layers:
        remote: Any = PeftModel.from_pretrained(model, str(folders["pirate"]), is_trainable=True).eval()
        local: Any = PeftModel.from_pretrained(whole(checkpoint), str(folders["pirate"]), is_trainable=True).eval()
        assert torch.equal(logits(remote), logits(local))
        assert torch.equal(table.generated(remote), table.generated(local))
        assert_equal(train_step(remote), train_step(local))
        assert layers.stats().adapter_bytes == 0
        for one in (remote, local):
            torch.manual_seed(3)
            shake(one)
        assert_equal(train_step(remote), train_step(local))
        stats = layers.stats()
    assert stats.adapter_bytes == sum(parameter.nbytes for parameter in table.trainable(remote).values())
    assert stats.failovers == 0


def test_adapter_that_nobody_offers_is_named(checkpoint: Path, offering: LocalSwarm) -> None:
    model, layers = client(checkpoint, offering, adapter="poet")
    with (
        layers,
        pytest.raises(NoRouteError, match="no peer offers the adapter 'poet': 2 peers known, they offer law, p"),
    ):
        logits(model)


def test_adapters_of_client_and_peers_do_not_mix(checkpoint: Path, offering: LocalSwarm) -> None:
    model, layers = client(checkpoint, offering, adapter="pirate")
    with layers:
        remote = adapted(model)
        with pytest.raises(UnsupportedCallError, match="the model has adapters of its own, and adapter='pirate' asks"):
            logits(remote)
        layers.set_adapter(None)
        logits(remote)


def test_only_peers_that_offer_the_adapter_are_used(checkpoint: Path, folders: dict[str, Path]) -> None:
    with LocalSwarm(checkpoint, spans=["0:4"], mode="thread") as swarm:
        swarm.add("0:2", adapters=(str(folders["pirate"]),))
        swarm.add("0:2", adapters=(f"pirate={folders['lawyer']}",))
        model, layers = client(checkpoint, swarm, adapter="pirate", pass_deadline_s=2.0)
        with layers:
            with pytest.raises(
                NoRouteError, match="peers offer different adapters under the name 'pirate'; choose one"
            ):
                logits(model)
            digest = open_adapter(str(folders["pirate"]), PATH).digest
            layers.set_adapter(f"pirate@{digest}")
            with pytest.raises(NoRouteError, match="no route for blocks 2:4.* with adapter 'pirate'"):
                logits(model)
            swarm.add("2:4", adapters=(str(folders["pirate"]),))
            assert torch.equal(logits(model), logits(oracle(checkpoint, folders["pirate"])))
            assert {hop.peer_id for hop in layers.stats().route} == {swarm.peers[1].peer_id, swarm.peers[3].peer_id}


def test_adapters_are_there_after_a_move(checkpoint: Path, folders: dict[str, Path]) -> None:
    with LocalSwarm(checkpoint, spans=["0:2", "2:4"], mode="thread", adapters=(str(folders["pirate"]),)) as swarm:
        for peer, span in ((swarm.peers[1], "0:2"), (swarm.peers[0], "2:4")):
            assert isinstance(peer, ThreadPeer)
            peer._running().move(span)
        model, layers = client(checkpoint, swarm, adapter="pirate")
        with layers:
            assert torch.equal(logits(model), logits(oracle(checkpoint, folders["pirate"])))


def test_trained_adapter_is_saved_loads_locally_and_runs_elsewhere_without_preloading(
    checkpoint: Path, swarm: InlineSwarm, tmp_path: Path
) -> None:
    trained = adapted(swarm.load(), lora(target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW(list(table.trainable(trained).values()), lr=1e-2)
    for _ in range(3):
        train_step(trained)
        optimizer.step()
    trained.eval().save_pretrained(str(tmp_path))
    expected = logits(trained)
    held = [peer.handler.adapters.num_bytes for peer in swarm.peers if peer.handler is not None]
    assert torch.equal(logits(oracle(checkpoint, tmp_path)), expected)
    another: Any = PeftModel.from_pretrained(swarm.load(), str(tmp_path)).eval()
    assert torch.equal(logits(another), expected)
    assert [peer.handler.adapters.num_bytes for peer in swarm.peers if peer.handler is not None] == held
