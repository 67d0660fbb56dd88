"""Meters are pinned: a count is read as it was counted, whatever the configuration says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from decimal import Decimal

import pytest

from core.admission.program import Program, compile_program
from core.clock import to_datetime
from core.db import connect_pool
from core.errors import ConfigError
from core.meters import MeterRegistry
from core.policy import Action, Aggregation, Meter, PeriodKind, Quota
from tests.integration.reconciler.parts import METERS, Parts, parts
from tests.integration.reconciler.test_flush import SPAN, START_MS, spend
from tests.support.scripts import Scripts, plan_of

REQUESTS = {"requests": Meter("requests")}


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


def run(
    redis_url: str,
    postgres_url: str,
    check: Callable[[Parts], Awaitable[None]],
    meters: Mapping[str, Meter] = METERS,
) -> None:
    async def main() -> None:
        async with parts(redis_url, postgres_url, meters=meters) as found:
            await check(found)

    asyncio.run(main())


async def pin(p: Parts, meters: Mapping[str, Meter]) -> MeterRegistry:
    registry = MeterRegistry(meters)
    await registry.pin(p.database)
    return registry


def test_the_first_use_pins_a_meter(valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        first = await pin(p, METERS)
        assert first.pinned
        await pin(p, METERS)
        await pin(p, METERS | {"credits": replace(METERS["credits"], unit="euro")})
        other = METERS | {
            "credits": Meter("credits", aggregation=Aggregation.MAX),
            "new": Meter("n"),
        }
        with pytest.raises(ConfigError) as caught:
            await pin(p, other)
        assert [problem.split(" since")[0] for problem in caught.value.problems] == [
            "meters.credits.decimals: 0: pinned as 2",
            "meters.credits.aggregation: max: pinned as sum",
        ]
        # and nothing of a refused configuration is pinned
        names = [row["name"] for row in await p.database.fetch("read_meters")]
        assert sorted(names) == ["credits", "requests"]

    run(valkey, database, check)


def test_two_processes_pin_the_same_meter_differently_at_once(valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        for number in range(10):
            name = f"m{number}"
            found = await asyncio.gather(
                *(pin(p, {name: Meter(name, decimals=decimals)}) for decimals in (1, 2)),
                return_exceptions=True,
            )
            assert sorted(type(item).__name__ for item in found) == ["ConfigError", "MeterRegistry"]

    run(valkey, database, check)


def test_pinning_waits_for_postgres_and_its_tables(empty_database: str) -> None:
    async def main() -> None:
        from core.db.migrate import migrate

        database = await connect_pool(empty_database, size=2, timeout_s=5)
        try:
            registry = MeterRegistry(METERS)
            assert not await registry.try_pin(database)
            waiting = asyncio.create_task(registry.pin_until_done(database))
            await migrate(empty_database)
            await asyncio.wait_for(waiting, 5)
            assert registry.pinned
        finally:
            await database.close()

    asyncio.run(main())


def test_a_meter_taken_out_is_flushed_on(scripts: Scripts, valkey: str, database: str) -> None:
    async def before(p: Parts) -> None:
        await p.registry.pin(p.database)
        spend(scripts, "s", 2, credits=125)
        await p.flusher.flush_all()

    async def after(p: Parts) -> None:
        """A new process, which does not know the meter but for the ledger."""
        assert p.registry.get("credits") is None
        spend(scripts, "s", 3, credits=125)
        result = await p.flusher.flush_all()
        assert (result.stored, result.clean, result.unreadable) == (1, 1, [])
        ledger = await p.ledger("s")
        assert ledger == await p.live("s")
        assert ledger["credits", SPAN[0]] == (Decimal("6.25"), 0)

    run(valkey, database, before)
    run(valkey, database, after, REQUESTS)


def test_a_meter_of_a_newer_configuration_is_looked_up(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """A gateway has reloaded, this process has not."""

    async def check(p: Parts) -> None:
        await p.registry.pin(p.database)
        await pin(p, METERS)
        spend(scripts, "s", 3, credits=125)
        assert (await p.flusher.flush_all()).clean == 1
        assert (await p.ledger("s"))["credits", SPAN[0]] == (Decimal("3.75"), 0)

    run(valkey, database, check, REQUESTS)


def test_an_event_waits_for_its_meter_and_those_behind_it_do_not(
    scripts: Scripts, valkey: str, database: str
) -> None:
    quotas = (
        Quota("paid", "credits", 1_000, PeriodKind.BILLING, Action.OVERAGE),
        Quota("monthly", "requests", 10, PeriodKind.BILLING, Action.OVERAGE),
    )
    plan = plan_of(*quotas)

    async def check(p: Parts) -> None:
        both = compile_program(plan, {"requests": 1, "credits": 90}, METERS, {})
        scripts.seed("s")
        for _ in range(9):
            scripts.admit("s", both)
        kinds = [event["meter"] for event in scripts.events()]
        assert kinds == ["requests", "credits", "requests"]
        for _ in range(2):
            await p.events.store_all()
            assert [event["meter"] for event in scripts.events()] == ["credits"]
        await pin(p, METERS)
        assert await p.events.store_all() == 1
        assert scripts.events() == []
        rows = await p.database.fetch("events_of_subject", "s", to_datetime(0))
        usage = {row["limit_name"]: (row["usage"], row["limit_quantity"]) for row in rows}
        assert usage["paid"] == (Decimal("8.10"), Decimal("10.00"))
        assert len(rows) == 3

    run(valkey, database, check, REQUESTS)


def test_a_raised_limit_fires_its_thresholds_again(
    scripts: Scripts, valkey: str, database: str
) -> None:

    def limited(limit: int) -> Program:
        quota = Quota("monthly", "requests", limit, PeriodKind.BILLING, Action.OVERAGE)
        return compile_program(plan_of(quota), {"requests": 1}, METERS, {})

    async def check(p: Parts) -> None:
        scripts.seed("s")
        for program, times in ((limited(5), 6), (limited(50), 41)):
            for _ in range(times):
                scripts.admit("s", program)
            await p.events.store_all()
            await p.events.store_all()
        rows = await p.database.fetch("events_of_subject", "s", to_datetime(0))
        warnings = [row["limit_quantity"] for row in rows if row["threshold"] == 80]
        assert warnings == [5, 50]

    run(valkey, database, check)
