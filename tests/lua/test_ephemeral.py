"""Keyless subjects: counted in Redis alone, and forgotten."""

from __future__ import annotations

import pytest

from core.admission.program import compile_program
from core.period import DAY_MS, calendar_bounds
from core.policy import Concurrency, FixedWindow, Gcra, Limit, Meter, PeriodKind, Quota
from core.redis.scripts import load
from tests.support.scripts import Scripts, plan_of

METERS = {"requests": Meter("requests"), "credits": Meter("credits")}


@pytest.fixture
def scripts(any_redis_url: str) -> Scripts:
    scripts = Scripts(any_redis_url, controlled=False)
    seconds, micros = scripts.redis.time()
    scripts.now_us = seconds * 1_000_000 + micros
    return scripts


def admit(scripts: Scripts, *limits: Limit, subject: str = "ip:free:::1", **costs: int) -> bool:
    program = compile_program(plan_of(*limits), costs or {"requests": 1}, METERS, {}, durable=False)
    return scripts.admit(subject, program, span=(0, 0), lease="l").admitted


@pytest.mark.parametrize(
    ("limit", "least_ms"),
    [
        (Gcra("l", "requests", 10, 1_000_000, 20), 60_000),
        (Gcra("l", "requests", 1, 1_000_000, 600), 600_000),
        (FixedWindow("l", "requests", 5, DAY_MS), 2 * DAY_MS),
        (Quota("l", "requests", 5, PeriodKind.WEEK), 7 * DAY_MS),
        (Concurrency("l", 5, 90_000), 90_000),
    ],
)
def test_nothing_stays_behind(scripts: Scripts, limit: Limit, least_ms: int) -> None:
    assert admit(scripts, limit)
    names = scripts.redis.keys("*")
    assert len(names) == 1
    for name in names:
        assert least_ms - 5_000 < scripts.redis.pttl(name) <= least_ms + 60_000
    assert not scripts.redis.exists(scripts.keyspace.dirty(0), scripts.keyspace.events(0))


def test_a_renewed_lease_is_not_forgotten(scripts: Scripts) -> None:
    assert admit(scripts, Concurrency("slots", 1, 1_000))
    key = scripts.keyspace.leases("ip:free:::1", "slots")
    scripts.redis.pexpire(key, 5_000)
    script = load("release")
    assert scripts.redis.eval(script.source, 1, key, "l", 30_000) == 1
    assert 60_000 < scripts.redis.pttl(key) <= 90_000
    scripts.redis.eval(script.source, 1, key, "l", 0)
    assert scripts.redis.keys("*") == []


def test_a_cheap_route_does_not_forget_a_long_window(scripts: Scripts) -> None:
    """Both routes share one state: its life is that of the plan's longest limit."""
    limits = (
        Gcra("rate", "requests", 10, 1_000_000, 20),
        FixedWindow("credits", "credits", 5, DAY_MS),
    )
    assert admit(scripts, *limits, requests=1, credits=5)
    assert admit(scripts, *limits, requests=1)
    key = scripts.keyspace.state("ip:free:::1")
    assert scripts.redis.pttl(key) > DAY_MS
    assert not admit(scripts, *limits, requests=1, credits=1)


def test_a_day_quota_without_a_ledger(scripts: Scripts) -> None:
    quota = Quota("daily", "requests", 3, PeriodKind.DAY)
    answers = [admit(scripts, quota) for _ in range(5)]
    assert answers == [True, True, True, False, False]
    state = scripts.redis.hgetall(scripts.keyspace.state("ip:free:::1"))
    assert state == {"q:requests:day": f"{calendar_bounds(scripts.now_ms)[0]} 3 0"}
    assert admit(scripts, quota, subject="ip:free:::2")


def test_durable_subjects_have_no_end(scripts: Scripts) -> None:
    scripts.seed("sub")
    program = compile_program(plan_of(Concurrency("slots", 2)), {"requests": 1}, METERS, {})
    assert scripts.admit("sub", program).admitted
    kept = set(scripts.redis.keys("*")) - {scripts.keyspace.sender(0, "test")}
    assert {scripts.redis.ttl(name) for name in kept} == {-1}
