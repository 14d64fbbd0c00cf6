"""What a peer may answer; whole passes with peers that lie are in tests/faults."""

from __future__ import annotations

import pytest
import torch

from remote_modules.client.answers import AnswerChecker
from remote_modules.errors import PeerError
from remote_modules.model.stack import StackSpec
from remote_modules.peers import PeerId
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta

HOP = Hop(PeerId("a" * 52), Span(1, 3))
CALL = CallMeta(rows=2, num_tokens=3, record=("hidden_states",))
HIDDEN = torch.zeros(2, 3, 8)


@pytest.fixture
def checker() -> AnswerChecker:
    return AnswerChecker(StackSpec("model.layers", 4), 8)


def test_what_nobody_asked_for_goes_no_further(checker: AnswerChecker) -> None:
    answered = {"hidden_states": HIDDEN, "foo": torch.full((), float("nan")), "state.9": HIDDEN}
    assert list(checker.check_outputs(HOP, answered, {"hidden_states": HIDDEN}, CALL)) == ["hidden_states"]
    sent = {"hidden_states": HIDDEN, "side.index": torch.zeros(2, dtype=torch.int64)}
    assert list(checker.check_gradients(HOP, answered, sent, {})) == ["hidden_states"]


def test_recorded_tensors_are_those_of_the_hops_own_blocks(checker: AnswerChecker) -> None:
    recorded = {"record.hidden_states.1": HIDDEN, "record.hidden_states.2": HIDDEN}
    assert checker.check_recorded(HOP, recorded, CALL) == recorded


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("record.hidden_states.3", HIDDEN),
        ("record.router_logits.1", HIDDEN),
        ("record.hidden_states.one", HIDDEN),
        ("record.hidden_states.1", torch.zeros(())),
    ],
)
def test_other_recorded_tensors_are_the_peers_fault(checker: AnswerChecker, name: str, tensor: torch.Tensor) -> None:
    with pytest.raises(PeerError, match=f"wrong answer for blocks 1:3: '{name}', a tensor .* is not what was to be"):
        checker.check_recorded(HOP, {name: tensor}, CALL)


LAST = Hop(PeerId("a" * 52), Span(2, 4))
ASKED = CallMeta(rows=2, num_tokens=3, head_tokens=2, head_top_k=5)
LOGITS = {"record.head.values": torch.zeros(2, 2, 5), "record.head.tokens": torch.zeros(2, 2, 5, dtype=torch.int64)}


def test_logits_that_were_asked_for_are_let_through(checker: AnswerChecker) -> None:
    assert checker.check_recorded(LAST, LOGITS, ASKED) == LOGITS
    fewer = {name: tensor[:, :1, :3] for name, tensor in LOGITS.items()}
    assert checker.check_recorded(LAST, fewer, ASKED) == fewer


@pytest.mark.parametrize(
    ("hop", "call", "changes"),
    [
        (HOP, ASKED, {}),
        (LAST, CALL, {}),
        (LAST, ASKED, {"record.head.tokens": None}),
        (LAST, ASKED, {"record.head.values": None}),
        (LAST, ASKED, {"record.head.values": torch.zeros(2, 3, 5)}),
        (LAST, ASKED, {"record.head.values": torch.zeros(2, 2, 6)}),
        (LAST, ASKED, {"record.head.values": torch.zeros(2, 5)}),
        (LAST, ASKED, {"record.head.values": LOGITS["record.head.tokens"]}),
        (LAST, ASKED, {"record.head.tokens": LOGITS["record.head.values"]}),
        (LAST, ASKED, {"record.head.tokens": LOGITS["record.head.tokens"] - 1}),
    ],
    ids=[
        *(
            "not the last blocks",
            "not asked for",
            "no tokens",
            "no values",
            "more tokens",
            "more logits",
            "other shape",
        ),
        *("integers", "tokens that are floats", "negative tokens"),
    ],
)
def test_other_logits_are_the_peers_fault(
    checker: AnswerChecker, hop: Hop, call: CallMeta, changes: dict[str, torch.Tensor | None]
) -> None:
    recorded = {name: tensor for name, tensor in {**LOGITS, **changes}.items() if tensor is not None}
    with pytest.raises(PeerError, match="wrong answer for blocks .*: logits"):
        checker.check_recorded(hop, recorded, call)


INF = torch.full((2, 3, 8), torch.inf)
OTHER = Hop(PeerId("b" * 52), HOP.span)


def answer(checker: AnswerChecker, hop: Hop, tensor: torch.Tensor) -> bool:
    """Whether it is believed."""
    try:
        checker.check_outputs(hop, {"hidden_states": tensor}, {"hidden_states": HIDDEN}, CALL)
    except PeerError:
        return False
    return True


def test_peer_that_nobody_can_stand_in_for_is_believed_when_it_says_the_same_again(checker: AnswerChecker) -> None:
    assert not checker.ask_again(HOP.peer_id)
    assert not answer(checker, HOP, INF)
    assert not answer(checker, HOP, INF)  # others could have been asked
    assert checker.ask_again(HOP.peer_id)
    assert not checker.ask_again(HOP.peer_id)
    elsewhere = INF.clone()
    elsewhere[0, 0, 0] = 0.0
    assert not answer(checker, HOP, elsewhere)
    assert answer(checker, HOP, elsewhere)


def test_peers_that_agree_are_believed_and_cleared(checker: AnswerChecker) -> None:
    partly = INF.clone()
    partly[0, 0, 0] = 0.0
    assert not answer(checker, HOP, INF)
    assert not answer(checker, OTHER, partly)
    assert checker.take_cleared() == set()
    assert answer(checker, OTHER, INF)
    assert checker.take_cleared() == {HOP.peer_id}
    assert checker.take_cleared() == set()


def test_honest_replica_disproves_a_peer_that_lies(checker: AnswerChecker) -> None:
    assert not answer(checker, HOP, INF)
    assert answer(checker, OTHER, HIDDEN)
    assert not answer(checker, Hop(PeerId("c" * 52), Span(3, 4)), INF)  # else the lie would confirm this one


def test_what_is_not_finite_in_what_went_in_is_nobodys_fault(checker: AnswerChecker) -> None:
    assert checker.check_outputs(HOP, {"hidden_states": INF}, {"hidden_states": INF}, CALL)
