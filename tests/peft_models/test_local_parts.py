"""What is trained at the client beside or between remote blocks: modules between slices, heads, embeddings, norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from remote_modules import RemoteSequential, UnsupportedCallError
from remote_modules.testing import LocalSwarm
from remote_modules.testing.inline_swarm import InlineSwarm

from .conftest import adapted, assert_equal, crash, gradients, layers_of, logits, lora, shake, table, train_step, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NUM_STEPS = 5


class Bottleneck(nn.Module):
    """A small residual adapter."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(size), nn.Linear(size, 4), nn.Linear(4, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.up(F.gelu(self.down(self.norm(hidden))))
        return hidden + update


class Between(nn.Module):
    """A model whose blocks are remote, with an adapter in the middle: slices are called one after the other."""

    def __init__(self, base: Any, layers: RemoteSequential) -> None:
        super().__init__()
        self.base = base
        self.first, self.rest = layers[:2], layers[2:]
        self.adapter = Bottleneck()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.base.model.embed_tokens(tokens)
        hidden = self.rest(self.adapter(self.first(hidden)))
        output: torch.Tensor = self.base.lm_head(self.base.model.norm(hidden))
        return output


class Hooked(nn.Module):
    """The same with blocks that are here."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.adapter = Bottleneck()
        base.model.layers[1].register_forward_hook(lambda block, args, output: self.adapter(output))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(tokens, use_cache=False).logits
        return output


def trained(model: Any, loss_hook: Any = lambda step: None) -> list[float]:
    torch.manual_seed(6)
    for parameter in model.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
    tokens, losses = table.prompt(), []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss_hook(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_trained_alike(ours: Any, theirs: Any) -> None:
    for (name, parameter), other in zip(ours.adapter.named_parameters(), theirs.adapter.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_module_between_slices_trains_as_between_local_blocks(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    base = doubled.load()
    layers: Any = base.model.layers
    ours, theirs = Between(base.requires_grad_(False), layers), Hooked(local.requires_grad_(False))

    def lose_a_peer(step: int) -> None:
        if step in (1, 3):  # between forward and backward
            crash(doubled, layers.stats().route[step // 3].peer_id)

    expected = trained(theirs)
    assert trained(ours, lose_a_peer) == expected
    assert len(set(expected)) == NUM_STEPS
    assert layers.stats().failovers >= 1
    assert_trained_alike(ours, theirs)


def test_module_between_slices_and_lora_in_them(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    remote, oracle = adapted(swarm.load(), lora()), adapted(local, lora())
    ours, theirs = Between(remote.get_base_model(), layers_of(remote)), Hooked(oracle.get_base_model())
    losses = [trained(model) for model in (ours, theirs)]
    assert losses[0] == losses[1]
    assert_trained_alike(ours, theirs)
    pairs = zip(table.trainable(remote).values(), table.trainable(oracle).values(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_module_between_slices_over_sockets_with_a_killed_peer(checkpoint: Path, local: PreTrainedModel) -> None:
    theirs = Hooked(local.requires_grad_(False))
    with LocalSwarm(checkpoint, spans=["0:2", "2:4", "2:4"], mode="thread") as swarm:
        with RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False) as layers:
            ours = Between(whole(checkpoint).requires_grad_(False), layers)

            def kill(step: int) -> None:
                if step == 2:
                    lost = layers.stats().route[-1].peer_id
                    next(peer for peer in swarm.peers if peer.peer_id == lost).kill()

            assert trained(ours, kill) == trained(theirs)
            assert layers.stats().failovers >= 1
            assert_trained_alike(ours, theirs)


def test_sessions_of_slices_generate_with_the_module_between_them(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    base = doubled.load()
    layers: Any = base.model.layers
    ours, theirs = Between(base, layers), Hooked(local)
    theirs.adapter.load_state_dict(ours.adapter.state_dict())
    tokens, outputs = table.prompt(num_tokens=5), []
    with torch.no_grad(), ours.first.session() as first, ours.rest.session() as rest:
        new = tokens
        for step in range(5):
            if step == 2:
                crash(doubled, layers.stats().route[-1].peer_id)
            hidden = rest.step(ours.adapter(first.step(base.model.embed_tokens(new))))
            new = base.lm_head(base.model.norm(hidden[:, -1:])).argmax(-1)
            outputs.append(new)
        assert first.position == rest.position == 9
    expected = theirs.base.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False
    )
    assert layers.stats().failovers >= 1
    assert torch.equal(torch.cat(outputs, dim=1), expected[:, 5:])


class Wrapped(nn.Module):
    """A block between two adapters, in the place of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        torch.manual_seed(6)
        self.before, self.after = Bottleneck(), Bottleneck()

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.after(self.block(self.before(hidden), *args, **kwargs))
        return output


def wrapped(model: Any, *indices: int) -> Any:
    """With adapters around some blocks; nothing else is trained."""
    model.requires_grad_(False)
    for index in indices:
        model.model.layers[index] = Wrapped(model.model.layers[index])
    return model


