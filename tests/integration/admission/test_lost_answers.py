"""Batches that Redis counted and whose answers never came: what they counted is taken back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from core import clock
from core.errors import StoreUnavailableError
from core.policy import PeriodKind, Quota
from gateway.admission.check import Unresolved
from gateway.outage.memory import MemoryJournal
from tests.integration.admission.stack import Stack, stack
from tests.support import wait_until_async
from tests.support.scripts import plan_of

PLAN = plan_of(Quota("monthly", "requests", 10**6, PeriodKind.BILLING))
FOREVER = (0, 2**42)


async def count(s: Stack) -> int:
    state = (await s.store.hgetall_many([s.keyspace.state("s")]))[0]
    return int(state["m:requests"].split()[0]) if "m:requests" in state else 0


async def seed(s: Stack) -> None:
    await s.seeder.seed("s", s.keyspace.state("s"), PLAN.limits, clock.now_ms(), s.batcher.run)


def submit(s: Stack) -> asyncio.Future[object]:
    program = s.admission(PLAN).program
    key = s.keyspace.state("s")
    return s.batcher.submit(program, (key,), *FOREVER, "lease", "s")  # type: ignore[return-value]


async def lose(s: Stack, batches: int) -> list[asyncio.Future[object]]:
    """So many batches that Redis counts and whose answers are not read."""
    before = await count(s)
    connection = s.batcher._connection
    assert connection is not None
    assert connection._transport is not None
    connection._transport.pause_reading()
    futures = []
    for _ in range(batches):
        futures.append(submit(s))
        await asyncio.sleep(0)  # another tick, another batch
        await asyncio.sleep(0)

    async def counted() -> bool:
        return await count(s) == before + batches

    await wait_until_async(counted)
    connection.close("lost")
    for future in futures:
        with pytest.raises(StoreUnavailableError):
            await asyncio.wait_for(future, 5)
    return futures


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_every_batch_that_was_under_way_is_taken_back(
    valkey: str, database: str, in_flight: int
) -> None:
    async def main() -> None:
        journal = MemoryJournal()
        async with stack(valkey, database, PLAN, max_in_flight=in_flight, journal=journal) as s:
            # as if all that time had passed: their deadline is what the replay waits for
            told = s.batcher._on_unresolved
            assert told is not None

            def passed(batch: Unresolved) -> None:
                told(replace(batch, deadline_ms=0))

            s.batcher._on_unresolved = passed
            await seed(s)
            await submit(s)
            await lose(s, in_flight)
            assert journal.pending_records == in_flight
            await wait_until_async(lambda: s.batcher.connected)
            while await s.replay.once():
                pass
            assert await count(s) == 1
            await submit(s)
            assert await count(s) == 2

    asyncio.run(main())


def test_a_worker_that_ends_takes_back_what_waits(valkey: str, database: str) -> None:
    """Without a directory for the journal nobody else could."""

    async def main() -> None:
        journal = MemoryJournal()
        async with stack(valkey, database, PLAN, journal=journal) as s:
            await seed(s)
            await submit(s)
            await lose(s, 1)
            await wait_until_async(lambda: s.batcher.connected)
            assert (await count(s), journal.pending_records) == (2, 1)
            await s.replay.close(60)
            assert (await count(s), journal.pending_records) == (1, 0)

    asyncio.run(main())


def test_a_batch_that_cannot_be_written_down_leaves_nobody_waiting(
    valkey: str, database: str
) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:

            def broken(_: Unresolved) -> None:
                raise KeyError("a meter that a reload dropped")

            s.batcher._on_unresolved = broken
            await seed(s)
            await lose(s, 1)

    asyncio.run(main())
