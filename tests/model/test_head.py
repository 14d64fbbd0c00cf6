from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.head import SHORTLIST, GreatestLogits, Int8Head, set_head
from remote_modules.model.stack import find_stack

HIDDEN, VOCABULARY = 256, 1024


def new_head(seed: int, *, bias: bool = False, rows: int = VOCABULARY) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    plain = nn.Linear(HIDDEN, rows, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    for parameter in plain.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return plain


def hidden_states(seed: int, tokens: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    row = torch.randn(1, tokens, HIDDEN, generator=generator)
    row[..., seed % HIDDEN] *= 40  # an outlier channel
    return row.bfloat16()


def tiny_llama(dtype: torch.dtype = torch.bfloat16, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_greatest_logit_is_that_of_the_plain_head(bias: bool) -> None:
    plain = new_head(0, bias=bias)
    head = Int8Head(plain)
    for seed in range(100):
        row = hidden_states(seed)
        expected, logits = plain(row), head(row)
        assert logits.shape == expected.shape
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert torch.equal(logits.max(), expected.max())
        assert (logits - expected).abs().max() < 0.2 * expected.float().std()
    assert head.num_full < 50  # the codes did it, mostly


def test_ties_go_to_the_same_row() -> None:
    plain = new_head(1)
    row = hidden_states(1)
    best = int(plain(row).argmax())
    copies = torch.tensor([3, best, 700])
    plain.weight[copies] = plain.weight[best].clone()
    plain.weight[5] = plain.weight[best]
    plain.weight[5, 7] *= 1.01  # rounds to about the same
    head = Int8Head(plain)
    assert int(head(row).argmax()) == int(plain(row).argmax())
    assert torch.equal(head(row)[0, 0, copies], plain(row)[0, 0, copies])
    assert head.num_full == 0


def test_more_candidates_than_the_shortlist_holds_take_the_plain_product() -> None:
    plain = new_head(2)
    row = hidden_states(2)
    plain.weight[: SHORTLIST + 1] = plain.weight[plain(row).argmax()].clone()
    head = Int8Head(plain)
    assert torch.equal(head(row), plain(row))
    assert head.num_full == 1


def test_values_that_are_not_finite_take_the_plain_product() -> None:
    plain = new_head(3)
    head = Int8Head(plain)
    row = hidden_states(3)
    row[..., 0] = torch.inf
    torch.testing.assert_close(head(row), plain(row), rtol=0, atol=0, equal_nan=True)
    assert head.num_full == 1


def test_bound_holds_for_every_row() -> None:
    plain = new_head(4)
    head = Int8Head(plain)
    worst = 0.0
    for seed in range(20):
        row = hidden_states(seed)[0]
        true = row.double() @ plain.weight.double().T
        coded = row.double() @ (head._codes.double() * head._scales.double()[:, None]).T
        errors = (true - coded).abs()[0] / (head._slopes.double() * row.double().norm())
        worst = max(worst, float(errors.max()))
    assert 0.05 < worst <= 1


def test_small_vocabulary_is_computed_plainly_in_effect() -> None:
    plain = new_head(5, rows=SHORTLIST)
    assert torch.equal(Int8Head(plain)(hidden_states(5)), plain(hidden_states(5)))


def test_several_tokens_gradients_and_changed_weights_take_the_plain_product() -> None:
    plain = new_head(6)
    head = Int8Head(plain)
    rows = hidden_states(6, tokens=3)
    assert torch.equal(head(rows), plain(rows))
    row = hidden_states(6).requires_grad_()
    head(row).sum().backward()
    assert row.grad is not None
    coded = head(hidden_states(6))
    assert not torch.equal(coded, plain(hidden_states(6)))
    with torch.no_grad():
        head.weight.mul_(-1)
    assert torch.equal(head(hidden_states(6)), plain(hidden_states(6)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_generation_has_the_tokens_of_the_plain_head(tied: bool) -> None:
    model = tiny_llama(tied=tied)
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    before = set(model.state_dict())
    set_head(model, "int8")
    assert torch.equal(model.generate(tokens, **options), expected)
    assert model.lm_head.num_full < 24
    assert set(model.state_dict()) == before
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_heads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="head must be one of int8, got 'int4'"):
        set_head(tiny_llama(), "int4")
    with pytest.raises(ValueError, match=r"is for bfloat16 weights on the CPU, got torch\.float32 on cpu"):
        set_head(tiny_llama(torch.float32), "int8")
    classifier = AutoModelForSequenceClassification.from_config(tiny_llama().config)
    with pytest.raises(ValueError, match="needs a linear LM head, LlamaForSequenceClassification has NoneType"):
        set_head(classifier, "int8")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_greatest_logits_are_those_of_the_whole_model(tied: bool) -> None:
    model = tiny_llama(torch.float32, tied=tied)
    tokens = torch.tensor([[5, 17, 3, 88]])
    with torch.no_grad():
        hidden: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(lambda *call: hidden.append(call[-1]))
        expected = model(tokens).logits
        handle.remove()
    end = GreatestLogits(model, find_stack(model, model.config))
    values, found = end.top(hidden[0], 7)
    assert torch.equal(values, expected.topk(7).values)
    assert torch.equal(found, expected.topk(7).indices)
    assert end.top(hidden[0], 10_000)[0].shape == (1, 4, 512)  # no more than there are


def test_model_that_does_more_after_its_blocks_is_refused() -> None:
    model = tiny_llama()
    model.model.register_forward_hook(lambda owner, args, output: (2 * output[0],))
    with pytest.raises(UnsupportedCallError, match="a 'llama' does more than a norm after its blocks; leave its head"):
        GreatestLogits(model, find_stack(model, model.config))
    model = tiny_llama()
    model.model.second_norm = nn.LayerNorm(32)
    with pytest.raises(UnsupportedCallError, match="a 'llama' has no norm and linear head after its blocks"):
        GreatestLogits(model, find_stack(model, model.config))