@pytest.mark.parametrize("indices", [(0,), (1,), (3,), (1, 2), (0, 1, 2, 3)])
def test_wrapped_blocks_in_a_models_loop_are_those_of_a_local_model(
    indices: tuple[int, ...], swarm: InlineSwarm, local: PreTrainedModel
) -> None:
    models = wrapped(swarm.load(), *indices), wrapped(local, *indices)
    found: list[list[Any]] = []
    for model in models:
        optimizer, seen = torch.optim.AdamW(table.trainable(model).values(), lr=1e-2), []
        for _ in range(3):
            loss, grads = train_step(model)
            seen += [loss, *grads.values()]
            optimizer.step()
        found.append(seen)
    assert len(found[0]) == 3 * (1 + 12 * len(indices))
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(*found, strict=True))
    assert torch.equal(*(table.generated(model) for model in models))
    assert torch.equal(*(table.generated(model, num_beams=3) for model in models))
    mask = torch.ones_like(table.prompt())
    mask[0, :3] = 0
    assert torch.equal(*(logits(model, attention_mask=mask) for model in models))


def test_wrapped_block_with_lora_and_deep_prompts_and_lost_peers(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    models = []
    for model in (doubled.load(), local):
        table.add_deep_prompts(model)
        models.append(adapted(wrapped(model, 1), lora()).train())
        for name, parameter in models[-1].named_parameters():
            parameter.requires_grad_(any(part in name for part in ("lora_", "deep_prompt", "before", "after")))
        torch.manual_seed(8)
        shake(models[-1])
    remote, oracle = models
    loss = remote(input_ids=table.prompt(), labels=table.prompt()).loss
    layers = layers_of(remote)
    for hop in layers.stats().route:
        crash(doubled, hop.peer_id)
    loss.backward()
    assert_equal((loss.item(), gradients(remote)), train_step(oracle))
    names = " ".join(gradients(remote))
    assert all(part in names for part in ("q_proj", "before", "after", "deep_prompt"))
    assert layers.stats().failovers >= 1


def test_peer_lost_in_a_generation_with_a_wrapped_block(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    remote, oracle = wrapped(doubled.load(), 1), wrapped(local, 1)
    outputs = []
    for model in (remote, oracle):
        with torch.no_grad():
            first = model(input_ids=table.prompt(), use_cache=True)
            if model is remote:
                crash(doubled, remote.model.layers.stats().route[-1].peer_id)
            second = model(input_ids=table.prompt()[:, :2], past_key_values=first.past_key_values, use_cache=True)
        outputs.append(second.logits)
    assert remote.model.layers.stats().failovers >= 1
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)  # replay feeds the same tokens in other portions


def test_what_wrapped_blocks_cannot_do_is_refused_by_name(swarm: InlineSwarm) -> None:
    model = wrapped(swarm.load(), 1)
    layers, hidden = model.model.layers, torch.zeros(1, 2, 32)
    with pytest.raises(
        UnsupportedCallError, match="output_hidden_states=True is not carried where remote blocks are wra"
    ):
        logits(model, output_hidden_states=True)
    with pytest.raises(UnsupportedCallError, match="are wrapped in other modules; call them through the model"):
        layers(hidden)
    with pytest.raises(UnsupportedCallError, match="are wrapped in other modules; call them through the model"):
        layers.session()
    with pytest.raises(ValueError, match="are wrapped in other modules; take the slices before and after"):
        layers[0:2]
    assert layers[2:4](layers[1](layers[0:1](hidden))).shape == hidden.shape
    layers[1] = nn.Identity()
    for _ in range(2):
        with pytest.raises(UnsupportedCallError, match="3 of the remote blocks 0:4 are left in their list"):
            layers(hidden)
        with pytest.raises(UnsupportedCallError, match="3 of the remote blocks 0:4 are left in their list"):
            logits(model)


def test_work_between_blocks_in_a_models_loop_is_refused_by_name(swarm: InlineSwarm) -> None:
    model = swarm.load()
    model.model.layers[1].register_forward_hook(lambda block, args, output: output * 2)
    with pytest.raises(UnsupportedCallError, match="changes hidden states between blocks 1 and 2"):
        logits(model)


PARTS = {"head": ["lm_head"], "embeddings": ["model.embed_tokens"], "norm": ["model.norm"], "all": [""]}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_the_model_that_are_here_train_as_on_a_local_model(
    part: str, swarm: InlineSwarm, local: PreTrainedModel
) -> None:
    results = []
    for model in (swarm.load(), local):
        model.requires_grad_(False)
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)
        if model is local:
            model.model.layers.requires_grad_(False)
        chosen = table.trainable(model)
        optimizer, losses = torch.optim.AdamW(chosen.values(), lr=1e-2), []
        for _ in range(3):
            losses.append(train_step(model)[0])
            optimizer.step()
        results.append((losses, dict(chosen)))
    (losses, ours), (expected, theirs) = results
    assert losses == expected
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


LOCAL_PARTS: dict[str, dict[str, Any]] = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens", "model.norm"]},
    "lora on head": {"target_modules": ["lm_head", "q_proj"]},
    "lora on embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "lora on nothing remote": {"target_modules": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 7, 11]},
}


@pytest.mark.parametrize("case", LOCAL_PARTS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about tied weights and saved embeddings
def test_what_peft_trains_beside_the_blocks(
    case: str, swarm: InlineSwarm, local: PreTrainedModel, tmp_path: Path
) -> None:
    config: LoraConfig = lora(**LOCAL_PARTS[case])
    remote, oracle = adapted(swarm.load(), config).train(), adapted(local, config).train()
    assert_equal(train_step(remote), train_step(oracle))
    assert table.trainable(remote).keys() == table.trainable(oracle).keys()
    remote.eval(), oracle.eval()
    assert torch.equal(table.generated(remote), table.generated(oracle))
