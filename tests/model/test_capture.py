from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.capture import OwnerCall, OwnerCapture, plain_cache, watch_registrations
from remote_modules.model.stack import cache_argument

Body = Callable[[torch.Tensor], torch.Tensor]


class Watcher(nn.ModuleList):
    """Blocks that note the owner's call, as `RemoteSequential` does."""

    def __init__(self, body: Body | None = None) -> None:
        super().__init__()
        self.capture = OwnerCapture()
        self.calls: list[OwnerCall | None] = []
        self.append(Watching(self, body))
        watch_registrations(_registered)

    def __getitem__(self, index: Any) -> Any:  # the owner slices its blocks
        return self if isinstance(index, slice) else super().__getitem__(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watcher:
        copied = Watcher()
        copied.capture = copy.deepcopy(self.capture, memo)
        memo[id(self)] = copied
        return copied


class Watching(nn.Module):
    def __init__(self, watcher: Watcher, body: Body | None) -> None:
        super().__init__()
        object.__setattr__(self, "watcher", watcher)
        self.body = body

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        watcher: Watcher = self.__dict__["watcher"]
        watcher.calls.append(watcher.capture.current)
        return hidden_states if self.body is None else self.body(hidden_states)


def _registered(parent: nn.Module, name: str, child: nn.Module) -> None:
    if isinstance(child, Watcher) and isinstance(parent, PreTrainedModel):
        child.capture.hook(parent)


def watched(body: Body | None = None, **changes: Any) -> tuple[LlamaForCausalLM, Watcher]:
    config = LlamaConfig(**(tiny_config(num_hidden_layers=1).to_dict() | changes))
    model = LlamaForCausalLM(config)
    model.eval()
    model.model.layers = Watcher(body)
    return model, model.model.layers


def ids(tokens: int = 3) -> torch.Tensor:
    return torch.ones(2, tokens, dtype=torch.int64)


def only_call(watcher: Watcher) -> OwnerCall:
    (call,) = watcher.calls
    assert call is not None
    return call


# What is captured


def test_plain_assignment_captures_the_owners_call() -> None:
    model, watcher = watched()
    mask, positions = torch.ones(2, 3), torch.tensor([[0, 1, 2]])
    model(ids(), attention_mask=mask, position_ids=positions, use_cache=False)
    call = only_call(watcher)
    assert call.attention_mask is mask
    assert call.position_ids is positions
    assert call.cache is None
    assert not call.use_cache


def test_absent_arguments_are_none_and_use_cache_is_the_configs() -> None:
    model, watcher = watched()
    model(ids())
    call = only_call(watcher)
    assert (call.attention_mask, call.position_ids, call.cache, call.use_cache) == (None, None, None, True)
    model.config.use_cache = False
    model(ids())
    last = watcher.calls[-1]
    assert last is not None
    assert not last.use_cache


def test_cache_that_the_caller_made_is_captured() -> None:
    model, watcher = watched()
    cache = DynamicCache()
    model(ids(), **{str(cache_argument(model)): cache})
    assert only_call(watcher).cache is cache


def test_shape_is_that_of_the_inputs_whether_tokens_or_embeddings() -> None:
    model, watcher = watched()
    model(ids(4))
    model(inputs_embeds=torch.zeros(1, 5, 32))
    assert [(call.rows, call.num_tokens) for call in watcher.calls if call is not None] == [(2, 4), (1, 5)]


def test_ready_mask_is_captured() -> None:
    model, watcher = watched()
    ready = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    model.model(ids(), attention_mask=ready)
    assert only_call(watcher).attention_mask is ready


def test_masks_by_type_of_layer_are_captured() -> None:
    class Owner(nn.Module):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> None:
            seen.append(capture.current)

    seen: list[Any] = []
    owner, capture = Owner(), OwnerCapture()
    capture.hook(owner)
    ready = torch.ones(2, 1, 3, 3)
    owner(ids(), attention_mask={"full_attention": ready, "sliding_attention": None})
    assert seen[0].attention_mask == {"full_attention": ready, "sliding_attention": None}


def test_cache_where_none_is_carried_is_refused_with_the_reason() -> None:
    model, _ = watched()
    capture = OwnerCapture("caches of such models are not carried")
    capture.hook(model.model)
    model(ids(), use_cache=False)
    with pytest.raises(UnsupportedCallError, match=r"^caches of such models are not carried$"):
        model(ids(), **{str(cache_argument(model)): DynamicCache()})
    assert copy.deepcopy(capture).no_cache == capture.no_cache
    assert capture.current is None


def test_further_arguments_are_captured_by_name() -> None:
    model, watcher = watched()
    types = torch.zeros(2, 3)
    model.model(ids(), token_type_ids=types, scale=2.0, is_on=True, kind="a", nothing=None)
    call = only_call(watcher)
    assert call.tensors.keys() == {"token_type_ids"}
    assert call.tensors["token_type_ids"] is types
    assert call.options == {"scale": 2.0, "is_on": True, "kind": "a"}


def test_arguments_about_what_the_owner_returns_stay_here() -> None:
    model, watcher = watched()
    model.model(ids(), return_dict=True, output_attentions=False, output_hidden_states=False)
    assert (only_call(watcher).options, only_call(watcher).record) == ({}, ())


@pytest.mark.parametrize("is_of_config", [False, True], ids=["argument", "config"])
def test_outputs_to_record_are_those_asked_for(is_of_config: bool) -> None:
    model, watcher = watched()
    if is_of_config:
        model.config.output_hidden_states = True
        model.model(ids())
        model.model(ids(), output_hidden_states=False)
        assert [call.record for call in watcher.calls if call is not None] == [("hidden_states",), ()]
    else:
        model.model(ids(), output_hidden_states=True, output_router_logits=True)
        assert only_call(watcher).record == ("hidden_states", "router_logits")


def test_cache_of_an_encoder_decoder_is_that_of_the_decoder_itself() -> None:
    own = DynamicCache()
    assert plain_cache(EncoderDecoderCache(own, DynamicCache())) is own
    assert plain_cache(own) is own
    assert plain_cache(None) is None


def test_hook_is_removed_by_its_handles() -> None:
    model, _ = watched()
    capture, before = OwnerCapture(), len(model.model._forward_pre_hooks)
    handles = capture.hook(model.model)
    assert len(model.model._forward_pre_hooks) == before + 1
    assert capture.hook(model.model) == []
    for handle in handles:
        handle.remove()
    assert len(model.model._forward_pre_hooks) == before


def test_owner_called_by_itself_is_captured_too() -> None:
    model, watcher = watched()
    mask = torch.ones(2, 3)
    model.model(ids(), mask)
    assert only_call(watcher).attention_mask is mask


def test_no_call_is_current_outside_of_one() -> None:
    model, watcher = watched()
    assert watcher.capture.current is None
    model(ids())
    assert watcher.capture.current is None
    assert watcher[0](torch.zeros(1, 1, 32)).shape == (1, 1, 32)
    assert watcher.calls[-1] is None


def test_assigning_twice_captures_once() -> None:
    model, watcher = watched()
    model.model.layers = watcher
    model.model.layers = watcher
    assert len(model.model._forward_pre_hooks) == 1
    model(ids())
    assert watcher.capture.current is None


def test_deepcopy_of_the_model_captures_for_itself() -> None:
    model, watcher = watched()
    copied = copy.deepcopy(model)
    other = copied.model.layers
    assert isinstance(other, Watcher)
    assert other.capture is not watcher.capture
    mask = torch.ones(2, 3)
    copied(ids(), attention_mask=mask)
    assert watcher.calls == []
    assert only_call(other).attention_mask is mask
    model(ids())
    assert only_call(watcher).attention_mask is None
    assert len(other.calls) == 1


def test_each_thread_has_its_own_call() -> None:
    both_inside = threading.Barrier(2, timeout=10)

    def meet(hidden_states: torch.Tensor) -> torch.Tensor:
        both_inside.wait()
        return hidden_states

    model, watcher = watched(meet)
    masks = [torch.ones(2, 3), torch.ones(2, 3)]
    threads = [threading.Thread(target=model, args=(ids(), mask)) for mask in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(call.attention_mask) for call in watcher.calls if call is not None} == {id(mask) for mask in masks}


def test_inner_call_hides_the_outer_one_until_it_ends() -> None:
    seen: list[object] = []

    def call_again(hidden_states: torch.Tensor) -> torch.Tensor:
        if len(watcher.calls) == 1:
            model(ids(), attention_mask=inner)
            current = watcher.capture.current
            seen.append(current.attention_mask if current is not None else None)
        return hidden_states

    model, watcher = watched(call_again)
    outer, inner = torch.ones(2, 3), torch.ones(2, 3)
    model(ids(), attention_mask=outer)
    assert seen == [outer]
    assert [call.attention_mask is inner for call in watcher.calls if call is not None] == [False, True]


# What is refused, and what failures leave behind


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_attentions": True}, r"^output_attentions=True is not carried by remote blocks; leave it off$"),
        (
            {"attention_mask": torch.ones(3)},
            r"^attention_mask must be \[B, P \+ T\], \[B, h, T, P \+ T\] or a dict of these, got a 1-D tensor$",
        ),
        ({"attention_mask": {"full_attention": "text"}}, r" or a dict of these, got a dict$"),
        ({"lengths": [3, 3]}, r"^argument 'lengths' of kind list is not carried by remote blocks$"),
    ],
    ids=["attentions", "mask-1d", "mask-dict", "list"],
)
def test_call_that_is_not_carried_is_refused_and_leaves_nothing(arguments: dict[str, Any], reason: str) -> None:
    model, watcher = watched()
    with pytest.raises(UnsupportedCallError, match=reason):
        model.model(ids(), **arguments)
    assert watcher.calls == []
    assert watcher.capture.current is None
    model(ids())
    assert len(watcher.calls) == 1


