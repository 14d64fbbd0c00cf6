from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from remote_modules.client.call import CallArguments, Mask
from remote_modules.client.history_store import HistoryStore
from remote_modules.client.owner_history import OwnerHistory, StepInputs
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.tensors import TensorSpec

STORE = HistoryStore(memory_bytes=2**40)


def hidden(rows: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, num_tokens, 3, generator=torch.Generator().manual_seed(seed))


def indices(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def call_of(num_tokens: int, *, rows: int = 1, **fields: Any) -> CallArguments:
    return CallArguments(rows=rows, num_tokens=num_tokens, **fields)


def begun(
    owner: OwnerHistory,
    num_tokens: int,
    positions: torch.Tensor | None = None,
    mask: Mask | None = None,
    specs: dict[str, TensorSpec] | None = None,
    **fields: Any,
) -> StepInputs:
    position = sum(step.num_tokens for step in owner.steps)
    call = call_of(num_tokens, position_ids=positions, attention_mask=mask, **fields)
    return owner.begin(position, call, specs or {})


def extended(owner: OwnerHistory, num_tokens: int, *args: Any, **fields: Any) -> OwnerHistory:
    owner.commit(begun(owner, num_tokens, *args, **fields))
    return owner


def positions_of(owner: OwnerHistory) -> list[list[int]] | None:
    found = owner.positions
    values: list[list[int]] | None = None if found is None else found.read()["position_ids"].tolist()
    return values


def mask_of(owner: OwnerHistory) -> list[list[int]] | None:
    return None if owner.attention_mask is None else owner.attention_mask.tolist()


def test_nothing_given_nothing_is_kept() -> None:
    owner = extended(OwnerHistory(STORE), 3)
    assert (owner.positions, owner.attention_mask) == (None, None)
    assert begun(owner, 1).tensors(3, 4, ()) == {}


def test_positions_given_late_follow_the_usual_ones() -> None:
    owner = extended(extended(OwnerHistory(STORE), 2), 2, torch.tensor([[7, 8], [9, 10]]))
    assert positions_of(owner) == [[0, 1, 7, 8], [0, 1, 9, 10]]


def test_positions_no_longer_given_follow_the_token_count() -> None:
    owner = extended(extended(OwnerHistory(STORE), 2, torch.tensor([[5, 6]])), 2)
    assert positions_of(owner) == [[5, 6, 2, 3]]


def test_positions_of_several_kinds_are_kept_apart() -> None:
    first = torch.arange(12).view(3, 2, 2)  # [kinds, B, T]
    owner = extended(extended(OwnerHistory(STORE), 2, first), 1)
    assert positions_of(owner) == torch.cat([first, torch.full((3, 2, 1), 2)], dim=-1).tolist()
    owner.select(indices(1))
    assert positions_of(owner) == torch.cat([first[:, 1:], torch.full((3, 1, 1), 2)], dim=-1).tolist()


def test_step_leaves_the_inputs_before_it_unchanged() -> None:
    owner = extended(OwnerHistory(STORE), 1, torch.tensor([[4]]), torch.ones(1, 1))
    begun(owner, 1, torch.tensor([[5]]), torch.ones(1, 2))
    assert positions_of(owner) == [[4]]
    assert mask_of(owner) == [[1]]
    assert len(owner.steps) == 1


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_mask_without_a_column_for_each_token_is_refused(columns: int) -> None:
    owner = extended(OwnerHistory(STORE), 2)
    with pytest.raises(UnsupportedCallError, match=rf"^attention_mask must have 3 columns, got {columns}$"):
        begun(owner, 1, None, torch.ones(1, columns))


@pytest.mark.parametrize("shape", [(2,), (1, 1), (2, 3), (1, 1, 1, 2)], ids=str)
def test_positions_that_are_not_one_for_each_token_are_refused(shape: tuple[int, ...]) -> None:
    positions = torch.zeros(shape, dtype=torch.int64)
    text = f"position_ids must be [B, 2] or [1, 2], got {list(shape)}"
    with pytest.raises(UnsupportedCallError, match=f"^{re.escape(text)}$"):
        begun(OwnerHistory(STORE), 2, positions)


def test_mask_missing_after_it_was_given_is_refused() -> None:
    owner = extended(OwnerHistory(STORE), 2, None, torch.ones(1, 2))
    with pytest.raises(UnsupportedCallError, match="give it in every step$"):
        begun(owner, 1)


def test_side_input_missing_after_it_was_given_is_refused() -> None:
    owner = extended(OwnerHistory(STORE), 2, tensors={"token_type_ids": torch.zeros(1, 2, dtype=torch.int64)})
    with pytest.raises(UnsupportedCallError, match=r"^'owner\.token_type_ids' must be given in every step"):
        begun(owner, 1)


def test_whole_mask_of_the_last_step_is_kept() -> None:
    mask = torch.tensor([[0, 1, 1]])
    owner = extended(extended(OwnerHistory(STORE), 2), 1, None, mask)
    assert owner.attention_mask is mask


@pytest.mark.parametrize("length", [1, 2])
def test_crop_cuts_columns(length: int) -> None:
    owner = extended(OwnerHistory(STORE), 3, torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1, 1]]))
    owner.crop(length)
    assert positions_of(owner) == [[4, 5, 6][:length]]
    assert mask_of(owner) == [[0, 1, 1][:length]]
    assert [step.num_tokens for step in owner.steps] == [length]


