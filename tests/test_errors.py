from __future__ import annotations

import pytest

from remote_modules import errors
from remote_modules.errors import (
    CheckpointError,
    DiscoveryError,
    LocalProtocolError,
    NoRouteError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    RefusalReason,
    RemoteModulesError,
    RemoteProtocolError,
    SessionError,
    SpanUnavailable,
    UnsupportedCallError,
)
from remote_modules.spans import Span

TREE: dict[type[Exception], type[Exception]] = {
    RemoteModulesError: Exception,
    NoRouteError: RemoteModulesError,
    SpanUnavailable: NoRouteError,
    PeerError: RemoteModulesError,
    PeerUnreachable: PeerError,
    PeerTimeout: PeerError,
    PeerRefused: PeerError,
    ProtocolError: RemoteModulesError,
    LocalProtocolError: ProtocolError,
    RemoteProtocolError: ProtocolError,
    SessionError: RemoteModulesError,
    DiscoveryError: RemoteModulesError,
    CheckpointError: RemoteModulesError,
    UnsupportedCallError: RemoteModulesError,
}


@pytest.mark.parametrize(("error", "parent"), TREE.items(), ids=[error.__name__ for error in TREE])
def test_error_has_its_place_in_the_tree(error: type[Exception], parent: type[Exception]) -> None:
    assert error.__bases__ == (parent,)


def test_tree_in_the_module_docstring_names_every_error() -> None:
    assert {error.__name__ for error in TREE} == set(errors.__all__) - {"RefusalReason"}
    assert all(error.__name__ in (errors.__doc__ or "") for error in TREE)


def test_no_route_error_keeps_the_missing_spans() -> None:
    error = NoRouteError("no route for blocks 0:4", missing=[Span(0, 4)])
    assert str(error) == "no route for blocks 0:4"
    assert error.missing == (Span(0, 4),)
    assert NoRouteError("no route").missing == ()


@pytest.mark.parametrize("error", [PeerError, PeerUnreachable, PeerTimeout])
def test_peer_error_keeps_the_peer(error: type[PeerError]) -> None:
    raised = error("peer 'a3f09c' did not answer", peer_id="a3f09c77be10")
    assert str(raised) == "peer 'a3f09c' did not answer"
    assert raised.peer_id == "a3f09c77be10"


def test_refusal_keeps_reason_and_hint() -> None:
    refused = PeerRefused("peer 'a3f09c' is busy", peer_id="a3f09c77be10", reason=RefusalReason.BUSY, retry_after_s=0.5)
    assert str(refused) == "peer 'a3f09c' is busy"
    assert refused.peer_id == "a3f09c77be10"
    assert refused.reason is RefusalReason.BUSY
    assert refused.retry_after_s == 0.5
    assert PeerRefused("no", peer_id="a", reason=RefusalReason.DRAINING).retry_after_s is None


def test_refusal_reasons_keep_their_wire_values() -> None:
    assert [reason.value for reason in RefusalReason] == [
        "bad_request",
        "not_served",
        "session_lost",
        "out_of_memory",
        "busy",
        "adapter_missing",
        "draining",
        "internal",
    ]
