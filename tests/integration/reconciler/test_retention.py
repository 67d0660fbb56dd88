"""Partitions are there ahead; old months become days, and whoever reads sees no difference."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from core.admission.ledger import Catalogue, Wanted, read_ledgers
from core.clock import from_datetime, to_datetime
from core.errors import StoreUnavailableError
from core.period import DAY_MS, HOUR_MS, calendar_bounds
from core.usage import read_usage
from reconciler.retention import RetentionResult
from tests.integration.reconciler.sealing import ANCHOR_MS, World, run

FEBRUARY = from_datetime(datetime(2026, 2, 1, tzinfo=UTC))
APRIL = from_datetime(datetime(2026, 4, 20, tzinfo=UTC))


def month(year: int, number: int) -> datetime:
    return datetime(year, number, 1, tzinfo=UTC)


async def partitions(w: World) -> list[datetime]:
    return [row["month"] for row in await w.p.database.fetch("months_of_hours")]


async def in_default(w: World) -> int:
    (row,) = await w.rows("SELECT count(*) AS n FROM ledger_hours_default")
    return int(row["n"])


async def winter(w: World) -> str:
    """A subscription that was used in January and February (all meters) and is idle since."""
    s = await w.subscribe()
    for days, times, peak, seats in ((0, 3, 5, 7), (1, 2, 9, 4), (1, 1, 2, 6), (20, 4, 1, 8)):
        w.at(w.now_ms + days * DAY_MS + HOUR_MS)
        await w.spend(s, times, requests=1, credits=101, peak=peak, seats=seats)
    w.at(FEBRUARY + 5 * DAY_MS)
    await w.spend(s, 5, requests=1, credits=101, peak=3, seats=2)
    await w.flush()
    return s


async def close_all(w: World) -> None:
    """Seals everything up to April."""
    w.at(APRIL)
    for _ in range(3):
        await w.seal_all()


def test_this_month_and_two_more_have_a_partition(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        w.at(from_datetime(datetime(2031, 11, 30, 23, 59, tzinfo=UTC)))
        assert (await w.retain()).made == 3
        found = await partitions(w)
        assert {month(2031, 11), month(2031, 12), month(2032, 1)} <= set(found)
        assert (await w.retain()).made == 0

    run(valkey, database, check)


def test_rows_of_the_default_move_into_their_month(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await winter(w)
        assert await in_default(w) > 0
        before = await w.p.ledger(s)
        result = await w.retain()
        assert result.made >= 2
        assert await in_default(w) == 0
        assert await w.p.ledger(s) == before
        assert {month(2026, 1), month(2026, 2)} <= set(await partitions(w))

    run(valkey, database, check)


def test_old_months_become_days(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await winter(w)
        await close_all(w)
        result = await w.retain()
        assert result.rolled == 1  # February ended less than 62 days ago
        assert month(2026, 1) not in await partitions(w)
        assert month(2026, 2) in await partitions(w)
        rows = await w.rows(
            "SELECT * FROM ledger_days WHERE subject = $1 ORDER BY meter, day_start", s
        )
        found: dict[str, list[tuple[int, Decimal, Decimal, int]]] = {}
        for row in rows:
            day = (from_datetime(row["day_start"]) - ANCHOR_MS) // DAY_MS + 1
            found.setdefault(row["meter"], []).append(
                (day, row["total"], row["peak_hour"], row["hours"])
            )
        assert found["requests"] == [(0, 3, 3, 1), (1, 2, 2, 1), (2, 1, 1, 1)]
        assert found["peak"] == [(0, 5, 5, 1), (1, 9, 9, 1), (2, 2, 2, 1)]
        assert found["seats"] == [(0, 7, 7, 1), (1, 4, 4, 1), (2, 6, 6, 1)]
        assert [row[1] for row in found["credits"]] == [
            Decimal("3.03"), Decimal("2.02"), Decimal("1.01"),
        ]  # fmt: skip
        w.at(APRIL + 30 * DAY_MS)
        for _ in range(3):
            await w.seal_all()
        assert (await w.retain()).rolled == 1
        assert (await w.retain()).rolled == 0

    run(valkey, database, check)


@pytest.mark.parametrize(
    ("aggregation", "total", "overage"), [("sum", 9, 5), ("max", 6, 4), ("last", 1, 1)]
)
def test_a_day_is_made_of_its_hours_as_the_meter_says(
    valkey: str, database: str, aggregation: str, total: int, overage: int
) -> None:
    async def check(w: World) -> None:
        await w.rows(
            "INSERT INTO meters (name, decimals, aggregation) VALUES ('m', 0, $1)", aggregation
        )
        for hour, value, over in ((3, 2, 0), (5, 6, 4), (23, 1, 1), (8, 0, 0)):
            await w.rows(
                "INSERT INTO ledger_hours VALUES ('s', 'm', $1, $2, $3, $4, 1, 1)",
                to_datetime(0),
                to_datetime(hour * HOUR_MS),
                Decimal(value),
                Decimal(over),
            )
        # a last hour that nothing was counted in says nothing
        if aggregation == "last":
            await w.rows("UPDATE ledger_hours SET hour_start = $1 WHERE total = 0", to_datetime(0))
        w.at(400 * DAY_MS)
        assert (await w.retain()).rolled >= 1
        (row,) = await w.rows("SELECT * FROM ledger_days")
        assert (row["total"], row["overage"], row["peak_hour"], row["hours"]) == (
            total, overage, 6, 4,
        )  # fmt: skip

    run(valkey, database, check)


def test_a_month_waits_for_its_periods_and_for_the_flush(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await winter(w)
        w.at(APRIL)
        assert (await w.retain()).rolled == 0  # not sealed
        await close_all(w)
        key = w.p.keyspace.state(s)
        w.scripts.redis.zadd(w.p.keyspace.dirty(0), {key: FEBRUARY - 1})
        assert (await w.retain()).rolled == 0  # not flushed
        w.scripts.redis.zadd(w.p.keyspace.dirty(0), {key: FEBRUARY})
        assert (await w.retain()).rolled == 1

    run(valkey, database, check)


def test_readers_see_days_where_hours_are_gone(valkey: str, database: str) -> None:
    """The year's quota, a cold state, and usage: the same before and after."""

    async def check(w: World) -> None:
        s = await winter(w)
        await close_all(w)
        await w.flush()
        plan = w.snapshot.plans["small"]
        calendars = {
            name: w.calendars.get(name) or w.calendars["requests"]
            for name in ("requests", "credits", "peak", "seats")
        }
        catalogue = Catalogue(w.snapshot.meters, calendars)

        async def spans(live: dict[str, str]) -> object:
            wanted = {s: Wanted(plan.limits, live)}
            found = await read_ledgers(w.p.database, w.p.registry, catalogue, wanted, w.now_ms)
            return {
                key: (span.total, span.highest, span.last) for key, span in found[s].spans.items()
            }

        live = w.scripts.state(s)
        before = await spans({})
        warm = await spans(live)
        assert len(before) == 4  # type: ignore[arg-type]
        assert (await w.retain(92)).rolled == 0
        assert (await w.retain()).rolled == 1
        assert await spans({}) == before
        assert await spans(live) == warm
        w.evict(s)
        outcome = await w.spend(s)
        assert outcome.limits[1].remaining == 100_000 - 16
        usage = await read_usage(
            w.p.database, w.p.store, w.snapshot, s, hours_from=0, hours_to=w.now_ms + HOUR_MS
        )
        requests = [row for row in usage.hours if row.meter == "requests"]
        assert sum(row.total for row in requests) == 16
        assert sum(row.day for row in requests) == 3

    run(valkey, database, check)


