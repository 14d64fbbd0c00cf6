from __future__ import annotations

import torch

from remote_modules.server.transfers import to_cpu, uploaded


def test_answers_have_the_dtypes_wanted_and_are_on_the_cpu() -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([1, 2])}
    found = to_cpu(tensors, lambda name, tensor: torch.bfloat16 if name == "a" else tensor.dtype)
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": torch.bfloat16, "b": torch.int64}
    assert torch.equal(found["a"].float(), tensors["a"])
    assert torch.equal(found["b"], tensors["b"])


def test_without_an_accelerator_inputs_stay_where_they_are() -> None:
    tensors = {"a": torch.ones(3)}
    found = uploaded(tensors, torch.device("cpu"))
    assert found["a"] is tensors["a"]