def test_crop_to_nothing_forgets_that_anything_was_given() -> None:
    given = {"token_type_ids": torch.zeros(1, 3, dtype=torch.int64)}
    owner = extended(OwnerHistory(STORE), 3, torch.tensor([[4, 5, 6]]), torch.tensor([[0, 1, 1]]), tensors=given)
    owner.crop(0)
    assert (owner.positions, owner.attention_mask, owner.steps) == (None, None, [])
    assert begun(owner, 1).tensors(0, 1, ()) == {}
    OwnerHistory(STORE).crop(0)


def test_select_takes_rows_but_keeps_positions_that_all_share() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    shared = extended(OwnerHistory(STORE), 2, torch.tensor([[4, 5]]), mask)
    shared.select(indices(1, 1, 0))
    assert positions_of(shared) == [[4, 5]]
    assert mask_of(shared) == [[1, 1], [1, 1], [0, 1]]
    single = extended(OwnerHistory(STORE), 2, torch.tensor([[4, 5], [6, 7]]))
    single.select(indices(1, 0))
    assert positions_of(single) == [[6, 7], [4, 5]]
    assert single.attention_mask is None


def test_copy_of_owner_inputs_goes_its_own_way() -> None:
    owner = extended(OwnerHistory(STORE), 2, torch.tensor([[4, 5]]), torch.ones(1, 2))
    copy = owner.copy()
    owner.crop(0)
    assert positions_of(copy) == [[4, 5]]
    assert mask_of(copy) == [[1, 1]]
    assert [step.num_tokens for step in copy.steps] == [2]


# -------------------------------------------------------------------------------- what a request brings


SIDES = {"side.a": TensorSpec(("B", "T", "?")), "side.b": TensorSpec(("B", "T"), is_float=False)}


def sides_of(rows: int, num_tokens: int, seed: int) -> dict[str, torch.Tensor]:
    return {"side.a": hidden(rows, num_tokens, seed), "side.b": torch.arange(seed, seed + num_tokens).expand(rows, -1)}


def test_request_brings_the_side_inputs_of_its_hop_for_its_tokens() -> None:
    first, second = sides_of(1, 3, seed=1), sides_of(1, 2, seed=7)
    owner = extended(OwnerHistory(STORE), 3, sides=first, specs=SIDES)
    step = begun(owner, 2, sides=second, specs=SIDES)
    assert step.tensors(3, 5, {"side.b"}).keys() == {"side.b"}
    assert torch.equal(step.tensors(3, 5, SIDES)["side.a"], second["side.a"])
    assert torch.equal(step.tensors(0, 2, SIDES)["side.a"], first["side.a"][:, :2])
    both = step.tensors(1, 4, SIDES)
    assert torch.equal(both["side.a"], torch.cat([first["side.a"][:, 1:], second["side.a"][:, :1]], dim=1))
    assert both["side.b"].tolist() == [[2, 3, 7]]


def test_request_brings_tensors_of_the_owner_for_its_tokens_and_constants_whole() -> None:
    constant = torch.rand(2, 5)
    types = torch.tensor([[0, 1, 1]])
    owner = extended(OwnerHistory(STORE), 3, tensors={"token_type_ids": types, "table": constant})
    step = begun(owner, 1, tensors={"token_type_ids": torch.tensor([[4]]), "table": constant})
    tensors = step.tensors(1, 4, ())
    assert tensors["owner.token_type_ids"].tolist() == [[1, 1, 4]]
    assert tensors["owner.table"] is constant


def test_request_for_some_of_the_new_tokens_brings_what_is_theirs() -> None:
    old, new = sides_of(1, 2, seed=1), sides_of(1, 5, seed=7)
    owner = extended(OwnerHistory(STORE), 2, torch.tensor([[0, 1]]), sides=old, specs=SIDES)
    step = begun(owner, 5, torch.tensor([[4, 5, 6, 7, 8]]), sides=new, specs=SIDES)
    tensors = step.tensors(3, 6, SIDES)
    assert tensors["position_ids"].tolist() == [[5, 6, 7]]
    assert torch.equal(tensors["side.a"], new["side.a"][:, 1:4])