def test_an_idle_state_that_wakes_counts_its_last_hour_once(valkey: str, database: str) -> None:
    """Its hour of January was rolled up; it closes it when it wakes, and stores it again."""

    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 7)
        await w.flush()
        idle = w.scripts.state(s)
        w.evict(s)
        await close_all(w)
        key = w.p.keyspace.state(s)
        assert (await w.retain()).rolled == 1
        # it was in Redis all the time, but for a calendar that nobody counted then
        version = (await w.p.version(s))[1]
        idle = {k: v for k, v in idle.items() if not k.startswith("q:")}
        w.scripts.redis.hset(key, mapping={**idle, "ver": version})
        usage = await read_usage(
            w.p.database, w.p.store, w.snapshot, s, hours_from=0, hours_to=w.now_ms
        )
        assert sum(row.total for row in usage.hours) == 7
        outcome = await w.spend(s)
        assert outcome.limits[1].remaining == 100_000 - 8
        await w.p.flusher.flush_all()
        assert await in_default(w) >= 1
        usage = await read_usage(
            w.p.database, w.p.store, w.snapshot, s, hours_from=0, hours_to=w.now_ms + HOUR_MS
        )
        assert sum(row.total for row in usage.hours) == 8
        w.evict(s)
        assert (await w.spend(s)).limits[1].remaining == 100_000 - 9
        assert (await w.retain()).repeated == 1
        (row,) = await w.rows("SELECT * FROM ledger_days")
        assert (row["total"], row["hours"]) == (7, 1)
        year = calendar_bounds(w.now_ms)[6:]
        rows = await w.p.database.fetch(
            "span_totals", [s], ["requests"], *([to_datetime(at)] for at in year)
        )
        assert rows[0]["total"] == 8

    run(valkey, database, check)


def test_a_month_is_locked_for_a_moment_or_not_at_all(valkey: str, database: str) -> None:
    """Whoever reads hours is not waited for longer than a second; the month is whole meanwhile."""

    async def check(w: World) -> None:
        s = await winter(w)
        await close_all(w)
        await w.flush()
        before = await w.p.ledger(s)
        assert (await w.retain(400)).made >= 1
        async with w.p.database.transaction() as reader:
            await reader.execute("consistent_read")
            await reader.execute("keep_hours")
            with pytest.raises(StoreUnavailableError, match=r"drop_hours_partition.*lock"):
                await w.retain()
        assert await w.p.ledger(s) == before
        assert await w.rows("SELECT * FROM ledger_days") == []
        # two at once: one of them may find the lock taken, and tries again later
        tried = await asyncio.gather(w.retain(), w.retain(), return_exceptions=True)
        found = [one for one in tried if isinstance(one, RetentionResult)]
        found.append(await w.retain())
        assert sum(one.rolled for one in found) == 1
        # the periods are as they were, and every hour is one or part of a day
        after = await w.p.ledger(s)
        assert {k: v for k, v in after.items() if len(k) == 2} == {
            k: v for k, v in before.items() if len(k) == 2
        }
        assert sum(v[0] for k, v in after.items() if len(k) == 3) == sum(
            v[0] for k, v in before.items() if len(k) == 3
        )

    run(valkey, database, check)
