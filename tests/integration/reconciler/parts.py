"""The reconciler's parts on real servers, and what is compared afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from core import clock
from core.db import Database, connect_pool
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.policy import Meter
from core.redis.store import Store
from reconciler.events import EventStore
from reconciler.flush import Flusher
from reconciler.snapshot import read_state

METERS: Mapping[str, Meter] = {
    "requests": Meter("requests"),
    "credits": Meter("credits", unit="credit", decimals=2),
}

Ledger = dict[tuple[object, ...], tuple[Decimal, Decimal]]


@dataclass
class Parts:
    store: Store
    database: Database
    flusher: Flusher
    events: EventStore
    keyspace: Keyspace
    registry: MeterRegistry

    async def ledger(self, subject: str) -> Ledger:
        """Total and overage by (meter, period start) and by (meter, period start, hour)."""
        found: Ledger = {}
        for row in await self.database.fetch("ledger_of_subject", subject, 1_000):
            key = (row["meter"], clock.from_datetime(row["period_start"]))
            found[key] = row["total"], row["overage"]
        first, last = clock.to_datetime(0), clock.to_datetime(2**42)
        for row in await self.database.fetch("hours_of_subject", subject, first, last):
            period = clock.from_datetime(row["period_start"])
            hour = clock.from_datetime(row["hour_start"])
            found[row["meter"], period, hour] = row["total"], row["overage"]
        return found

    async def live(self, subject: str) -> Ledger:
        """The same out of the state hash."""
        key = self.keyspace.state(subject)
        state = read_state(key, (await self.store.hgetall_many([key]))[0])
        found: Ledger = {}
        for period in state.periods:
            meter = METERS[period.meter]
            found[period.meter, period.start_ms] = (
                meter.from_units(period.total),
                meter.from_units(period.overage),
            )
        for hour in state.hours:
            meter = METERS[hour.meter]
            found[hour.meter, hour.period_start_ms, hour.hour_start_ms] = (
                meter.from_units(hour.total),
                meter.from_units(hour.overage),
            )
        return found

    async def version(self, subject: str) -> tuple[int, int]:
        """Epoch and version in the ledger."""
        row = (await self.database.fetch("read_epochs", [subject]))[0]
        return row["epoch"], row["version"]


@asynccontextmanager
async def parts(
    redis_url: str,
    postgres_url: str,
    *,
    meters: Mapping[str, Meter] = METERS,
    batch: int = 1_000,
    timeout_s: float = 10,
) -> AsyncIterator[Parts]:
    store = Store.connect(redis_url, 5.0)
    database = await connect_pool(postgres_url, size=2, timeout_s=timeout_s, require=False)
    keyspace = Keyspace()
    registry = MeterRegistry(meters)
    try:
        yield Parts(
            store,
            database,
            Flusher(store, database, keyspace, registry, batch=batch),
            EventStore(store, database, keyspace, registry, batch=batch),
            keyspace,
            registry,
        )
    finally:
        await store.close()
        await database.close()


def run(
    redis_url: str, postgres_url: str, check: Callable[[Parts], Awaitable[None]], **options: Any
) -> None:
    """Runs a check on an event loop of its own, with parts made by `parts`."""

    async def main() -> None:
        async with parts(redis_url, postgres_url, **options) as found:
            await check(found)

    asyncio.run(main())


def flusher_of(p: Parts, **options: Any) -> Flusher:
    return Flusher(p.store, p.database, p.keyspace, p.registry, **options)
