"""Limit events: at least once out of the stream, once into the table."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import pytest

from core.admission.program import Program, compile_program
from core.clock import from_datetime, to_datetime
from core.errors import StoreUnavailableError
from core.period import billing_period
from core.policy import Action, PeriodKind, Quota
from tests.integration.reconciler.parts import METERS, Parts, parts
from tests.integration.reconciler.test_flush import START_MS
from tests.support.scripts import Scripts, plan_of

QUOTA = Quota("monthly", "credits", 1_000, PeriodKind.BILLING, Action.OVERAGE)
SPAN = billing_period(0, 1, START_MS)


def program(cost: int) -> Program:
    return compile_program(plan_of(QUOTA), {"credits": cost}, METERS, {})


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    scripts.seed("s")
    return scripts


def run(
    redis_url: str, postgres_url: str, check: Callable[[Parts], Awaitable[None]], **options: Any
) -> None:
    async def main() -> None:
        async with parts(redis_url, postgres_url, **options) as found:
            await check(found)

    asyncio.run(main())


async def stored(p: Parts) -> list[tuple[str, int, Decimal]]:
    rows = await p.database.fetch("events_of_subject", "s", to_datetime(0))
    assert all(row["limit_quantity"] == Decimal("10.00") for row in rows)
    return [(row["kind"], row["threshold"], row["usage"]) for row in rows]


def test_thresholds_arrive_once_and_in_units_of_the_meter(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        scripts.admit("s", program(905))
        scripts.admit("s", program(200))
        assert await p.events.store_all() == 5
        used = Decimal("11.05")
        assert await stored(p) == [
            ("warning", 80, Decimal("9.05")),
            ("warning", 90, Decimal("9.05")),
            ("critical", 95, used),
            ("critical", 100, used),
            ("exceeded", 100, used),
        ]
        assert scripts.events() == []
        assert await p.events.store_all() == 0
        # the next period tells of its beginning, and starts over
        scripts.at((SPAN[1] + 5) * 1000)
        scripts.admit("s", program(850))
        assert await p.events.store_all() == 2
        rows = await p.database.fetch("events_of_subject", "s", to_datetime(SPAN[1]))
        assert [row["kind"] for row in rows] == ["reset", "warning"]
        assert rows[0]["usage"] == used
        assert from_datetime(rows[0]["period_start"]) == SPAN[1]

    run(valkey, database, check, batch=2)


def test_an_event_delivered_twice_is_one_row(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        scripts.admit("s", program(850))
        delete = p.store.delete_entries

        async def lost(*_: object) -> None:
            raise StoreUnavailableError("the connection broke before the entries were deleted")

        p.store.delete_entries = lost  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailableError):
            await p.events.store_all()
        assert len(await stored(p)) == 1
        assert len(scripts.events()) == 1
        p.store.delete_entries = delete  # type: ignore[method-assign]
        assert await p.events.store_all() == 0
        assert scripts.events() == []
        # and once more under another stream entry, as a wiped Redis would send it
        scripts.redis.delete(p.keyspace.state("s"))
        scripts.seed("s")
        scripts.admit("s", program(850))
        assert len(scripts.events()) == 1
        assert await p.events.store_all() == 0
        assert len(await stored(p)) == 1

    run(valkey, database, check)


def test_two_processes_moving_the_same_events(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        seen: list[str] = []
        for number in range(40):
            scripts.seed(f"t{number}")
            scripts.admit(f"t{number}", program(960))
        async with parts(valkey, database, batch=7) as other:
            other.events._on_event = p.events._on_event = seen.append
            moved = await asyncio.gather(p.events.store_all(), other.events.store_all())
        assert sum(moved) == 120
        assert sorted(seen) == ["critical"] * 40 + ["warning"] * 80
        assert scripts.events() == []

    run(valkey, database, check, batch=11)


def test_an_event_that_cannot_be_stored_does_not_stop_the_others(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        scripts.admit("s", program(810))
        good = scripts.events()[0]
        for damage in ({"kind": "birthday"}, {"start": "soon"}, {"end": "9" * 18}, {"key": "x"}):
            scripts.redis.xadd(p.keyspace.events(0), {**good, **damage})
        scripts.redis.xadd(p.keyspace.events(0), {"what": "this"})
        scripts.admit("s", program(95))
        assert await p.events.store_all() == 2
        assert [row[1] for row in await stored(p)] == [80, 90]
        assert scripts.events() == []

    run(valkey, database, check)