def test_config_that_asks_for_attentions_is_refused() -> None:
    model, watcher = watched(attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(UnsupportedCallError, match=r"^output_attentions=True is not carried "):
        model(ids())
    assert watcher.capture.current is None


def test_exception_in_a_block_leaves_no_stale_call() -> None:
    def fail(hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken block")

    model, watcher = watched(fail)
    with pytest.raises(RuntimeError, match=r"^broken block$"):
        model(ids(), attention_mask=torch.ones(2, 3))
    assert only_call(watcher).attention_mask is not None
    assert watcher.capture.current is None


def test_refused_inner_call_leaves_the_outer_one_current() -> None:
    seen: list[object] = []

    def call_again(hidden_states: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UnsupportedCallError):
            model.model(ids(), attention_mask=torch.ones(3))
        current = watcher.capture.current
        seen.append(current.attention_mask if current is not None else None)
        return hidden_states

    model, watcher = watched(call_again)
    outer = torch.ones(2, 3)
    model(ids(), attention_mask=outer)
    assert seen == [outer]
    assert watcher.capture.current is None


def test_call_of_the_wrong_form_leaves_no_stale_call() -> None:
    model, watcher = watched()
    with pytest.raises(TypeError):
        model.model(ids(), None, None, None, None, None, None, None, None)
    assert watcher.capture.current is None


# Watching registrations


def test_callback_is_told_of_each_registration_once() -> None:
    told: list[tuple[nn.Module, str, nn.Module]] = []
    marker = nn.Identity()

    def note(parent: nn.Module, name: str, child: nn.Module) -> None:
        if child is marker:
            told.append((parent, name, child))

    watch_registrations(note)
    watch_registrations(note)
    parent = nn.Module()
    parent.child = marker
    parent.add_module("other", marker)
    parent.add_module("nothing", None)
    assert told == [(parent, "child", marker), (parent, "other", marker)]
