"""A wiped subject goes on from the latest that the ledger has; no closed row is written again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from decimal import Decimal

import asyncpg
import pytest

from core.admission.baseline import cold_fields
from core.admission.ledger import Catalogue, Wanted, read_ledgers
from core.admission.program import Verdict, calendar_use, compile_program
from core.clock import from_datetime, to_datetime
from core.db import connect_pool
from core.meters import MeterRegistry
from core.period import HOUR_MS, Span, billing_period
from core.policy import (
    Action,
    Aggregation,
    FixedWindow,
    Limit,
    Meter,
    PeriodKind,
    Plan,
    Quota,
    SlidingWindow,
)
from reconciler.events import EventStore
from reconciler.flush import Flusher
from tests.integration.admission.stack import METERS, Stack, stack
from tests.support.ledger import packed
from tests.support.scripts import RUN, Outcome, Scripts, plan_of

ANCHOR_MS = from_datetime(datetime(2026, 3, 10, 6, 30, tzinfo=UTC))
SPAN = billing_period(ANCHOR_MS, 1, ANCHOR_MS)
REQUESTS = MeterRegistry(METERS)
MONTHLY = Quota("monthly", "requests", 10**6, PeriodKind.BILLING, Action.OVERAGE)
DAILY = Quota("daily", "requests", 10**6, PeriodKind.DAY)


class World:
    """One subject `s` on a plan, at a time that the test sets."""

    def __init__(self, s: Stack, scripts: Scripts, plan: Plan) -> None:
        self.s, self.scripts, self.plan = s, scripts, plan
        self.span: Span = SPAN
        self.flusher = Flusher(s.store, s.database, s.keyspace, REQUESTS)

    def at(self, now_ms: int, span: Span | None = None) -> None:
        self.scripts.at(now_ms * 1000)
        self.span = span or billing_period(ANCHOR_MS, self.plan.interval_months, now_ms)

    async def hit(self, times: int = 1, **costs: int) -> Outcome:
        for _ in range(times):
            outcome = self._ask(costs)
            if outcome.status is Verdict.COLD:
                await self.s.seeder.seed(
                    "s", self.s.keyspace.state("s"), self.plan.limits, self.scripts.now_ms, RUN
                )
                outcome = self._ask(costs)
            assert outcome.admitted, outcome
        return outcome

    def _ask(self, costs: dict[str, int]) -> Outcome:
        program = compile_program(self.plan, costs or {"requests": 1}, METERS, self.s.calendars)
        return self.scripts.admit("s", program, span=self.span)

    async def flush(self) -> dict[tuple[str, int], Decimal]:
        """Flushes; totals by meter and period start."""
        await self.flusher.flush_all()
        rows = await self.s.database.fetch("ledger_of_subject", "s", 100)
        return {(row["meter"], from_datetime(row["period_start"])): row["total"] for row in rows}

    def wipe(self) -> None:
        now_us = self.scripts.now_us
        self.scripts.redis.flushdb()
        self.scripts.at(now_us)


def run(
    redis_url: str, postgres_url: str, check: Callable[[World], Awaitable[None]], *limits: Limit
) -> None:
    async def main() -> None:
        plan = plan_of(*(limits or (MONTHLY, DAILY)))
        async with stack(redis_url, postgres_url, plan) as found:
            await check(World(found, Scripts(redis_url), plan))

    asyncio.run(main())


@pytest.mark.parametrize("months", [0, 1, 2, 5])
def test_a_longer_interval_does_not_overwrite_the_months(
    valkey: str, database: str, months: int
) -> None:
    """The year begins where the first month began: the same key in the ledger."""

    async def check(w: World) -> None:
        for month in range(3):
            w.at(ANCHOR_MS + month * 31 * 24 * HOUR_MS + 1)
            await w.hit(50 + month)
            await w.flush()
        before = await w.flush()
        assert list(before.values()) == [52, 51, 50]
        w.wipe()
        w.plan = Plan("plan", w.plan.limits, 12)
        w.at(ANCHOR_MS + (2 + months) * 31 * 24 * HOUR_MS + 2)
        outcome = await w.hit()
        after = await w.flush()
        if months == 0:  # what had begun goes on to its end
            last = max(before)
            assert after == {**before, last: 53}
            assert outcome.limits[0].remaining == 10**6 - 53
        else:
            ended = billing_period(ANCHOR_MS, 1, max(start for _, start in before))[1]
            assert after == {**before, ("requests", ended): 1}

    run(valkey, database, check)


@pytest.mark.parametrize("behind_ms", [500, 2 * HOUR_MS])
def test_a_server_whose_clock_is_behind_takes_nothing_back(
    valkey: str, database: str, behind_ms: int
) -> None:
    """A replacement Redis still lives in the hour, day, window and period before."""
    start = from_datetime(datetime(2026, 6, 1, tzinfo=UTC))
    span = start, start + 720 * HOUR_MS
    windows = (
        FixedWindow("w", "requests", 100, HOUR_MS),
        SlidingWindow("s", "requests", 100, HOUR_MS),
    )

    async def check(w: World) -> None:
        w.at(start + 1000, span)
        await w.hit(7)
        before = await w.flush()
        hours = await w.s.database.fetch("hours_of_subject", "s", *map(to_datetime, span))
        w.wipe()
        w.at(start - behind_ms, (start - 720 * HOUR_MS, start))
        outcome = await w.hit()
        left = [100 - 8, 100 - 8, 10**6 - 8, 10**6 - 8]
        assert [limit.remaining for limit in outcome.limits] == left
        assert await w.flush() == {key: total + 1 for key, total in before.items()}
        w.at(start + 2000, span)
        outcome = await w.hit()
        assert [limit.remaining for limit in outcome.limits] == [x - 1 for x in left]
        assert await w.flush() == {("requests", start): 9}
        rows = await w.s.database.fetch("hours_of_subject", "s", *map(to_datetime, span))
        assert [row["total"] for row in hours] == [7]
        assert [row["total"] for row in rows] == [9]
        # and a warm subject that lacks a counter keeps to the later day too
        w.scripts.redis.hdel(w.s.keyspace.state("s"), "q:requests:day")
        w.at(start - behind_ms, (start - 720 * HOUR_MS, start))
        outcome = await w.hit()
        assert [limit.remaining for limit in outcome.limits] == [x - 2 for x in left]

    run(valkey, database, check, *windows, MONTHLY, DAILY)


def test_the_end_of_a_period_is_told_also_when_redis_was_wiped_before(
    valkey: str, database: str
) -> None:
    async def check(w: World) -> None:
        w.at(ANCHOR_MS + 5)
        await w.hit(4)
        await w.flush()
        w.wipe()
        w.at(SPAN[1] + 3 * HOUR_MS)
        await w.hit(2)
        events = [(event["limit"], event["kind"], event["used"]) for event in w.scripts.events()]
        assert events == [("monthly", "reset", "4"), ("daily", "reset", "4")]
        assert await w.flush() == {("requests", SPAN[0]): 4, ("requests", SPAN[1]): 2}
        w.wipe()
        await w.hit()
        assert w.scripts.events() == []

    run(valkey, database, check)


def test_a_wipe_while_a_meter_is_out_of_the_configuration(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        await REQUESTS.pin(w.s.database)
        w.at(ANCHOR_MS + 5)
        await w.hit(3, requests=1, credits=125)
        assert (await w.flush())["credits", SPAN[0]] == Decimal("3.75")
        w.wipe()
        without = {"requests": Meter("requests")}
        catalogue, registry = w.s.seeder._catalogue, w.s.seeder._registry
        w.s.seeder._catalogue = lambda: Catalogue(without, {"requests": (PeriodKind.DAY,)})
        w.s.seeder._registry = MeterRegistry(without)
        await w.hit()
        assert w.scripts.state("s")["m:credits"] == "375 0 375 0 0"
        w.s.seeder._catalogue, w.s.seeder._registry = catalogue, registry
        await w.hit(1, credits=125)
        assert await w.flush() == {
            ("requests", SPAN[0]): 4,
            ("credits", SPAN[0]): Decimal("5.00"),
        }

    run(valkey, database, check)


def test_a_last_value_outlives_hours_without_one(valkey: str, database: str) -> None:
    yearly = Quota("year", "seats", 10, PeriodKind.YEAR)

    async def check(w: World) -> None:
        w.at(ANCHOR_MS)
        await w.hit(1, seats=5)
        for number in range(1, 4):
            await w.flush()
            w.wipe()
            w.at(ANCHOR_MS + number * HOUR_MS)
            await w.hit()
            assert w.scripts.state("s")["q:seats:year"].split()[1] == "5"

    run(valkey, database, check, MONTHLY, yearly)


def test_thresholds_fired_are_those_of_the_limits_last_height(valkey: str, database: str) -> None:
    def height(limit: int) -> Plan:
        return plan_of(Quota("monthly", "requests", limit, PeriodKind.BILLING, Action.OVERAGE))

    async def check(w: World) -> None:
        events = EventStore(w.s.store, w.s.database, w.s.keyspace, REQUESTS)
        w.at(ANCHOR_MS + 5)
        for plan in (height(5), height(50)):
            w.plan = plan
            await w.hit(41 - 35 * (plan.limits[0].limit == 5))  # type: ignore[union-attr]
        await w.flush()
        await events.store_all()
        assert w.scripts.state("s")["t:monthly"] == f"{SPAN[0]} 90 50"
        w.wipe()
        await w.s.seeder.seed("s", w.s.keyspace.state("s"), w.plan.limits, w.scripts.now_ms, RUN)
        assert w.scripts.state("s")["t:monthly"] == f"{SPAN[0]} 90 50"
        await w.hit()
        assert w.scripts.state("s")["t:monthly"] == f"{SPAN[0]} 95 50"
        assert [event["threshold"] for event in w.scripts.events()] == ["95"]

    run(valkey, database, check, *height(5).limits)


async def _fill(url: str, subjects: int, hours: int) -> None:
    connection = await asyncpg.connect(url)
    month = "date_trunc('month', timestamptz '2026-06-26 00:00+00', 'UTC')"
    await connection.execute(
        f"""INSERT INTO ledger_hours
                (subject, meter, period_start, hour_start, total, epoch, version)
            SELECT 's' || s, 'requests', {month}, {month} + h * interval '1 hour', 5, 1, 1
            FROM generate_series(1, {subjects}) s, generate_series(0, {hours - 1}) h"""
    )
    await connection.execute(
        f"""INSERT INTO ledger_periods
                (subject, meter, period_start, period_end, total, epoch, version)
            SELECT 's' || s, 'requests', {month}, {month} + interval '30 days', {5 * hours}, 1, 1
            FROM generate_series(1, {subjects}) s"""
    )
    await connection.close()


def test_hundreds_of_wiped_subjects_do_not_hold_up_the_loop(database: str) -> None:
    """200 subjects of 600 hours each: the sums are made by Postgres."""
    now = from_datetime(datetime(2026, 6, 26, tzinfo=UTC))
    plan = plan_of(
        Quota("day", "requests", 1, PeriodKind.DAY),
        Quota("month", "requests", 1, PeriodKind.MONTH),
        SlidingWindow("sliding", "requests", 1, 24 * HOUR_MS),
    )
    catalogue = Catalogue(METERS, calendar_use([plan]))
    subjects = [f"s{number}" for number in range(1, 201)]

    async def main() -> tuple[float, set[str]]:
        await _fill(database, len(subjects), 600)
        pool = await connect_pool(database, size=2, timeout_s=30)
        worst, last = 0.0, time.process_time()

        async def tick() -> None:  # in CPU time: other processes of the machine do not count
            nonlocal worst, last
            while True:
                last = time.process_time()
                await asyncio.sleep(0)
                worst = max(worst, time.process_time() - last)

        ticking = asyncio.create_task(tick())
        wanted = {subject: Wanted(plan.limits, {}) for subject in subjects}
        found = await read_ledgers(pool, MeterRegistry(METERS), catalogue, wanted, now)
        ticking.cancel()
        await pool.close()
        fields: Iterable[dict[str, str]] = (
            cold_fields(found[subject], METERS, catalogue.calendars, plan.limits, now)
            for subject in subjects
        )
        return worst, {str(sorted(row.items())) for row in fields}

    worst, states = asyncio.run(main())
    assert len(states) == 1
    assert "3000 0" in states.pop()
    assert worst < 0.15


def test_all_aggregations_in_one_statement(database: str) -> None:
    """A row a span; a span of nothing is left out."""

    async def main() -> None:
        pool = await connect_pool(database, size=2, timeout_s=30)
        start, end = map(to_datetime, SPAN)
        hours = [SPAN[0] - SPAN[0] % HOUR_MS + n * HOUR_MS for n in range(4)]
        totals = [3, 9, 4, 0]
        for meter in ("requests", "peak", "seats"):
            amount = [Decimal(10)], [Decimal(0)], [1], [1]
            row = ["s"], [meter], [start]
            await pool.execute("store_periods", *packed(*row, [end], *amount))
            for hour, total in zip(hours, totals, strict=True):
                amount = [Decimal(total)], [Decimal(0)], [1], [1]
                await pool.execute("store_hours", *packed(*row, [to_datetime(hour)], *amount))
        kinds = dict.fromkeys(("requests", "peak", "seats"), (PeriodKind.DAY, PeriodKind.YEAR))
        wanted = {"s": Wanted((), {}), "nobody": Wanted((), {})}
        found = await read_ledgers(
            pool, MeterRegistry(METERS), Catalogue(METERS, kinds), wanted, hours[3]
        )
        fields = cold_fields(found["s"], METERS, kinds, (), hours[3])
        totals_of = {name: fields[f"q:{name}:day"].split()[1] for name in kinds}
        assert totals_of == {"requests": "16", "peak": "9", "seats": "4"}
        assert found["nobody"].records == {}
        await pool.close()

    assert METERS["seats"].aggregation is Aggregation.LAST
    asyncio.run(main())
