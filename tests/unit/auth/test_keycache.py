"""The key cache: bounds, second chance, sharing, replacement, and the size of an entry."""

from __future__ import annotations

import gc
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import ids
from core.directory import KeyRow, SubscriptionRow
from core.policy import Status
from gateway.auth.keycache import KeyCache

NOW = 1_800_000_000_000


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def row(
    number: int, subscription: str | None = None, plan: str = "pro", active: bool = True
) -> KeyRow:
    name = f"sub_{number}" if subscription is None else subscription
    return KeyRow(
        digest(number), active, 0, SubscriptionRow(name, plan, Status.ACTIVE, 7, "cus_1", "cre_1")
    )


def test_an_entry_says_what_postgres_said() -> None:
    cache = KeyCache(ttl_ms=1_000)
    cache.store(row(1), NOW)
    entry = cache.get(digest(1))
    assert entry is not None
    subscription = entry.subscription
    assert (subscription.id, subscription.plan, subscription.anchor_ms) == ("sub_1", "pro", 7)
    assert (subscription.status, subscription.customer_id) == (Status.ACTIVE, "cus_1")
    assert (subscription.period_start_ms, subscription.period_end_ms) == (0, 0)
    assert (entry.active, entry.expires_at_ms, entry.fresh_until_ms) == (True, 0, NOW + 1_000)


def test_the_number_of_keys_is_bounded_and_keys_in_use_stay() -> None:
    cache = KeyCache(size=100)
    for number in range(100):
        cache.store(row(number), NOW)
    for number in range(50):
        cache.get(digest(number))
    for number in range(100, 150):
        cache.store(row(number), NOW)
    assert len(cache) == 100
    assert cache.evictions == 50
    assert all(digest(number) in cache for number in range(50))
    assert not any(digest(number) in cache for number in range(50, 100))


def test_unknown_digests_are_bounded_apart_and_evict_no_key() -> None:
    cache = KeyCache(size=10, negative_size=5)
    for number in range(10):
        cache.store(row(number), NOW)
    for number in range(1_000, 2_000):
        cache.store_negative(digest(number), NOW)
    assert len(cache) == 10
    assert cache.negative_count == 5
    assert cache.is_negative(digest(1_999), NOW)
    assert not cache.is_negative(digest(1_000), NOW)


def test_an_unknown_digest_is_forgotten_after_its_time_and_at_once_when_it_appears() -> None:
    cache = KeyCache(negative_ttl_ms=1_000)
    cache.store_negative(digest(1), NOW)
    cache.store_negative(digest(2), NOW)
    assert cache.is_negative(digest(1), NOW + 999)
    assert not cache.is_negative(digest(1), NOW + 1_000)
    cache.store(row(2), NOW)
    assert not cache.is_negative(digest(2), NOW)


def test_a_negative_ttl_of_zero_keeps_nothing() -> None:
    cache = KeyCache(negative_ttl_ms=0)
    cache.store_negative(digest(1), NOW)
    assert not cache.is_negative(digest(1), NOW)


def test_keys_share_their_subscription_and_follow_when_it_changes() -> None:
    cache = KeyCache()
    one = cache.store(row(1, "sub"), NOW)
    two = cache.store(row(2, "sub"), NOW)
    before = one.subscription
    assert two.subscription is before
    before.period_start_ms = 5

    cache.update_subscription(row(1, "sub").subscription)  # nothing new: the object stays
    assert one.subscription is before

    cache.update_subscription(row(1, "sub", plan="free").subscription)
    assert one.subscription is two.subscription
    assert one.subscription.plan == "free"
    assert one.subscription.period_start_ms == 0
    assert before.plan == "pro"  # a request under way keeps what it took

    cache.store(row(3, "sub", plan="max"), NOW)  # a newer row of another key moves all
    assert one.subscription.plan == "max"


def test_dropping_a_subscription_drops_its_keys_only() -> None:
    cache = KeyCache()
    for number in range(3):
        cache.store(row(number, "sub"), NOW)
    cache.store(row(9), NOW)
    cache.drop_subscription("sub")
    assert cache.digests() == [digest(9)]
    assert not cache.has_subscription("sub")
    cache.drop_subscription("sub")


def test_a_key_moved_to_another_subscription_leaves_the_old_one() -> None:
    cache = KeyCache()
    cache.store(row(1, "old"), NOW)
    entry = cache.store(row(1, "new"), NOW)
    assert entry.subscription.id == "new"
    assert not cache.has_subscription("old")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.sampled_from("sgdn"), st.integers(0, 15), st.integers(0, 4)), max_size=120
    ),
)
def test_whatever_happens_bounds_hold_and_the_index_agrees(
    size: int, steps: list[tuple[str, int, int]]
) -> None:
    cache = KeyCache(size=size, negative_size=3)
    for action, number, subscription in steps:
        if action == "s":
            cache.store(row(number, f"sub_{subscription}"), NOW)
            assert digest(number) in cache
        elif action == "g":
            cache.get(digest(number))
        elif action == "d":
            cache.drop(digest(number))
        else:
            cache.store_negative(digest(number), NOW)
        assert len(cache) <= size
        assert cache.negative_count <= 3
        indexed = {d: f"sub_{s}" for s in range(5) for d in cache.digests_of(f"sub_{s}")}
        held = {d: e.subscription.id for d in cache.digests() if (e := cache.get(d))}
        assert indexed == held


@pytest.mark.slow
def test_a_key_takes_at_most_600_bytes() -> None:
    def fresh(number: int) -> KeyRow:
        # nothing shared that a driver would not share
        plan = "".join(["p", "ro"])
        ids_ = ids.new("sub"), ids.new("cus")
        subscription = SubscriptionRow(
            ids_[0], plan, Status.ACTIVE, NOW + number, ids_[1], "".join(["cre", "_1"])
        )
        return KeyRow(os.urandom(32), True, 0, subscription)

    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        cache = KeyCache(size=100_000)
        for batch in range(200):
            now = NOW + batch
            for number in range(500):
                cache.store(fresh(number), now)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(cache) == 100_000
    assert used / 100_000 <= 600
