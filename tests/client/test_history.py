from __future__ import annotations

import re
from random import Random

import pytest
import torch

from remote_modules.client.history import History, SideInputs
from remote_modules.errors import UnsupportedCallError

WIDTH = 3


def hidden(rows: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def indices(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


# -------------------------------------------------------------------------------- inputs of one boundary


def test_new_history_is_empty() -> None:
    history = History()
    assert len(history) == 0
    assert history.num_bytes() == 0


def test_appended_steps_are_read_in_order() -> None:
    history = History([hidden(2, 3, seed=1)])
    history.append(hidden(2, 1, seed=2))
    assert len(history) == 4
    assert torch.equal(history.read(), torch.cat([hidden(2, 3, seed=1), hidden(2, 1, seed=2)], dim=1))
    assert torch.equal(history.read(), history.read())


def test_history_of_one_chunk_is_read_without_a_copy() -> None:
    chunk = hidden(2, 3)
    assert History([chunk]).read() is chunk


@pytest.mark.parametrize("length", range(8))
def test_crop_keeps_the_first_tokens(length: int) -> None:
    chunks = [hidden(2, 3, seed=1), hidden(2, 1, seed=2), hidden(2, 2, seed=3)]
    history = History(chunks)
    history.crop(length)
    assert len(history) == min(length, 6)
    if length:
        assert torch.equal(history.read(), torch.cat(chunks, dim=1)[:, :length])


def test_history_cropped_to_nothing_takes_another_batch_size() -> None:
    history = History([hidden(2, 3)])
    history.select(indices(1, 0))
    history.crop(0)
    assert (len(history), history.num_bytes()) == (0, 0)
    history.append(hidden(1, 2))
    assert torch.equal(history.read(), hidden(1, 2))


@pytest.mark.parametrize("rows", [(1, 0), (0, 0), (1,), (0, 0, 1, 1)], ids=["reorder", "repeat-one", "drop", "repeat"])
def test_select_changes_the_rows_of_what_came_before_only(rows: tuple[int, ...]) -> None:
    history = History([hidden(2, 3, seed=1)])
    history.select(indices(*rows))
    history.append(hidden(len(rows), 1, seed=2))
    assert torch.equal(
        history.read(), torch.cat([hidden(2, 3, seed=1)[list(rows)], hidden(len(rows), 1, seed=2)], dim=1)
    )


def test_select_of_an_empty_history_changes_nothing() -> None:
    history = History()
    history.select(indices(5))
    history.append(hidden(2, 1))
    assert torch.equal(history.read(), hidden(2, 1))


def test_copy_goes_its_own_way() -> None:
    history = History([hidden(2, 3)])
    copy = history.copy()
    copy.select(indices(1, 0))
    copy.append(hidden(2, 1, seed=1))
    history.crop(2)
    assert torch.equal(history.read(), hidden(2, 3)[:, :2])
    assert torch.equal(copy.read(), torch.cat([hidden(2, 3)[[1, 0]], hidden(2, 1, seed=1)], dim=1))


def test_selections_cost_no_copy_until_read() -> None:
    history = History([hidden(2, 100)])
    for _ in range(50):
        history.select(indices(1, 0))
    assert history.num_bytes() == 2 * 100 * WIDTH * 4
    assert torch.equal(history.read(), hidden(2, 100))


@pytest.mark.parametrize("seed", range(30))
def test_random_operations_agree_with_a_plain_tensor(seed: int) -> None:
    rng = Random(seed)
    history = History()
    twin = torch.empty(2, 0, WIDTH)
    for number in range(30):
        match rng.choice(["append", "append", "crop", "select", "read", "copy"]):
            case "append":
                new = hidden(len(twin), rng.randint(1, 3), seed=number)
                history.append(new)
                twin = torch.cat([twin, new], dim=1)
            case "crop":
                length = rng.randint(0, twin.shape[1] + 1)
                history.crop(length)
                twin = twin[:, :length]
            case "select" if twin.shape[1]:
                rows = [rng.randrange(len(twin)) for _ in range(rng.randint(1, 4))]
                history.select(indices(*rows))
                twin = twin[rows]
            case "copy":
                history = history.copy()
        assert len(history) == twin.shape[1]
        if rng.random() < 0.3 and len(history):
            assert torch.equal(history.read(), twin)
    if len(history):
        assert torch.equal(history.read(), twin)


# -------------------------------------------------------------------------------- positions and mask


def test_nothing_given_nothing_is_kept() -> None:
    sides = SideInputs().extended(0, 3, None, None)
    assert (sides.position_ids, sides.attention_mask) == (None, None)


def test_positions_given_late_follow_the_usual_ones() -> None:
    sides = SideInputs().extended(0, 2, None, None).extended(2, 2, torch.tensor([[7, 8], [9, 10]]), None)
    assert sides.position_ids is not None
    assert sides.position_ids.tolist() == [[0, 1, 7, 8], [0, 1, 9, 10]]


def test_positions_no_longer_given_follow_the_token_count() -> None:
    sides = SideInputs().extended(0, 2, torch.tensor([[5, 6]]), None).extended(2, 2, None, None)
    assert sides.position_ids is not None
    assert sides.position_ids.tolist() == [[5, 6, 2, 3]]


def test_step_leaves_the_inputs_before_it_unchanged() -> None:
    before = SideInputs().extended(0, 1, torch.tensor([[4]]), torch.ones(1, 1))
    before.extended(1, 1, torch.tensor([[5]]), torch.ones(1, 2))
    assert before.position_ids is not None
    assert before.position_ids.tolist() == [[4]]
    assert before.attention_mask is not None
    assert before.attention_mask.shape == (1, 1)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_mask_without_a_column_for_each_token_is_refused(columns: int) -> None:
    sides = SideInputs().extended(0, 2, None, None)
    with pytest.raises(UnsupportedCallError, match=rf"^attention_mask must have 3 columns, got {columns}$"):
        sides.extended(2, 1, None, torch.ones(1, columns))


@pytest.mark.parametrize("shape", [(2,), (1, 1), (2, 3), (1, 2, 1)], ids=str)
def test_positions_that_are_not_one_for_each_token_are_refused(shape: tuple[int, ...]) -> None:
    positions = torch.zeros(shape, dtype=torch.int64)
    text = f"position_ids must be [B, 2] or [1, 2], got {list(shape)}"
    with pytest.raises(UnsupportedCallError, match=f"^{re.escape(text)}$"):
        SideInputs().extended(0, 2, positions, None)


def test_mask_missing_after_it_was_given_is_refused() -> None:
    sides = SideInputs().extended(0, 2, None, torch.ones(1, 2))
    with pytest.raises(UnsupportedCallError, match="give it in every step$"):
        sides.extended(2, 1, None, None)


def test_whole_mask_of_the_last_step_is_kept() -> None:
    mask = torch.tensor([[0, 1, 1]])
    sides = SideInputs().extended(0, 2, None, None).extended(2, 1, None, mask)
    assert sides.attention_mask is mask


@pytest.mark.parametrize("length", [1, 2])
def test_crop_cuts_columns(length: int) -> None:
    sides = SideInputs().extended(0, 3, torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1, 1]]))
    sides.crop(length)
    assert sides.position_ids is not None
    assert sides.position_ids.tolist() == [[4, 5, 6][:length]]
    assert sides.attention_mask is not None
    assert sides.attention_mask.tolist() == [[0, 1, 1][:length]]


