from __future__ import annotations

import asyncio
import logging
import math

import msgspec
import pytest
from discovery_support import forge, make_signed
from records import make_identity, make_record

from remote_modules.discovery.peers_answer import Heard, PeersReader, encode_peers
from remote_modules.errors import DiscoveryError
from remote_modules.plan.leases import lease_of

ALICE, BOB = make_identity(1), make_identity(2)


def read(body: bytes, reader: PeersReader | None = None) -> list[Heard]:
    return asyncio.run((reader or PeersReader("peer 127.0.0.1:1")).read(body))


def test_answer_carries_records_and_their_ages() -> None:
    leases = [
        lease_of(make_signed(ALICE), make_record(ALICE), 10.0, 90.0),
        lease_of(make_signed(BOB), make_record(BOB), 12.5, 90.0),
    ]
    assert read(encode_peers(leases, 13.0)) == [
        Heard(signed=make_signed(ALICE), record=make_record(ALICE), age_s=3.0),
        Heard(signed=make_signed(BOB), record=make_record(BOB), age_s=0.5),
    ]


def test_age_is_never_negative() -> None:
    (heard,) = read(encode_peers([lease_of(make_signed(ALICE), make_record(ALICE), 10.0, 90.0)], 9.0))
    assert heard.age_s == 0.0


@pytest.mark.parametrize(("told", "age_s"), [("[-1]", math.inf), ("[1e300]", 1e300), ("[]", 0.0), ("[2,3]", 2.0)])
def test_age_that_makes_no_sense_is_too_old(told: str, age_s: float) -> None:
    body = b'{"peers":[' + msgspec.json.encode(make_signed(ALICE)) + b'],"ages_s":' + told.encode() + b"}"
    assert [heard.age_s for heard in read(body)] == [age_s]


def test_forged_record_is_dropped_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    body = msgspec.json.encode({"peers": [forge(make_signed(BOB), make_record(BOB, end=8)), make_signed(ALICE)]})
    reader = PeersReader("tracker http://t")
    for _ in range(2):
        assert [heard.record for heard in read(body, reader)] == [make_record(ALICE)]
    warnings = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
    assert [entry.message.split(": sig")[0] for entry in warnings] == ["invalid record dropped from tracker http://t"]


def test_other_shape_names_what_was_expected() -> None:
    with pytest.raises(DiscoveryError, match=r"another shape .*; is this a remote-modules peer\?"):
        read(b"[]")
