from __future__ import annotations

from remote_modules.peers import PeerId
from remote_modules.plan.own_requests import OwnRequests, Sent

ALICE, BOB = PeerId("alice"), PeerId("bob")


def test_request_is_given_the_time_of_those_before_it() -> None:
    requests = OwnRequests()
    first = requests.begin(ALICE, expected_s=1.0, now_s=0.0)
    second = requests.begin(ALICE, expected_s=2.0, now_s=0.5)
    third = requests.begin(ALICE, expected_s=1.0, now_s=0.5)
    other = requests.begin(BOB, expected_s=1.0, now_s=0.5)
    assert [(sent.num_ahead, sent.ahead_s) for sent in (first, second, third, other)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 3.0),
        (0, 0.0),
    ]
    assert requests.num_others(second) == 2
    assert requests.num_others(other) == 0
    requests.end(first, now_s=1.0)
    requests.end(first, now_s=1.0)
    assert requests.begin(ALICE, expected_s=1.0, now_s=1.0).ahead_s == 3.0


def test_only_the_wait_for_own_requests_is_ours() -> None:
    requests = OwnRequests()
    first = requests.begin(ALICE, expected_s=1.0, now_s=0.0)
    second = requests.begin(ALICE, expected_s=1.0, now_s=0.25)
    assert requests.own_queue_s(first, 5.0) == 0.0
    requests.end(first, now_s=1.0)
    assert requests.own_queue_s(second, 0.5) == 0.5
    assert requests.own_queue_s(second, 5.0) == 0.75  # the rest was for others, or is not true


def test_nothing_is_kept_of_what_has_ended() -> None:
    requests = OwnRequests()
    first = requests.begin(ALICE, expected_s=1.0, now_s=0.0)
    requests.end(first, now_s=9.0)
    later = requests.begin(ALICE, expected_s=1.0, now_s=9.0)
    assert requests.own_queue_s(later, 1.0) == 0.0
    requests.end(later, now_s=10.0)
    step = Sent(BOB, 0.0, 0.0)  # of a session: it waits for no pass
    assert requests.num_others(step) == 0
    assert requests.own_queue_s(step, 1.0) == 0.0
    requests.end(step, now_s=11.0)