def test_crop_to_nothing_forgets_that_anything_was_given() -> None:
    sides = SideInputs().extended(0, 3, torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1, 1]]))
    sides.crop(0)
    assert (sides.position_ids, sides.attention_mask) == (None, None)
    SideInputs().crop(0)


def test_select_takes_rows_but_keeps_positions_that_all_share() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    shared = SideInputs().extended(0, 2, torch.tensor([[4, 5]]), mask)
    shared.select(indices(1, 1, 0))
    assert shared.position_ids is not None
    assert shared.position_ids.tolist() == [[4, 5]]
    assert shared.attention_mask is not None
    assert shared.attention_mask.tolist() == [[1, 1], [1, 1], [0, 1]]
    single = SideInputs().extended(0, 2, torch.tensor([[4, 5], [6, 7]]), None)
    single.select(indices(1, 0))
    assert single.position_ids is not None
    assert single.position_ids.tolist() == [[6, 7], [4, 5]]
    assert single.attention_mask is None


def test_copy_of_side_inputs_goes_its_own_way() -> None:
    sides = SideInputs().extended(0, 2, torch.tensor([[4, 5]]), torch.ones(1, 2))
    copy = sides.copy()
    sides.crop(0)
    assert copy.position_ids is not None
    assert copy.attention_mask is not None