def test_prompt_in_chunks_is_kept_as_its_chunks() -> None:
    step = begun(OwnerHistory(STORE), 5)
    step.cuts = (2, 4, 5)
    assert step.chunks(0, 512, is_exact=False, is_apart=False) == [(0, 2), (2, 4), (4, 5)]
    owner = OwnerHistory(STORE)
    owner.commit(step)
    assert owner.step_ends(after=0) == [2, 4, 5]


def test_request_across_old_and_new_tokens_brings_positions_of_both() -> None:
    owner = extended(OwnerHistory(STORE), 2, torch.tensor([[5, 6]]))
    assert begun(owner, 2, torch.tensor([[8, 9]])).tensors(1, 3, ())["position_ids"].tolist() == [[6, 8]]
    assert begun(owner, 2).tensors(0, 4, ())["position_ids"].tolist() == [[5, 6, 2, 3]]
    late = begun(extended(OwnerHistory(STORE), 2), 1, torch.tensor([[9]]))
    assert late.tensors(0, 3, ())["position_ids"].tolist() == [[0, 1, 9]]


@pytest.mark.parametrize(
    ("behind", "flags", "chunks"),
    [
        (0, (False, False), [(5, 7)]),
        (5, (False, False), [(0, 4), (4, 7)]),
        (5, (False, True), [(0, 4), (4, 5), (5, 7)]),
        (5, (True, False), [(0, 3), (3, 4), (4, 5), (5, 7)]),
    ],
    ids=["nothing-behind", "merged", "new-ones-apart", "same-steps"],
)
def test_replay_is_divided_as_its_exactness_asks(
    behind: int, flags: tuple[bool, bool], chunks: list[tuple[int, int]]
) -> None:
    owner = OwnerHistory(STORE)
    for num_tokens in (3, 1, 1):
        extended(owner, num_tokens)
    step = begun(owner, 2)
    assert step.chunks(behind, 4, is_exact=flags[0], is_apart=flags[1]) == chunks


def test_masks_of_their_own_make_the_same_steps_again() -> None:
    prefill, decode = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 1, 4)
    owner = extended(OwnerHistory(STORE), 3, None, prefill)
    assert owner.has_step_masks
    step = begun(owner, 1, None, decode)
    assert step.chunks(3, 100, is_exact=False, is_apart=False) == [(0, 3), (3, 4)]
    assert torch.equal(step.tensors(0, 3, ())["attention_mask"], prefill)
    assert torch.equal(step.tensors(3, 4, ())["attention_mask"], decode)


def test_masks_of_their_own_are_cut_and_selected_with_the_tokens() -> None:
    prefill, decode = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 1, 4)
    owner = extended(extended(OwnerHistory(STORE), 3, None, prefill), 1, None, decode)
    owner.select(indices(1, 0))
    owner.crop(2)
    (step,) = owner.steps
    assert step.num_tokens == 2
    assert torch.equal(step.masks["attention_mask"], prefill[[1, 0]][:, :, :2, :2])


def test_masks_by_layer_type_are_kept_by_name_and_none_stays_none() -> None:
    full = torch.rand(2, 1, 2, 2)
    owner = extended(OwnerHistory(STORE), 2, None, {"full_attention": full, "sliding_attention": None})
    owner.select(indices(1, 1, 0))
    (step,) = owner.steps
    assert torch.equal(step.masks["attention_mask.full_attention"], full[[1, 1, 0]])
    assert step.masks["attention_mask.sliding_attention"].numel() == 0


def test_mask_of_a_static_cache_is_cut_to_the_tokens_there_are() -> None:
    whole = torch.rand(1, 1, 2, 16)
    step = begun(OwnerHistory(STORE), 2, None, whole)
    assert torch.equal(step.masks["attention_mask"], whole[..., :2])


def test_rows_keep_their_adapters() -> None:
    """They go with their rows, and another assignment is refused until all is forgotten."""
    owner = extended(OwnerHistory(STORE), 3, rows=2, row_names=("a", "b"))
    owner.select(indices(1, 1, 0))
    fork = owner.copy()
    assert fork.row_names == owner.row_names == ("b", "b", "a")
    for names in ((), ("b", "b", "b")):
        with pytest.raises(UnsupportedCallError, match="adapter_names of this KV cache were b, b, a, got"):
            begun(owner, 1, rows=3, row_names=names)
    begun(owner, 1, rows=3, row_names=("b", "b", "a"))
    owner.crop(0)
    assert begun(owner, 1, rows=1).call.row_names == ()
