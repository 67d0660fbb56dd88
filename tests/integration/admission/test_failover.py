"""A server that came back with older data, while others still act upon what it had before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest

from core.admission.program import compile_program
from core.admission.reopen import Lacking
from core.clock import from_datetime
from core.meters import MeterRegistry
from core.period import billing_period
from core.policy import PeriodKind, Quota
from reconciler.flush import Flusher, FlushResult
from tests.integration.admission.stack import METERS, Stack, stack
from tests.support.scripts import RUN, Scripts, plan_of

NOW_MS = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
SPAN = billing_period(0, 1, NOW_MS)
PLAN = plan_of(Quota("monthly", "requests", 100, PeriodKind.BILLING))
PROGRAM = compile_program(PLAN, {"requests": 1}, METERS, {})


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(NOW_MS * 1000)
    scripts.seed("s")
    return scripts


def hit(scripts: Scripts, times: int) -> None:
    for _ in range(times):
        assert scripts.admit("s", PROGRAM, span=SPAN).admitted


def run(valkey: str, database: str, check: Callable[[Stack, Flusher], Awaitable[None]]) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:

            async def repair(subjects: list[str]) -> None:
                for subject in subjects:
                    await s.seeder.restore(subject, s.keyspace.state(subject), RUN, Lacking())

            registry = MeterRegistry(METERS)
            await check(s, Flusher(s.store, s.database, s.keyspace, registry, repair=repair))

    asyncio.run(main())


async def total(s: Stack) -> int:
    return int((await s.database.fetch("ledger_of_subject", "s", 10))[0]["total"])


def test_a_flush_of_the_server_before_is_refused_once_its_successor_was_verified(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """Else the ledger would be ahead of a state that is in use, and fall back later."""

    async def check(s: Stack, flusher: Flusher) -> None:
        key = s.keyspace.state("s")
        hit(scripts, 5)
        await flusher.flush_all()
        hit(scripts, 2)
        lagging = scripts.redis.hgetall(key)
        hit(scripts, 3)
        late = await flusher._read([key], FlushResult())
        scripts.redis.delete(key)
        scripts.redis.hset(key, mapping=lagging)  # type: ignore[arg-type]
        scripts.run = "another run"
        await s.seeder.seed("s", key, PLAN.limits, NOW_MS, scripts.run)
        assert await flusher._commit(late, FlushResult()) == []
        hit(scripts, 1)
        result = await flusher.flush_all()  # is told its epoch, if it was not
        await flusher.flush_all()
        assert (result.behind, await total(s)) == ([], 8)

    run(valkey, database, check)


def test_a_verified_state_that_is_behind_is_repaired(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """As of a seeder that was stopped for so long that its subject had been active and evicted."""

    async def check(s: Stack, flusher: Flusher) -> None:
        key = s.keyspace.state("s")
        hit(scripts, 2)
        old = scripts.redis.hgetall(key)
        hit(scripts, 3)
        await flusher.flush_all()
        scripts.redis.delete(key)
        scripts.redis.hset(key, mapping=old)  # type: ignore[arg-type]
        hit(scripts, 1)
        result = await flusher.flush_all()
        assert (result.behind, result.repaired) == (["s"], 1)
        hit(scripts, 1)
        assert (await flusher.flush_all()).behind == []
        assert await total(s) == 6

    run(valkey, database, check)
