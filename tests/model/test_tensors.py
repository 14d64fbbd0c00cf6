from __future__ import annotations

import pytest
import torch

from remote_modules.model.tensors import TensorSpec, concat, num_bytes, owner_spec, select_rows, slice_tokens

HIDDEN = TensorSpec(("B", "T", "1H"))
STREAMS = TensorSpec(("2", "B", "T", "1H"))
TIME_FIRST = TensorSpec(("T", "B", "1H"))
CONSTANT = TensorSpec(("?", "?"))
SPECS = {"hidden": (HIDDEN, (3, 5, 8)), "streams": (STREAMS, (2, 3, 5, 8)), "time-first": (TIME_FIRST, (5, 3, 8))}


def counted(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize(("spec", "shape"), SPECS.values(), ids=SPECS.keys())
def test_shape_is_that_of_rows_and_tokens(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    assert spec.shape(3, 5, 8) == shape
    assert (shape[spec.batch or 0], shape[spec.time or 0]) == (3, 5)
    assert spec.fits(torch.zeros(shape), 3, 5, 8)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 5),
        torch.zeros(3, 5, 8, 1),
        torch.zeros(2, 5, 8),
        torch.zeros(3, 4, 8),
        torch.zeros(3, 5, 16),
        torch.zeros(3, 5, 8, dtype=torch.int64),
    ],
    ids=["flat", "deep", "rows", "tokens", "width", "integers"],
)
def test_other_tensors_do_not_fit(tensor: torch.Tensor) -> None:
    assert not HIDDEN.fits(tensor, 3, 5, 8)


def test_empty_tensor_never_fits() -> None:
    assert not CONSTANT.fits(torch.zeros(0, 3), 1, 1, 8)


def test_open_sizes_take_any() -> None:
    spec = TensorSpec(("B", "T", "?"), is_float=False)
    for width in (1, 7):
        assert spec.fits(torch.zeros(3, 5, width, dtype=torch.int64), 3, 5, 8)
    assert spec.shape(3, 5, 8) == (3, 5, -1)


def test_loose_spec_asks_only_for_rows_and_tokens() -> None:
    loose = TensorSpec(("B", "T", "2H"), is_exact=False)
    assert loose.fits(torch.zeros(3, 5, 17), 3, 5, 8)
    assert not loose.fits(torch.zeros(3, 4, 16), 3, 5, 8)
    assert not TensorSpec(("B", "T", "2H")).fits(torch.zeros(3, 5, 17), 3, 5, 8)


def test_text_says_what_is_expected() -> None:
    assert TensorSpec(("2", "B", "T", "4H", "?")).text(64) == "[2, B, T, 256, ?]"


def test_sizes_of_the_owners_arguments_are_told_by_the_number_of_tokens() -> None:
    assert owner_spec(torch.zeros(3, 5, dtype=torch.int64), 5) == TensorSpec(("B", "T"), is_float=False)
    assert owner_spec(torch.zeros(4, 3, 5), 5) == TensorSpec(("4", "B", "T"))
    assert owner_spec(torch.zeros(3, 7), 5) == CONSTANT
    assert owner_spec(torch.zeros(5), 5) == TensorSpec(("?",))


@pytest.mark.parametrize(("spec", "shape"), SPECS.values(), ids=SPECS.keys())
def test_tokens_are_cut_and_joined_again(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    tensor = counted(shape)
    parts = [slice_tokens(tensor, spec, start, end) for start, end in [(0, 2), (2, 3), (3, None)]]
    assert [part.shape[spec.time or 0] for part in parts] == [2, 1, 2]
    assert torch.equal(concat(parts, spec), tensor)


def test_tensor_without_tokens_is_the_same_for_all() -> None:
    first, last = counted((2, 4)), counted((2, 4)) + 1
    assert slice_tokens(first, CONSTANT, 1, 2) is first
    assert concat([first, last], CONSTANT) is last
    assert select_rows(first, CONSTANT, torch.tensor([1])) is first


@pytest.mark.parametrize(("spec", "shape"), SPECS.values(), ids=SPECS.keys())
def test_rows_are_selected_where_they_are(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    tensor, rows = counted(shape), torch.tensor([2, 0])
    assert spec.batch is not None
    selected = select_rows(tensor, spec, rows)
    assert torch.equal(selected.movedim(spec.batch, 0), tensor.movedim(spec.batch, 0)[rows])


def test_one_row_for_all_is_expanded_and_never_selected_from() -> None:
    spec = TensorSpec(("B", "T"), is_float=False)
    one, three = torch.tensor([[0, 1]]), torch.tensor([[2], [3], [4]])
    assert select_rows(one, spec, torch.tensor([2, 1])) is one
    assert concat([one, three], spec).tolist() == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert select_rows(one, spec, torch.tensor([0, 0])).shape == (2, 2)


def test_bytes_are_those_of_all_tensors() -> None:
    assert num_bytes({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}) == 24 + 32
