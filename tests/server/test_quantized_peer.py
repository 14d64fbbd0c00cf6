"""A peer with quantized blocks: exact against the same blocks run locally, and quick to start again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model.support import opened, opened_files
from tiny_models import NUM_BLOCKS, load_whole, save_tiny

from remote_modules import Server, ServerConfig, load
from remote_modules.model.loading import load_span
from remote_modules.model.stack import meta_skeleton
from remote_modules.server import capacity, load_plan
from remote_modules.server.load_plan import LoadPlan
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm

ALL = f"0:{NUM_BLOCKS}"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMOTE_MODULES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def quantized_locally(folder: Path, quantization: str) -> Any:
    checkpoint, config, cls = opened(folder)
    span_model, stack = load_span(checkpoint, config, cls, Span.parse(ALL), quantization=quantization)
    whole: Any = load_whole(folder)
    whole.model.layers = stack.blocks(span_model)
    return whole


def gradient(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=inputs, labels=tokens).loss.backward()
    grad: torch.Tensor = inputs.grad
    return grad


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_peers_equal_the_same_quantization_run_locally(folder: Path, quantization: str) -> None:
    local = quantized_locally(folder, quantization)
    tokens = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    generation = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    with LocalSwarm(folder, spans=["0:1", "1:4"], quantization=quantization) as swarm:
        remote: Any = load(folder, trackers=swarm.trackers, mdns=False)
        with torch.no_grad():
            assert torch.equal(remote(tokens).logits, local(tokens).logits)
        assert torch.equal(remote.generate(tokens, **generation), local.generate(tokens, **generation))
        assert torch.equal(gradient(remote, tokens), gradient(local, tokens))
        remote.model.layers.close()


def served_digests(folder: Path, **options: Any) -> tuple[str, ...]:
    config = ServerConfig(model=str(folder), mdns=False, device="cpu", **options)
    return LoadPlan.read(config).load(Span(1, 3)).digests


def test_second_start_opens_no_shard_and_announces_the_same(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = served_digests(folder)
    assert not cache_folder.exists()
    with opened_files(monkeypatch) as cold:
        assert served_digests(folder, quantization="int8") == plain
    with opened_files(monkeypatch) as warm:
        assert served_digests(folder, quantization="int8") == plain
    assert any(name.startswith("model-") for name in cold)
    assert warm == {"block-0.safetensors", "block-1.safetensors", "block-2.safetensors"}  # the first is for measuring


def test_nothing_is_kept_when_the_cache_is_off(folder: Path, cache_folder: Path) -> None:
    assert all(served_digests(folder, quantization="nf4", quantized_cache=False))
    assert not cache_folder.exists()


def test_more_blocks_fit_when_quantized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, cls = opened(folder)
    block = capacity.parameter_bytes(meta_skeleton(cls, config).model.layers[0], torch.float32)
    lengths = []
    for quantization in ("none", "int8", "nf4"):
        plan = LoadPlan.read(
            ServerConfig(model=str(folder), mdns=False, device="cpu", quantization=quantization, kv_budget_bytes=1)
        )
        free = plan._workspace_bytes + 1 + 2 * block
        monkeypatch.setattr(load_plan, "free_bytes", lambda device, free=free: free)
        lengths.append(len(plan.choose([])))
    assert lengths == [2, NUM_BLOCKS, NUM_BLOCKS]


def test_missing_bitsandbytes_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with (
        opened_files(monkeypatch) as names,
        pytest.raises(ValueError, match=r"needs bitsandbytes, which is not installed; pip install"),
    ):
        Server(ServerConfig(model=str(folder), blocks="0:1", mdns=False, quantization="int8")).start()
    assert names == set()
