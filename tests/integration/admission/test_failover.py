"""A server that came back with older data, while others still act upon what it had before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from cli.embedded import EmbeddedValkey
from core.admission.ingest import Ingest, Ingestor, UsageEvent
from core.admission.program import compile_program
from core.admission.reopen import Lacking
from core.clock import from_datetime
from core.meters import MeterRegistry
from core.period import billing_period
from core.policy import PeriodKind, Quota
from reconciler.flush import Flusher, FlushResult
from tests.integration.admission.stack import METERS, Stack, stack
from tests.support import free_port, wait_until_async
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


def test_a_usage_event_is_never_counted_on_what_a_lagging_server_has(
    database: str, server_dir: Path
) -> None:
    """Its states still say that they were verified in the run which the reporter knew."""

    async def main(server: EmbeddedValkey) -> None:
        async with stack(server.url, database, PLAN) as s:
            key, flusher = (
                s.keyspace.state("s"),
                Flusher(s.store, s.database, s.keyspace, MeterRegistry(METERS)),
            )
            ingestor = Ingestor(s.store, s.database, s.seeder, s.keyspace, METERS, {})

            async def report(name: str) -> Ingest:
                event = UsageEvent(name, "requests", Decimal(1), 0)
                return (await ingestor.count("s", PLAN, 0, event)).outcome

            assert await report("a") is Ingest.COUNTED
            lagging = await s.store._client.hgetall(key)
            for name in "bc":
                assert await report(name) is Ingest.COUNTED
            await flusher.flush_all()
            server.kill()
            server.start()
            await wait_until_async(s.store.run_id, what="the store's reconnection")
            await s.store._client.delete(key)
            await s.store._client.hset(key, mapping=lagging)
            assert await report("d") is Ingest.COUNTED
            await flusher.flush_all()
            assert await total(s) == 4

    with EmbeddedValkey(server_dir / "v", port=free_port(), appendfsync="always") as server:
        asyncio.run(main(server))


@pytest.mark.parametrize("known", ["", "a run"])
def test_where_nobody_may_ask_for_the_run_states_are_taken_as_they_are(
    scripts: Scripts, known: str
) -> None:
    """Of an older release without that field, or verified by a process that may ask."""
    scripts.redis.hdel(scripts.keyspace.state("s"), "run")
    if known:
        scripts.redis.hset(scripts.keyspace.state("s"), "run", known)
    scripts.run = ""
    hit(scripts, 1)
    change = ("requests", 1, 3, *SPAN, NOW_MS, "")
    assert scripts.settle(("adjust", "s", "", *change), sender="x", number=1, run="") == [1]
    assert scripts.state("s")["m:requests"].split()[0] == "4"
