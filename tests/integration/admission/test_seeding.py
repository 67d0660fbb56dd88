"""A subject without state continues from the ledger: every kind of counter, at a set time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from core.admission.program import Verdict, compile_program
from core.clock import from_datetime, to_datetime
from core.errors import StoreUnavailableError
from core.meters import MeterRegistry
from core.period import HOUR_MS, billing_period, calendar_period
from core.policy import Action, FixedWindow, PeriodKind, Plan, Quota, SlidingWindow
from reconciler.events import EventStore
from reconciler.flush import Flusher
from tests.integration.admission.stack import METERS, Stack, stack
from tests.support.ledger import packed
from tests.support.scripts import RUN, Scripts, plan_of

# A Wednesday, so that day, week and month differ, and not in the first months of the year.
NOW_MS = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
ANCHOR_MS = from_datetime(datetime(2026, 1, 10, 6, 30, tzinfo=UTC))
SPAN = billing_period(ANCHOR_MS, 1, NOW_MS)
CALENDAR = (PeriodKind.DAY, PeriodKind.WEEK, PeriodKind.MONTH, PeriodKind.YEAR)
COSTS = {"requests": 1, "credits": 150, "peak": 40, "seats": 7}

PLAN = plan_of(
    *(Quota(f"{kind}ly", "requests", 10**6, kind) for kind in (PeriodKind.BILLING, *CALENDAR)),
    FixedWindow("per_day", "requests", 10**6, 24 * HOUR_MS),
    FixedWindow("per_hour", "requests", 10**6, HOUR_MS),
    SlidingWindow("six_hours", "requests", 10**6, 6 * HOUR_MS),
    FixedWindow("credits_a_day", "credits", 10**6, 24 * HOUR_MS),
    Quota("peak_day", "peak", 10**6, PeriodKind.DAY),
    Quota("peak_month", "peak", 10**6, PeriodKind.MONTH),
    Quota("peak_billing", "peak", 10**6, PeriodKind.BILLING),
    Quota("seats_week", "seats", 10**6, PeriodKind.WEEK),
    Quota("seats_billing", "seats", 10**6, PeriodKind.BILLING),
)


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(NOW_MS * 1000)
    return scripts


def run(
    redis_url: str, postgres_url: str, check: Callable[[Stack], Awaitable[None]], *plans: Plan
) -> None:
    async def main() -> None:
        async with stack(redis_url, postgres_url, *plans) as found:
            await check(found)

    asyncio.run(main())


async def seed(s: Stack, plan: Plan, subject: str = "s", now_ms: int = NOW_MS) -> None:
    await s.seeder.seed(subject, s.keyspace.state(subject), plan.limits, now_ms, RUN)


async def flush(s: Stack) -> None:
    await Flusher(s.store, s.database, s.keyspace, MeterRegistry(METERS)).flush_all()


def remaining(scripts: Scripts, s: Stack, plan: Plan, **costs: int) -> dict[str, int]:
    program = compile_program(plan, costs or COSTS, METERS, s.calendars)
    outcome = scripts.admit("s", program, span=SPAN)
    assert outcome.admitted
    return {
        limit.name: answer.remaining
        for limit, answer in zip(program.limits, outcome.limits, strict=True)
    }


async def history(scripts: Scripts, s: Stack) -> None:
    """Months of use, hour by hour at odd moments, flushed now and then."""
    program = compile_program(PLAN, COSTS, METERS, s.calendars)
    days = [(1, 3, 5), (4, 30, 1), (5, 31, 23), (6, 8, 9), (6, 14, 23), (6, 15, 0), (6, 16, 12)]
    today = [(6, 17, 0), (6, 17, 5), (6, 17, 6), (6, 17, 10), (6, 17, 11)]
    for number, (month, day, hour) in enumerate(days + today):
        at = from_datetime(datetime(2026, month, day, hour, 3, tzinfo=UTC))
        scripts.at(at * 1000)
        if number == 0:
            await seed(s, PLAN, now_ms=at)
        for extra in range(number % 3 + 1):
            costs = {**COSTS, "peak": 40 + (number * 31 + extra) % 50, "seats": number}
            program = compile_program(PLAN, costs, METERS, s.calendars)
            span = billing_period(ANCHOR_MS, 1, at)
            assert scripts.admit("s", program, span=span).admitted
        if number % 4 == 2:
            await flush(s)
    scripts.at(NOW_MS * 1000)


def test_every_counter_goes_on_after_a_wipe(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        await history(scripts, s)
        await flush(s)
        key = s.keyspace.state("s")
        kept = scripts.redis.hgetall(key)
        expected = remaining(scripts, s, PLAN)  # what the state that was never lost says
        scripts.redis.flushdb()
        scripts.at(NOW_MS * 1000)
        assert (
            scripts.admit("s", compile_program(PLAN, COSTS, METERS, s.calendars), span=SPAN).status
            is Verdict.COLD
        )
        await seed(s, PLAN)
        state = scripts.state("s")
        assert int(state["epoch"]) == int(kept["epoch"]) + 1
        assert state["ver"] == kept["ver"]
        assert remaining(scripts, s, PLAN) == expected
        assert expected["billingly"] < expected["dayly"]
        # and its totals are those of the ledger plus what came since
        await flush(s)
        rows = await s.database.fetch("ledger_of_subject", "s", 100)
        current = {row["meter"]: row for row in rows if from_ms(row["period_start"]) == SPAN[0]}
        assert current["requests"]["total"] == 10**6 - expected["billingly"]
        assert current["seats"]["total"] == COSTS["seats"]

    run(valkey, database, check, PLAN)


def from_ms(value: Any) -> int:
    return from_datetime(value)


def test_the_first_request_seeds_the_windows_of_the_others(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """After a wipe a route that costs requests alone comes first; credits must not start over."""

    async def check(s: Stack) -> None:
        await history(scripts, s)
        await flush(s)
        expected = remaining(scripts, s, PLAN, credits=150)
        scripts.redis.flushdb()
        scripts.at(NOW_MS * 1000)
        admission = s.admission(PLAN, {"requests": 1})
        await s.seeder.seed("s", s.keyspace.state("s"), admission.program.plan_limits, NOW_MS, RUN)
        assert remaining(scripts, s, PLAN, credits=150) == expected

    run(valkey, database, check, PLAN)


def test_a_plan_change_finds_its_calendar_counters(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """A warm subject lacks a counter: rebuilt from the ledger and the hours that are not in it."""
    before = plan_of(Quota("monthly", "requests", 10**6, PeriodKind.BILLING))
    after = plan_of(
        *(Quota(f"{kind}ly", "requests", 10**6, kind) for kind in CALENDAR),
        Quota("seats_day", "seats", 10**6, PeriodKind.DAY),
        Quota("peak_day", "peak", 10**6, PeriodKind.DAY),
    )

    async def check(s: Stack) -> None:
        program = compile_program(before, COSTS, METERS, {})
        counts = dict.fromkeys(CALENDAR, 0)
        scripts.seed("s")
        moments = [(2, 3, 4), (6, 3, 9), (6, 15, 9), (6, 17, 1), (6, 17, 9), (6, 17, 11)]
        for number, (month, day, hour) in enumerate(moments):
            at = from_datetime(datetime(2026, month, day, hour, 5, tzinfo=UTC))
            scripts.at(at * 1000)
            for _ in range(number + 1):
                scripts.admit("s", program, span=billing_period(ANCHOR_MS, 1, at))
                for kind in CALENDAR:
                    counts[kind] += calendar_period(kind, NOW_MS)[0] <= at
            if number == 3:
                await flush(s)  # the last two hours are in Redis only
        scripts.at(NOW_MS * 1000)
        target = compile_program(after, COSTS, METERS, s.calendars)
        assert scripts.admit("s", target, span=SPAN).status is Verdict.COLD
        state = scripts.state("s")
        await seed(s, after)
        assert {name: scripts.state("s")[name] for name in state} == state  # nothing lowered
        left = remaining(scripts, s, after)
        for kind in CALENDAR:
            assert left[f"{kind}ly"] == 10**6 - counts[kind] - 1, kind
        assert (left["seats_day"], left["peak_day"]) == (10**6 - 7, 10**6 - 40)
        # a request under the old plan leaves the counters behind: they are rebuilt again
        scripts.admit("s", program, span=SPAN)
        assert scripts.admit("s", target, span=SPAN).status is Verdict.COLD
        await seed(s, after)
        assert remaining(scripts, s, after)["dayly"] == left["dayly"] - 2

    run(valkey, database, check, after)


def test_a_change_while_it_is_rebuilt_is_not_overwritten(
    scripts: Scripts, valkey: str, database: str
) -> None:
    quota = plan_of(Quota("daily", "requests", 100, PeriodKind.DAY))

    async def check(s: Stack) -> None:
        scripts.seed("s")
        old = compile_program(plan_of(), {"requests": 1}, METERS, {})
        scripts.admit("s", old, span=SPAN)
        read = s.store.hgetall_many

        async def read_then_change(keys: list[str]) -> Any:
            states = await read(keys)
            scripts.admit("s", old, span=SPAN)
            return states

        s.store.hgetall_many = read_then_change  # type: ignore[method-assign,assignment]
        await seed(s, quota)
        assert s.seeder.stats.conflicts == 1
        assert "q:requests:day" not in scripts.state("s")
        s.store.hgetall_many = read  # type: ignore[method-assign]
        await seed(s, quota)
        assert scripts.state("s")["q:requests:day"].split()[1:] == ["2", "2"]

    run(valkey, database, check, quota)


def test_a_warm_subject_wiped_while_it_is_rebuilt_stays_cold(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """Its calendar counters alone would be a state that starts at zero."""
    quota = plan_of(
        Quota("monthly", "requests", 100, PeriodKind.BILLING),
        Quota("daily", "requests", 100, PeriodKind.DAY),
    )

    async def check(s: Stack) -> None:
        scripts.seed("s")
        old = compile_program(plan_of(), {"requests": 9}, METERS, {})
        scripts.admit("s", old, span=SPAN)
        await flush(s)
        read = s.store.hgetall_many

        async def read_then_wipe(keys: list[str]) -> Any:
            states = await read(keys)
            scripts.redis.delete(s.keyspace.state("s"))
            return states

        s.store.hgetall_many = read_then_wipe  # type: ignore[method-assign,assignment]
        await seed(s, quota)
        assert scripts.state("s") == {}
        s.store.hgetall_many = read  # type: ignore[method-assign]
        await seed(s, quota)
        assert remaining(scripts, s, quota, requests=1) == {"monthly": 90, "daily": 90}

    run(valkey, database, check, quota)


def test_two_seeders_of_one_cold_subject(scripts: Scripts, valkey: str, database: str) -> None:
    """Both claim an epoch; the one that comes late passes its epoch on and lowers nothing."""
    quota = plan_of(Quota("monthly", "requests", 100, PeriodKind.BILLING))

    async def check(s: Stack) -> None:
        async with stack(valkey, database, quota) as other:
            program = compile_program(quota, {"requests": 1}, METERS, {})
            run_many = s.store.run_many

            async def late(*given: Any) -> Any:
                await seed(other, quota)
                for _ in range(5):
                    assert scripts.admit("s", program, span=SPAN).admitted
                return await run_many(*given)

            s.store.run_many = late  # type: ignore[method-assign,assignment]
            await seed(s, quota)
        s.store.run_many = run_many  # type: ignore[method-assign]
        assert scripts.state("s")["epoch"] == "2"
        assert remaining(scripts, s, quota, requests=1) == {"monthly": 94}
        await flush(s)
        rows = await s.database.fetch("ledger_of_subject", "s", 10)
        assert [row["total"] for row in rows] == [6]

    run(valkey, database, check, quota)


def test_a_flush_that_comes_after_the_wipe_is_refused(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """Read before the wipe, stored after the seed: the ledger must not jump past its reader."""
    quota = plan_of(Quota("monthly", "requests", 100, PeriodKind.BILLING))

    async def check(s: Stack) -> None:
        from reconciler.flush import FlushResult

        flusher = Flusher(s.store, s.database, s.keyspace, MeterRegistry(METERS))
        program = compile_program(quota, {"requests": 1}, METERS, {})
        scripts.seed("s")
        for _ in range(5):
            scripts.admit("s", program, span=SPAN)
        await flusher.flush_all()
        for _ in range(3):
            scripts.admit("s", program, span=SPAN)
        late = await flusher._read([s.keyspace.state("s")], FlushResult())
        scripts.redis.delete(s.keyspace.state("s"))
        await seed(s, quota)
        result = FlushResult()
        assert await flusher._commit(late, result) == []
        assert result.overtaken == ["s"]
        await flusher._pass_epochs_on(late, FlushResult())
        assert remaining(scripts, s, quota, requests=1) == {"monthly": 94}
        await flusher.flush_all()
        rows = await s.database.fetch("ledger_of_subject", "s", 10)
        assert [row["total"] for row in rows] == [6]

    run(valkey, database, check, quota)


def test_thresholds_do_not_fire_again_after_a_wipe(
    scripts: Scripts, valkey: str, database: str
) -> None:
    quota = plan_of(Quota("monthly", "requests", 10, PeriodKind.BILLING, Action.OVERAGE))

    async def check(s: Stack) -> None:
        await seed(s, quota)
        events = EventStore(s.store, s.database, s.keyspace, MeterRegistry(METERS))
        program = compile_program(quota, {"requests": 1}, METERS, {})
        for _ in range(9):
            scripts.admit("s", program, span=SPAN)
        assert [event["threshold"] for event in scripts.events()] == ["80", "90"]
        await flush(s)
        await events.store_all()
        scripts.redis.flushdb()
        scripts.at(NOW_MS * 1000)
        await seed(s, quota)
        for _ in range(3):
            scripts.admit("s", program, span=SPAN)
        fired = [(event["kind"], event["threshold"]) for event in scripts.events()]
        assert fired == [("critical", "95"), ("critical", "100"), ("exceeded", "101")]
        await flush(s)
        assert await events.store_all() == 3
        scripts.redis.flushdb()
        scripts.at(NOW_MS * 1000)
        await seed(s, quota)
        scripts.admit("s", program, span=SPAN)
        assert scripts.events() == []
        # what was lost with the stream fires again: nobody has heard of it
        rows = await s.database.fetch("events_of_subject", "s", to_datetime(0))
        assert len(rows) == 5

    run(valkey, database, check, quota)


def test_one_subject_that_cannot_be_rebuilt_does_not_fail_the_others(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """The ledger has cents of a meter that no longer has decimals."""
    quota = plan_of(Quota("monthly", "requests", 10, PeriodKind.BILLING))

    async def check(s: Stack) -> None:
        row = ["bad"], ["requests"], *([to_datetime(at)] for at in SPAN)
        amount = [Decimal("1.5")], [Decimal(0)], [1], [1]
        await s.database.execute("store_periods", *packed(*row, *amount))
        names = ["a", "bad", "b", "c"]
        found = await asyncio.gather(
            *(seed(s, quota, name) for name in names), return_exceptions=True
        )
        assert [type(error) for error in found] == [
            type(None), StoreUnavailableError, type(None), type(None),
        ]  # fmt: skip
        # and the seeder goes on
        await asyncio.wait_for(seed(s, quota, "d"), 5)
        assert [bool(scripts.state(name)) for name in [*names, "d"]] == [True, False] + [True] * 3

    run(valkey, database, check, quota)
