"""Redis is wiped in mid-period: quotas and thresholds continue from the ledger, not from zero."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import wait_until
from tests.support.load import Load, get
from tests.support.stack import Stack, Subscriber

CLIENTS = 200
LIMIT = 1000


@contextmanager
def ledger_stands_still(stack: Stack) -> Iterator[None]:
    """The reconciler neither flushes nor stores events meanwhile."""
    assert stack.reconciler is not None
    stack.quiet()
    stack.reconciler.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        stack.reconciler.signal(signal.SIGCONT)


def _use(stack: Stack, load: Load, who: Subscriber, requests: int) -> int:
    """That many requests over all gateways; how many were admitted."""
    request = get("/api/x", who.key, who=who.id)
    outcome = load.run(stack.ports, [request], connections=CLIENTS, total=requests)
    assert outcome.all_statuses() <= {200, 429}
    return outcome.count(200)


@pytest.mark.parametrize("with_scripts", [False, True], ids=["data", "data-and-scripts"])
def test_the_rest_of_the_quota_is_left_and_no_more(
    stack: Stack, load: Load, with_scripts: bool
) -> None:
    who = stack.subscribe("quota")
    assert _use(stack, load, who, 400) == 400
    stack.flushed(who, 400)
    stack.quiet()
    stack.redis.flushall()
    if with_scripts:
        stack.redis.script_flush()
    # All clients find the subject cold at once, on four gateways.
    assert _use(stack, load, who, 1000) == 600
    stack.flushed(who, LIMIT)
    assert stack.ledger_hours(who)["requests"].total == LIMIT
    assert stack.served(who.id) == LIMIT
    assert _use(stack, load, who, 8) == 0


def test_wiped_again_and_again_it_still_ends_at_the_limit(stack: Stack, load: Load) -> None:
    who = stack.subscribe("quota")
    for part in range(1, 5):
        assert _use(stack, load, who, 200) == 200
        stack.flushed(who, 200 * part)
        stack.quiet()
        stack.redis.flushall()
    assert _use(stack, load, who, 500) == 200
    stack.flushed(who, LIMIT)
    assert stack.served(who.id) == LIMIT


def test_wiped_under_load_the_ledger_ends_at_the_limit(stack: Stack, load: Load) -> None:
    who = stack.subscribe("ten_thousand")
    request = get("/api/x", who.key, who=who.id)
    load.start(stack.ports, [request], connections=CLIENTS, total=40_000)
    lost_at_most = wiped = 0
    while load.progress().total < 8_000:
        since = load.progress().total
        wait_until(lambda: load.progress().total > since + 1_000, what="requests")  # noqa: B023
        known = stack.ledger(who).get("requests")
        # Reads and wipes in one step: what Redis had counted beyond the ledger may be lost.
        counted = stack.wipe(who).get("requests")
        if counted is not None:
            lost_at_most += int(counted.total - (known.total if known else 0))
            wiped += 1
    outcome = load.wait()
    assert wiped >= 3
    assert outcome.lost == 0
    assert outcome.all_statuses() == {200, 429}
    stack.flushed(who, 10_000)
    assert stack.ledger_hours(who)["requests"].total == 10_000
    assert 10_000 <= outcome.count(200) <= 10_000 + lost_at_most
    assert stack.served(who.id) == outcome.count(200)


def test_scripts_forgotten_under_load_cost_no_request(stack: Stack, load: Load) -> None:
    who = stack.subscribe("quota")
    request = get("/api/x", who.key, who=who.id)
    load.start(stack.ports, [request], connections=CLIENTS, total=4000)
    forgotten = 0
    while load.progress().total < 3000:
        stack.redis.script_flush()
        forgotten += 1
    outcome = load.wait()
    assert forgotten > 3
    assert outcome.lost == 0
    assert (outcome.count(200), outcome.count(429)) == (LIMIT, 3000)
    stack.flushed(who, LIMIT)


def test_what_was_not_flushed_is_all_that_can_be_lost(stack: Stack, load: Load) -> None:
    who = stack.subscribe("quota")
    assert _use(stack, load, who, 300) == 300
    stack.flushed(who, 300)
    with ledger_stands_still(stack):
        assert _use(stack, load, who, 200) == 200
        assert stack.state(who)["requests"].total == 500
        assert stack.ledger(who)["requests"].total == 300
        stack.redis.flushall()
        # The limit on top of what the ledger knew, neither more nor less.
        assert _use(stack, load, who, 1000) == LIMIT - 300
    stack.flushed(who, LIMIT)
    assert stack.served(who.id) == LIMIT + 200


def test_thresholds_do_not_fire_twice(stack: Stack, load: Load) -> None:
    who = stack.subscribe("quota")
    assert _use(stack, load, who, 920) == 920
    stack.flushed(who, 920)
    stack.quiet()
    first = [("monthly", "warning", 80), ("monthly", "warning", 90)]
    assert stack.events(who) == first
    stack.redis.flushall()
    rest = [("monthly", "critical", 95), ("monthly", "critical", 100)]
    with ledger_stands_still(stack):
        assert _use(stack, load, who, 300) == 80
        # In the stream itself, not only in the table, which would swallow a repetition.
        assert stack.stream(who) == rest
    stack.flushed(who, LIMIT)
    stack.quiet()
    wait_until(lambda: stack.events(who) == first + rest, what="each threshold once")
