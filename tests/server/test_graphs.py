from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import Adapter
from remote_modules.model.past import names_of
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.server.checks import RequestTensors
from remote_modules.server.engine import Engine
from remote_modules.server.graphs import Graph, is_out_of_memory
from remote_modules.server.workspace import _Peak
from remote_modules.spans import Span

from .test_named_tensors import FAMILIES, ROWS, TOKENS, Caller, engine_of
from .tiny import HIDDEN_SIZE, NUM_BLOCKS, given, hidden, owner_call

WHOLE = Span(0, NUM_BLOCKS)
Named = dict[str, torch.Tensor]


def no_room() -> Exception:
    return torch.OutOfMemoryError("a test says so")


def no_room_on_the_cpu() -> Exception:
    return RuntimeError("DefaultCPUAllocator: not enough memory: a test says so")


class Full:
    """In the place of `SpanModel.run`: fails as a full device does, for as long as it is asked for several blocks.

    Attributes:
        num_failed: times that it did.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make_error: Callable[[], Exception], times: int = 1) -> None:
        self.num_failed = 0
        run = SpanModel.run

        def full(model: SpanModel, inputs: Any, blocks: Span, *others: Any) -> Any:
            if len(blocks) > 1 and self.num_failed < times:
                self.num_failed += 1
                run(model, inputs, blocks, *others)  # what was made of it is held by the error
                raise make_error()
            return run(model, inputs, blocks, *others)

        monkeypatch.setattr(SpanModel, "run", full)


def adapter(blocks: Span, *, dropout: float = 0.0) -> Adapter:
    generator = torch.Generator().manual_seed(3)
    entries, tensors = [], []
    for block in blocks:
        entries.append(Lora(block=block, module="self_attn.q_proj", scaling=0.5, dropout=dropout))
        tensors += [torch.randn(shape, generator=generator) for shape in ((2, HIDDEN_SIZE), (HIDDEN_SIZE, 2))]
    return Adapter.of(tuple(entries), tensors)


def past(engine: Engine, num_tokens: int = 3) -> Named:
    generator = torch.Generator().manual_seed(4)
    names = [name for layer in engine.model.stack.layers_of(engine.model.span) for name in names_of(layer)]
    return {name: torch.randn(2, 2, num_tokens, 8, generator=generator) for name in names}


def case(engine: Engine, kind: str) -> tuple[RequestTensors, OwnerArguments]:
    inputs = hidden(2, 5)
    changes: dict[str, Any] = {"use_cache": False, "with_grad": True}
    grads = {"hidden_states": hidden(2, 5, seed=1)}
    begins_with: Named = {}
    if kind == "padding":
        changes["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        changes["position_ids"] = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    elif kind == "autocast":
        changes["autocast"] = torch.bfloat16
    elif kind in ("adapter", "dropout"):
        changes |= {"adapter": adapter(engine.model.span, dropout=0.3 if kind == "dropout" else 0.0), "seed": 5}
    elif kind == "past":
        begins_with = past(engine)
    elif kind == "record":
        changes["record"] = ("hidden_states",)
        grads["record.hidden_states.2"] = hidden(2, 5, seed=2)
    return given(inputs, grads=grads, past=begins_with), owner_call(inputs, **changes)


every_kind = pytest.mark.parametrize("kind", ["plain", "padding", "autocast", "adapter", "dropout", "past", "record"])


def assert_same(found: Named, expected: Named) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(tensor.abs().max() > 0 for tensor in expected.values())


def kept(engine: Engine, blocks: Span, tensors: RequestTensors, arguments: OwnerArguments) -> tuple[Named, Graph]:
    graphs: list[Graph] = []
    outputs = engine.forward(blocks, tensors, arguments, graphs.append)
    assert len(graphs) == 1
    return outputs, graphs[0]


# -------------------------------------------------------------------------------- kept


@every_kind
def test_kept_graph_gives_what_is_recomputed(whole_engine: Engine, kind: str) -> None:
    tensors, arguments = case(whole_engine, kind)
    outputs, graph = kept(whole_engine, WHOLE, tensors, arguments)
    assert_same(outputs, whole_engine.forward(WHOLE, tensors, arguments))
    assert not any(tensor.requires_grad for tensor in outputs.values())
    assert (graph.blocks, graph.num_tokens) == (WHOLE, 10)
    assert_same(whole_engine.backward_kept(graph, tensors.grads), whole_engine.backward(WHOLE, tensors, arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_graph_of_every_kind_of_stack_gives_what_is_recomputed(family: str) -> None:
    engine = engine_of(family)
    entry = Caller(None, engine).entry()  # type: ignore[arg-type]  # that peer is not asked
    grad = torch.randn(entry["hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    tensors = RequestTensors(inputs=entry, grads={"hidden_states": grad})
    arguments = OwnerArguments(rows=ROWS, num_tokens=TOKENS, use_cache=False, with_grad=True)
    whole = engine.model.span
    _, graph = kept(engine, whole, tensors, arguments)
    assert_same(engine.backward_kept(graph, tensors.grads), engine.backward(whole, tensors, arguments))


def test_graphs_with_and_without_adapter_do_not_disturb_each_other(whole_engine: Engine) -> None:
    """Weights require gradients in one of them, and do not in the other; neither computes any of theirs."""
    cases = [case(whole_engine, kind) for kind in ("plain", "dropout", "plain", "adapter")]
    expected = [whole_engine.backward(WHOLE, tensors, arguments) for tensors, arguments in cases]
    graphs = [kept(whole_engine, WHOLE, tensors, arguments)[1] for tensors, arguments in cases]
    for number in (1, 0, 3, 2):
        assert_same(whole_engine.backward_kept(graphs[number], cases[number][0].grads), expected[number])
    weights = [weight for block in whole_engine.model.blocks.values() for weight in block.parameters()]
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_no_product_is_computed_for_a_weight(whole_engine: Engine, kind: str) -> None:
    tensors, arguments = case(whole_engine, kind)
    _, graph = kept(whole_engine, WHOLE, tensors, arguments)
    with torch.profiler.profile(record_shapes=True) as profile:
        whole_engine.backward_kept(graph, tensors.grads)
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert products
    largest = 2 * HIDDEN_SIZE if kind == "adapter" else 0  # an adapter's own tensors are of rank 2
    sizes = [event.input_shapes for event in products]
    for left, right in sizes:  # of a weight: [out, tokens] x [tokens, in]
        assert left[1] != 10 or left[0] * right[1] <= largest


def test_forward_that_needs_no_gradient_keeps_nothing(whole_engine: Engine) -> None:
    graphs: list[Graph] = []
    whole_engine.forward(WHOLE, given(hidden(1, 2)), owner_call(hidden(1, 2)), graphs.append)
    assert graphs == []


@every_kind
def test_bytes_are_those_that_stay_in_memory(whole_engine: Engine, kind: str) -> None:
    tensors, arguments = case(whole_engine, kind)
    kept(whole_engine, WHOLE, tensors, arguments)  # rotary tables and the like are there now
    with _Peak() as memory:
        _, graph = kept(whole_engine, WHOLE, tensors, arguments)
    gc.collect()
    held = memory.now_bytes
    assert 0.9 * held <= graph.num_bytes <= 1.1 * held + 4096, (graph.num_bytes, held)


# -------------------------------------------------------------------------------- no room


@every_kind
@pytest.mark.parametrize("make_error", [no_room, no_room_on_the_cpu])
def test_backward_without_room_goes_block_by_block(
    whole_engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str, make_error: Callable[[], Exception]
) -> None:
    tensors, arguments = case(whole_engine, kind)
    expected = whole_engine.backward(WHOLE, tensors, arguments)
    full = Full(monkeypatch, make_error, times=99)
    found = whole_engine.backward(WHOLE, tensors, arguments)
    assert full.num_failed == 1
    if kind == "record":  # three gradients meet between two blocks, and are added in another order
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["grad.hidden_states"], expected["grad.hidden_states"], rtol=1e-5, atol=1e-5)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_stack_goes_block_by_block(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(family)
    entry = Caller(None, engine).entry()  # type: ignore[arg-type]  # that peer is not asked
    grad = torch.randn(entry["hidden_states"].shape, generator=torch.Generator().manual_seed(1))
    tensors = RequestTensors(inputs=entry, grads={"hidden_states": grad})
    arguments = OwnerArguments(rows=ROWS, num_tokens=TOKENS, use_cache=False, with_grad=True)
    expected = engine.backward(engine.model.span, tensors, arguments)
    full = Full(monkeypatch, no_room)
    found = engine.backward(engine.model.span, tensors, arguments)
    assert full.num_failed == 1
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # sums over blocks are made in another order
        largest = max(1.0, tensor.abs().max().item())
        assert torch.allclose(found[name], tensor, atol=1e-5 * largest, rtol=0.0), name


def test_forward_without_room_is_done_again_and_keeps_nothing(
    whole_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, arguments = case(whole_engine, "adapter")
    expected = whole_engine.forward(WHOLE, tensors, arguments)
    full = Full(monkeypatch, no_room)
    graphs: list[Graph] = []
    found = whole_engine.forward(WHOLE, tensors, arguments, graphs.append)
    assert (full.num_failed, graphs) == (1, [])
    assert_same(found, expected)


def test_other_errors_are_no_want_of_memory(whole_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, arguments = case(whole_engine, "plain")
    full = Full(monkeypatch, lambda: RuntimeError("a test says so"), times=2)
    with pytest.raises(RuntimeError, match="a test says so"):
        whole_engine.backward(WHOLE, tensors, arguments)
    with pytest.raises(RuntimeError, match="a test says so"):
        whole_engine.forward(WHOLE, tensors, arguments, lambda graph: None)
    assert full.num_failed == 2
    assert not is_out_of_memory(RuntimeError("a test says so"))
