"""Reports usage events in a process of its own; run by tests.support.hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

from core.admission.ingest import Ingest, Ingested, Ingestor, UsageEvent
from core.policy import Meter, PeriodKind, Plan, Quota
from tests.integration.admission.stack import METERS as COMMON
from tests.integration.admission.stack import Stack, stack
from tests.support.scripts import plan_of

LIMIT = 10_000
METERS: Mapping[str, Meter] = {**COMMON, "tokens": Meter("tokens", unit="token", decimals=6)}
# In smallest units of each meter.
PLAN = plan_of(
    Quota("monthly", "requests", LIMIT, PeriodKind.BILLING),
    Quota("daily", "requests", LIMIT * 10, PeriodKind.DAY),
    Quota("tokens", "tokens", LIMIT * 10**6, PeriodKind.BILLING),
)


@asynccontextmanager
async def ingestor(redis: str, postgres: str, plan: Plan = PLAN) -> AsyncIterator[Reporter]:
    async with stack(redis, postgres, plan, meters=METERS) as parts:
        yield Reporter(parts, plan)


class Reporter:
    """An `Ingestor` on real servers, for one plan."""

    def __init__(self, parts: Stack, plan: Plan) -> None:
        self.parts = parts
        self._plan = plan
        self._ingestor = Ingestor(
            parts.store, parts.database, parts.seeder, parts.keyspace, METERS, parts.calendars
        )

    async def report(
        self, subject: str, name: str, quantity: Any = 1, meter: str = "requests", **more: Any
    ) -> Ingested:
        if isinstance(quantity, int | str) and not isinstance(quantity, bool):
            quantity = Decimal(quantity)
        event = UsageEvent(name, meter, quantity, more.pop("occurred_at_ms", 1_000), **more)
        return await self._ingestor.count(subject, self._plan, 0, event)


def ingest(
    say: Callable[[Any], object], redis: str, postgres: str, events: Sequence[Sequence[Any]]
) -> None:
    """Events of (subject, id, quantity, meter), all at once; says subject, id and outcome."""

    async def main() -> None:
        async with ingestor(redis, postgres) as reporter:

            async def one(subject: str, name: str, quantity: str, meter: str) -> None:
                found = await reporter.report(subject, name, quantity, meter)
                say([subject, name, found.outcome.value])

            await asyncio.gather(*(one(*event) for event in events))

    asyncio.run(main())


__all__ = ["LIMIT", "METERS", "PLAN", "Ingest", "Reporter", "ingest", "ingestor"]
