"""A form of the wire is chosen where it saves a good part of the time, and never for a guess."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Hop
from remote_modules.plan.wire_choice import CODEC_S_PER_BYTE, PLAIN, choose_wire
from remote_modules.spans import Span

HOPS = [Hop(PeerId("a"), Span(0, 4)), Hop(PeerId("b"), Span(4, 8))]
BYTES = 16_384  # of a token
FORMS = {"int8": BYTES * 52 // 100, "int4": BYTES // 3}
PROMPT = Demand(num_tokens=512, kv_tokens=1024, bytes_per_token=BYTES, is_decode=False)
TOKEN = replace(PROMPT, num_tokens=1, is_decode=True)
MBIT = 1e6 / 8


def peers(bandwidth_bytes_per_s: float | None, *, rtt_s: float = 0.001, speed: float = 1e6) -> dict[PeerId, Candidate]:
    return {
        hop.peer_id: Candidate(
            peer_id=hop.peer_id,
            span=hop.span,
            rtt_s=rtt_s,
            decode_tokens_per_s=speed,
            prefill_tokens_per_s=speed,
            free_kv_tokens=10_000,
            load=0,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        )
        for hop in HOPS
    }


def chosen(demand: Demand, candidates: dict[PeerId, Candidate], *, is_pipelined: bool = False) -> str:
    return choose_wire(HOPS, candidates, demand, FORMS, is_pipelined=is_pipelined)


@pytest.mark.parametrize(
    ("demand", "candidates", "wire"),
    [
        (PROMPT, peers(100 * MBIT), "int4"),  # the link is all
        (PROMPT, peers(100 * MBIT, speed=600.0), "int8"),  # and the fourth bits save less than a tenth more
        (PROMPT, peers(100 * MBIT, speed=100.0), PLAIN),  # the peers are slow
        (PROMPT, peers(1e5 * MBIT), PLAIN),  # the codec would take longer
        (PROMPT, peers(None), PLAIN),  # nothing was measured
        (TOKEN, peers(100 * MBIT, rtt_s=0.1), PLAIN),  # a token waits for round trips
        (TOKEN, peers(1 * MBIT), "int4"),
    ],
)
def test_form_is_chosen_by_what_takes_the_time(demand: Demand, candidates: dict[PeerId, Candidate], wire: str) -> None:
    assert chosen(demand, candidates) == wire


def test_round_trips_and_queues_of_a_pipeline_cost_nothing() -> None:
    far = {peer_id: replace(one, load=50) for peer_id, one in peers(1000 * MBIT, rtt_s=1.0).items()}
    assert chosen(PROMPT, far) == PLAIN
    assert chosen(PROMPT, far, is_pipelined=True) != PLAIN


def test_peer_that_is_known_no_more_is_no_reason() -> None:
    known = peers(1 * MBIT)
    del known[PeerId("b")]
    assert chosen(PROMPT, known) == PLAIN


def test_codec_that_takes_as_long_as_it_saves_is_not_used() -> None:
    at_par = 0.48 / CODEC_S_PER_BYTE  # bytes/s at which 8 bits save what they cost
    assert chosen(PROMPT, peers(2 * at_par), is_pipelined=True) == PLAIN
    assert chosen(PROMPT, peers(at_par / 10), is_pipelined=True) != PLAIN
