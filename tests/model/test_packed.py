"""Steps of several sessions as one call: each gets what it gets alone, whatever the lengths, and nothing half done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from model.support import run_span, span_model
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.kv import SpanCache
from remote_modules.model.packed import Member
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.server.captures import capture_steps
from remote_modules.spans import Span

TOLERANCE = 6e-5
# plain, normed queries, other norms, one window, softcaps and mixed windows, sinks and experts, experts, learned
# positions, positions that are not rotary, inputs for each block
PACKED = ["llama", "qwen3", "gemma", "mistral", "gemma2", "gpt_oss", "mixtral", "opt", "gpt2", "gemma3n_text"]
UNPACKED = {"bloom": "keep keys and values by themselves", "mamba": "cannot be packed"}  # and MLA, in some releases
ROWS_AND_LENGTHS = [(1, 1), (2, 4), (1, 17), (1, 70)]  # of the sessions; one beyond the first buffer
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(tmp_path_factory.mktemp(family), family) for family in (*PACKED, *UNPACKED)}


def inputs_of(part: SpanModel, rows: int, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    specs = {"hidden_states": part.stack.hidden, **part.stack.side_specs(part.span), **part.stack.carried}
    shapes = {name: spec.shape(rows, num_tokens, part.hidden_size) for name, spec in specs.items()}
    return {
        name: torch.randn([8 if size == -1 else size for size in shape], generator=generator)
        for name, shape in shapes.items()
    }


def sessions_of(part: SpanModel, sizes: Sequence[tuple[int, int]] = ROWS_AND_LENGTHS) -> list[SpanCache]:
    """Caches of sessions of so many rows and tokens; the same each time."""
    caches = []
    for rows, length in sizes:
        caches.append(part.new_cache())
        inputs = inputs_of(part, rows, length, torch.Generator().manual_seed(length))
        with torch.inference_mode():
            part.run(inputs, part.span, OwnerArguments(rows=rows, num_tokens=length), caches[-1])
    return caches


def rows_of(caches: Sequence[SpanCache]) -> list[int]:
    return [len(cache.held[0].keys) for cache in caches]


def packed_step(part: SpanModel, caches: list[SpanCache], inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    rows, specs = rows_of(caches), {**part.stack.side_specs(part.span), **part.stack.carried}
    specs["hidden_states"] = part.stack.hidden
    positions = [torch.full((num, 1), cache.length) for num, cache in zip(rows, caches, strict=True)]
    arguments = OwnerArguments(rows=sum(rows), num_tokens=1, position_ids=torch.cat(positions), use_cache=False)
    whole = {name: torch.cat([each[name] for each in inputs], dim=specs[name].batch or 0) for name in inputs[0]}
    members = [Member(cache, num) for cache, num in zip(caches, rows, strict=True)]
    with torch.inference_mode():
        output = part.run_packed(whole, part.span, arguments, members)["hidden_states"]
    return list(output.split(rows, dim=part.stack.hidden.batch or 0))


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("span", ["0:2", "2:4"])
def test_each_session_gets_what_it_gets_alone(folders: dict[str, Path], family: str, span: str) -> None:
    part = span_model(folders[family], span)
    alone, packed = sessions_of(part), sessions_of(part)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        inputs = [inputs_of(part, rows, 1, generator) for rows, _ in ROWS_AND_LENGTHS]
        expected = []
        for (rows, _), cache, given in zip(ROWS_AND_LENGTHS, alone, inputs, strict=True):
            with torch.inference_mode():
                outputs = part.run(given, part.span, OwnerArguments(rows=rows, num_tokens=1), cache)
            expected.append(outputs["hidden_states"])
        for found, wanted in zip(packed_step(part, packed, inputs), expected, strict=True):
            assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert [cache.length for cache in packed] == [length + STEPS for _, length in ROWS_AND_LENGTHS]


def states_of(caches: Sequence[SpanCache]) -> list[torch.Tensor]:
    return [states.clone() for cache in caches for layer in cache.held for states in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", UNPACKED)
def test_families_that_cannot_are_refused_and_caches_stay(folders: dict[str, Path], family: str) -> None:
    part = span_model(folders[family], "1:3")
    caches = sessions_of(part, [(1, 3), (1, 5)])
    inputs = inputs_of(part, 2, 1, torch.Generator().manual_seed(0))
    arguments = OwnerArguments(rows=2, num_tokens=1, position_ids=torch.tensor([[3], [5]]), use_cache=False)
    members = [Member(cache, 1) for cache in caches]
    with torch.inference_mode(), pytest.raises((UnsupportedCallError, RuntimeError), match=UNPACKED[family]):
        part.run_packed(inputs, part.span, arguments, members)
    assert [cache.length for cache in caches] == [3, 5]
    assert_goes_on_as_before(part, caches, [(1, 3), (1, 5)])


def assert_goes_on_as_before(part: SpanModel, caches: list[SpanCache], sizes: list[tuple[int, int]]) -> None:
    """Steps alone give the same as if nothing had been tried."""
    given = torch.randn(1, 1, part.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for cache, untouched in zip(caches, sessions_of(part, sizes), strict=True):
            assert torch.equal(run_span(part, given, cache=cache), run_span(part, given, cache=untouched))


def test_a_fault_within_a_block_leaves_all_caches_as_they_were(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "1:3")
    sizes = [(1, 3), (1, 64)]
    caches = sessions_of(part, sizes)
    before = states_of(caches)
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("of the second block")

    handle = part.blocks[2].register_forward_hook(fail)
    inputs = [inputs_of(part, 1, 1, torch.Generator().manual_seed(2)) for _ in sizes]
    with pytest.raises(RuntimeError, match="^of the second block$"):
        packed_step(part, caches, inputs)
    handle.remove()
    assert calls == [1]
    assert [cache.length for cache in caches] == [3, 64]
    assert all(map(torch.equal, states_of(caches), before))
    assert_goes_on_as_before(part, caches, sizes)


def test_an_empty_cache_is_refused(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "0:2")
    caches = [*sessions_of(part, [(1, 3)]), part.new_cache()]
    arguments = OwnerArguments(rows=2, num_tokens=1, position_ids=torch.tensor([[3], [0]]), use_cache=False)
    with pytest.raises(UnsupportedCallError, match="^these caches, or the attention of this model, cannot be packed$"):
        part.run_packed(
            {"hidden_states": torch.zeros(2, 1, 32)}, Span(0, 2), arguments, [Member(cache, 1) for cache in caches]
        )
    assert [cache.length for cache in caches] == [3, 0]


def test_other_calls_attend_as_before_while_nothing_is_packed(folders: dict[str, Path]) -> None:
    part = span_model(folders["llama"], "0:2")
    named = part.config._attn_implementation
    packed_step(part, caches := sessions_of(part), [inputs_of(part, n, 1, torch.Generator()) for n in rows_of(caches)])
    assert part.config._attn_implementation == named
    assert_goes_on_as_before(part, sessions_of(part, [(1, 5)]), [(1, 5)])


def test_captured_steps_serve_packed_calls_where_positions_follow_the_caches(folders: dict[str, Path]) -> None:
    part, plain = span_model(folders["qwen3"], "1:3"), span_model(folders["qwen3"], "1:3")
    assert capture_steps(part, 1 << 22, capture=lambda step: step)
    calls: list[int] = []
    part._owner.register_forward_pre_hook(lambda *_: calls.append(1))
    sizes = [(1, 3), (2, 70)]
    packed, alone = sessions_of(part, sizes), sessions_of(plain, sizes)
    calls.clear()
    inputs = [inputs_of(part, rows, 1, torch.Generator().manual_seed(rows)) for rows, _ in sizes]
    found = packed_step(part, packed, inputs)
    assert not calls
    for output, given, cache in zip(found, inputs, alone, strict=True):
        with torch.inference_mode():
            expected = run_span(plain, given["hidden_states"], cache=cache)
        assert (output - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert [cache.length for cache in packed] == [4, 71]
    arguments = OwnerArguments(rows=1, num_tokens=1, position_ids=torch.tensor([[9]]), use_cache=False)
    with torch.inference_mode():
        part.run_packed(inputs[0], part.span, arguments, [Member(packed[0], 1)])
    assert calls == [1]  # the owner did it
    assert packed[0].length == 5
