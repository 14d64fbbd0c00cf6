from __future__ import annotations

import pytest

from remote_modules.discovery.rate_limits import TokenBuckets, source_key


def test_burst_is_given_at_once_and_then_one_token_each_period() -> None:
    buckets = TokenBuckets(per_s=2.0, burst=3.0)
    assert [buckets.take("a", 10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert buckets.take("a", 10.25) == 0.25
    assert buckets.take("a", 10.5) == 0.0
    assert buckets.take("a", 10.5) == 0.5


def test_bucket_never_holds_more_than_the_burst() -> None:
    buckets = TokenBuckets(per_s=2.0, burst=2.0)
    buckets.take("a", 0.0)
    assert [buckets.take("a", 1000.0) for _ in range(3)] == [0.0, 0.0, 0.5]


def test_keys_have_buckets_of_their_own() -> None:
    buckets = TokenBuckets(per_s=1.0, burst=1.0)
    assert (buckets.take("a", 0.0), buckets.take("b", 0.0), buckets.take("a", 0.0)) == (0.0, 0.0, 1.0)


def test_looking_takes_nothing() -> None:
    buckets = TokenBuckets(per_s=4.0, burst=1.0)
    assert buckets.wait_s("a", 0.0) == buckets.wait_s("a", 0.0) == 0.0
    assert len(buckets) == 0
    buckets.take("a", 0.0)
    assert buckets.wait_s("a", 0.0) == 0.25


def test_time_that_goes_back_gives_nothing() -> None:
    buckets = TokenBuckets(per_s=1.0, burst=1.0)
    buckets.take("a", 100.0)
    assert buckets.take("a", 0.0) == 1.0


def test_table_is_bounded_and_forgets_who_has_not_asked_for_longest() -> None:
    buckets = TokenBuckets(per_s=1.0, burst=1.0, max_keys=2)
    for key in ("a", "b", "a", "c"):
        buckets.take(key, 0.0)
    assert len(buckets) == 2
    assert (buckets.wait_s("a", 0.0), buckets.wait_s("b", 0.0), buckets.wait_s("c", 0.0)) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("127.0.0.1", None),
        ("::1", None),
        ("", None),
    ],
)
def test_source_is_an_address_or_a_network_but_not_this_machine(host: str, key: str | None) -> None:
    assert source_key(host) == key
