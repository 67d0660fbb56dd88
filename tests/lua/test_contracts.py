"""What each script promises: its header, its keys, its reply. On every server."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime
from importlib.resources import files

import pytest

from core.admission.program import REFUSED, WARNED, Verdict, compile_program
from core.clock import from_datetime
from core.config import loads
from core.errors import ConfigError
from core.period import DAY_MS, billing_period, calendar_bounds
from core.policy import (
    Action,
    Aggregation,
    Concurrency,
    FixedWindow,
    Gcra,
    Meter,
    PeriodKind,
    Quota,
    SlidingWindow,
)
from core.redis.scripts import load, render
from tests.support.scripts import Scripts, plan_of

NAMES = sorted(path.name[:-4] for path in files("lua").iterdir() if path.name.endswith(".lua"))
METERS = {"requests": Meter("requests"), "peak": Meter("peak", aggregation=Aggregation.MAX)}
NOW_MS = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
SPAN = billing_period(0, 1, NOW_MS)
DAYLY = {"requests": (PeriodKind.DAY,)}
EVERY = plan_of(
    Gcra("rate", "requests", 1, 1_000_000, 50),
    FixedWindow("fixed", "requests", 50, 60_000),
    SlidingWindow("sliding", "requests", 50, 60_000),
    Quota("monthly", "requests", 5, PeriodKind.BILLING, Action.WARN),
    Quota("daily", "requests", 50, PeriodKind.DAY),
    Concurrency("slots", 4),
)
PROGRAM = compile_program(EVERY, {"requests": 1}, METERS, DAYLY)


@pytest.fixture
def scripts(any_redis_url: str) -> Scripts:
    scripts = Scripts(any_redis_url)
    scripts.at(NOW_MS * 1000)
    return scripts


def test_there_are_scripts() -> None:
    assert {"admit", "seed", "settle", "acknowledge", "release"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_opens_with_its_contract_and_builds_no_key(name: str) -> None:
    script = load(name)
    assert "-- @include" not in script.source
    assert re.fullmatch("[0-9a-f]{40}", script.sha)
    header = script.source.split("\nlocal", 1)[0]
    assert header.index("-- KEYS") < header.index("-- ARGV") < header.index("-- Returns")
    code = re.sub(r"--[^\n]*", "", script.source)
    assert "tg1" not in code
    code = code.replace("redis.pcall('INFO', 'server')", "")  # it has no key
    for key in re.findall(r"call\('[A-Z]+', ([^,)]+)", code):
        assert re.fullmatch(
            r"(KEYS\[[^]]+\]?.*|(s\.|o\.)?key|(dirty|idle|events|event|stream|claim)_key)", key
        ), key
    assert "os." not in code
    assert "math.random" not in code


def test_a_script_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        render("nothing")


def test_scripts_touch_only_the_keys_they_are_given(any_redis_url: str) -> None:
    scripts = Scripts(any_redis_url, controlled=False)
    now = scripts.redis.time()
    scripts.now_us = now[0] * 1_000_000 + now[1]
    seen: list[str] = []
    ready = threading.Event()

    def watch() -> None:
        with scripts.redis.monitor() as monitor:
            ready.set()
            for command in monitor.listen():
                if "end-of-test" in command["command"]:
                    return
                if command["client_type"] == "lua":
                    seen.append(command["command"])

    thread = threading.Thread(target=watch)
    thread.start()
    assert ready.wait(10)
    try:
        key, keyspace = scripts.keyspace.state("s"), scripts.keyspace
        scripts.seed("s", {"q:requests:day": "0 0 0"})
        scripts.seed("s", {"q:requests:day": "0 0 0"}, expected="0")
        for _ in range(6):
            scripts.admit("s", PROGRAM, lease="lease")
        held = compile_program(EVERY, {"requests": 1}, METERS, DAYLY, reserve_ms=1_000)
        scripts.admit("s", held, lease="held")
        scripts.settle(("refund", "s", "held"), sender="spool", number=1)
        usage = compile_program(EVERY, {"requests": 1}, METERS, DAYLY, event=True)
        event = keyspace.event("s", "e1")
        scripts.admit("s", usage, lease="{}", event="e1")
        slots = keyspace.leases("s", "slots")
        # a period that has ended, closed and told
        scripts.redis.hset(key, mapping={"p:requests": "1 2 0", "m:requests": "6 0 6 0 6"})
        span = billing_period(0, 1, scripts.now_ms)
        roll = scripts.scripts["roll"]
        rolled = scripts.redis.evalsha(
            roll.sha, 3, keyspace.dirty(0), keyspace.events(0), key,
            *span, 0, 1, "requests", 1, "requests", "monthly", 5,
        )  # fmt: skip
        assert rolled == [0, 1, 0]
        release, acknowledge = scripts.scripts["release"], scripts.scripts["acknowledge"]
        scripts.redis.evalsha(release.sha, 2, slots, slots, "lease", 1_000, "lease", 0)
        scripts.redis.evalsha(release.sha, 1, slots, "held", 0)
        scripts.redis.evalsha(
            acknowledge.sha,
            3,
            *(keyspace.dirty(0), keyspace.idle(0), key),
            *(1, 1, scripts.state("s")["ver"], 4, "ch:a:1:2", "0 0", "cp:a:1", "2 0 0"),
        )
        listed = {str(found) for found in scripts.redis.keys("*")}
        evict = scripts.scripts["evict"]
        scripts.redis.evalsha(
            evict.sha, 4, keyspace.dirty(0), keyspace.idle(0), key, slots, 2**42, 1
        )
    finally:
        scripts.redis.echo("end-of-test")
        thread.join(10)
    given = {key, slots, keyspace.dirty(0), keyspace.events(0), keyspace.sender(0, "test")}
    given |= {keyspace.due(0), keyspace.sender(0, "spool"), event, keyspace.ingested(0)}
    given |= {keyspace.idle(0), keyspace.claim("s")}
    touched = {command.split(" ")[1] for command in seen if command.upper() != "TIME"}
    assert touched == given
    assert listed <= given
    kept = {keyspace.events(0), keyspace.ingested(0), event}
    assert set(scripts.redis.keys("*")) == kept | {
        keyspace.sender(0, "test"),
        keyspace.sender(0, "spool"),
    }


def test_the_reply_of_a_mixed_batch(scripts: Scripts) -> None:
    scripts.seed("warm", {"q:requests:day": "0 0 0"})
    scripts.seed("uncounted")  # lacks the day's counter
    full = compile_program(
        plan_of(FixedWindow("none", "requests", 0, 60_000)), {"requests": 1}, METERS, DAYLY
    )
    free = compile_program(plan_of(), {"requests": 1}, METERS, DAYLY)
    found = scripts.batch(
        [
            ("warm", PROGRAM),
            ("cold", PROGRAM),
            ("uncounted", PROGRAM),
            ("warm", full),
            ("warm", free),
        ]
    )
    assert [outcome.status for outcome in found] == [
        Verdict.ADMIT, Verdict.COLD, Verdict.COLD, Verdict.REJECT, Verdict.ADMIT,
    ]  # fmt: skip
    assert [len(outcome.limits) for outcome in found] == [6, 0, 0, 1, 0]
    assert [answer.remaining for answer in found[0].limits] == [49, 49, 49, 4, 49, 3]
    assert found[0].limits[3].reset_ms == SPAN[1] - NOW_MS
    assert found[3].limits[0].flags == REFUSED
    for _ in range(2):
        found = scripts.batch([("warm", PROGRAM)] * 2)
    # no fifth slot: refused, and the quotas beside it were not consumed
    assert [outcome.status for outcome in found] == [Verdict.ADMIT, Verdict.REJECT]
    assert scripts.state("warm")["m:requests"].split()[0] == "5"
    scripts.redis.delete(scripts.keyspace.leases("warm", "slots"))
    assert scripts.admit("warm", PROGRAM).limits[3].flags == WARNED
    assert scripts.batch([]) == []


def test_types_and_layout_of_the_keys(scripts: Scripts) -> None:
    scripts.seed("s", {"q:requests:day": "0 0 0"})
    for _ in range(4):
        scripts.admit("s", PROGRAM)
    keyspace = scripts.keyspace
    types = {name: scripts.redis.type(name) for name in scripts.redis.keys("tg1:*")}
    assert types == {
        keyspace.state("s"): "hash",
        keyspace.leases("s", "slots"): "zset",
        keyspace.dirty(0): "zset",
        keyspace.events(0): "stream",
        keyspace.sender(0, "test"): "string",
        keyspace.idle(0): "zset",
    }
    assert sorted(scripts.state("s")) == sorted(
        [
            "ver", "epoch", "run", "p:requests", "m:requests", "q:requests:day",
            "r:rate", "w:fixed", "s:sliding", "t:monthly",
        ]
    )  # fmt: skip
    assert scripts.redis.zscore(keyspace.dirty(0), keyspace.state("s")) == NOW_MS
    sender = keyspace.sender(0, "test")
    assert all((scripts.redis.ttl(name) == -1) == (name != sender) for name in types)


@pytest.mark.parametrize("days", [-1, 1])
def test_another_day_or_period_is_stale_and_changes_nothing(scripts: Scripts, days: int) -> None:
    scripts.seed("s", {"q:requests:day": "0 0 0"})
    before = scripts.state("s")
    calendar = calendar_bounds(NOW_MS + days * DAY_MS)
    found = scripts.batch([("s", PROGRAM), ("cold", PROGRAM)], calendar=calendar)
    assert [outcome.status for outcome in found] == [Verdict.STALE, Verdict.STALE]
    other = billing_period(0, 1, NOW_MS + 31 * days * DAY_MS)
    assert scripts.admit("s", PROGRAM, span=other).status is Verdict.STALE
    assert scripts.state("s") == before
    assert scripts.admit("s", PROGRAM).admitted


def test_at_the_last_and_the_first_millisecond_of_a_day(scripts: Scripts) -> None:
    midnight = calendar_bounds(NOW_MS)[1]
    scripts.seed("s", {"q:requests:day": "0 0 0"})
    scripts.at(midnight * 1000 - 1)
    assert scripts.admit("s", PROGRAM).limits[4].remaining == 49
    yesterday = calendar_bounds(scripts.now_ms)
    scripts.at(midnight * 1000)
    assert scripts.batch([("s", PROGRAM)], calendar=yesterday)[0].status is Verdict.STALE
    answer = scripts.admit("s", PROGRAM).limits[4]
    assert (answer.remaining, answer.reset_ms) == (49, DAY_MS)


def test_seed_never_lowers(scripts: Scripts) -> None:
    assert scripts.seed("s", {"m:requests": "5 0 5 0 0"}, epoch=3, version=7) == 1
    assert scripts.state("s") == {
        "epoch": "3", "ver": "7", "run": "run", "m:requests": "5 0 5 0 0",
    }  # fmt: skip
    # another seeder of the same cold subject, late
    assert scripts.seed("s", {"m:requests": "1 0 1 0 0"}, epoch=4, version=9) == 0
    assert scripts.state("s")["m:requests"] == "5 0 5 0 0"
    assert (scripts.state("s")["epoch"], scripts.state("s")["ver"]) == ("4", "7")
    # an older epoch is not adopted; fields that are there stay, but for calendar counters
    fields = {"m:requests": "1 0 1 0 0", "m:peak": "2 0 2 0 0", "q:peak:day": "0 2 0"}
    assert scripts.seed("s", fields, expected="7", epoch=2) == 1
    assert scripts.seed("s", {"q:peak:day": "0 3 0"}, expected="7", epoch=2) == 1
    state = scripts.state("s")
    assert (state["epoch"], state["m:requests"]) == ("4", "5 0 5 0 0")
    assert state["m:peak"] == "2 0 2 0 0"
    assert state["q:peak:day"] == "0 3 0"
    # what completes a state that is gone must not become a state
    scripts.redis.delete(scripts.keyspace.state("s"))
    assert scripts.seed("s", {"q:peak:day": "0 3 0"}, expected="7", epoch=9) == 0
    assert scripts.state("s") == {}


def test_release_renews_only_what_is_held(scripts: Scripts) -> None:
    scripts.seed("s", {"q:requests:day": "0 0 0"})
    scripts.admit("s", PROGRAM, lease="one")
    key, sha = scripts.keyspace.leases("s", "slots"), scripts.scripts["release"].sha
    scripts.at((NOW_MS + 10_000) * 1000)
    assert scripts.redis.evalsha(sha, 2, key, key, "one", 60_000, "other", 60_000) == 1
    assert scripts.redis.zrange(key, 0, -1, withscores=True) == [("one", NOW_MS + 70_000)]
    scripts.redis.zadd(key, {"expired": NOW_MS + 10_000, "running": NOW_MS + 10_001})
    assert scripts.redis.evalsha(sha, 1, key, "one", 0) == 1
    assert scripts.redis.zrange(key, 0, -1) == ["running"]
    assert scripts.redis.evalsha(sha, 1, key, "one", 0) == 0
    assert scripts.redis.ttl(key) == -1


@pytest.mark.parametrize(
    "limit",
    [
        "{period: billing, limit: 9007199254740993}",
        "{period: billing, limit: 100_000_000_000_000}",  # times 100 %
        "{window: 1d, limit: 9007199254740993}",
        "{window: 1w, limit: 100_000_000, sliding: true}",  # times the window
        "{rate: 1/d, burst: 1_000_000}",  # times the period
    ],
)
def test_what_lua_cannot_count_exactly_is_refused_in_the_configuration(limit: str) -> None:
    with pytest.raises(ConfigError, match="exactly"):
        loads(f"plans: {{p: {{limits: {{l: {limit}}}}}}}", env={})


def test_totals_stay_exact_up_to_nine_quadrillion(scripts: Scripts) -> None:
    total = 9 * 10**15 - 10
    day = calendar_bounds(NOW_MS)[0]
    hour = NOW_MS - NOW_MS % 3_600_000
    scripts.seed(
        "s",
        {
            "p:requests": f"{SPAN[0]} {SPAN[1]} {hour}",
            "m:requests": f"{total} {total - 5} {total} {total - 5} {total - 1}",
            "q:requests:day": f"{day} {total} {total - 1}",
        },
        version=total + 3,
    )
    quota = Quota("monthly", "requests", 9 * 10**13, PeriodKind.BILLING, Action.OVERAGE, ())
    plan = plan_of(quota, Quota("daily", "requests", 7, PeriodKind.DAY, Action.WARN, ()))
    program = compile_program(plan, {"requests": 3}, METERS, DAYLY)
    outcome = scripts.admit("s", program)
    assert outcome.limits[0].remaining == 9 * 10**13 - total - 3
    state = scripts.state("s")
    assert state["m:requests"] == (f"{total + 3} {total - 2} {total + 3} {total - 2} {total}")
    assert state["q:requests:day"] == f"{day} {total + 3} {total}"
    assert state["ver"] == str(total + 4)
    assert {event["used"] for event in scripts.events()} == {str(total + 3)}
    scripts.at((SPAN[1] + 1) * 1000)
    scripts.admit("s", program)
    closed = scripts.state("s")[f"cp:requests:{SPAN[0]}"]
    assert closed == f"{SPAN[1]} {total + 3} {total - 2}"
    assert scripts.events()[-1]["used"] == str(total + 3)
