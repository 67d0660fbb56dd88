"""A world for tests of sealing: subscriptions, a settable clock, the reconciler's parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg

from core import directory
from core.admission.ledger import Catalogue
from core.admission.program import Verdict, calendar_use, compile_program
from core.admission.seeder import Seeder
from core.clock import from_datetime, to_datetime
from core.config import Snapshot, loads
from core.period import DAY_MS, billing_period
from reconciler.periods import Periods, SealResult
from reconciler.retention import Retention, RetentionResult
from tests.integration.reconciler.parts import METERS, Parts, parts
from tests.support.scripts import RUN, Outcome, Scripts

ANCHOR_MS = from_datetime(datetime(2026, 1, 10, 6, 30, tzinfo=UTC))
SEAL_AFTER_MS = 300_000

CONFIG = """
meters:
  credits: {unit: credit, decimals: 2}
  peak: {aggregation: max}
  seats: {aggregation: last}
plans:
  small:
    price:
      {base: "9", currency: eur, interval: month,
       meters: {credits: {included: 3, overage: "0.0000007"}}}
    limits:
      monthly: {period: billing, limit: 5, action: overage}
      paid: {meter: credits, period: billing, limit: 3, action: overage}
      hard: {meter: credits, period: billing, limit: 1000}
      shadow: {meter: credits, period: billing, limit: 1, enforce: false}
      yearly: {period: year, limit: 100_000}
  large:
    price: {base: "99", currency: usd, interval: month}
    limits:
      monthly: {period: billing, limit: 50, action: overage}
  annual:
    price: {base: "999", currency: usd, interval: year}
    limits:
      monthly: {period: billing, limit: 50, action: overage}
"""

Sealed = dict[str, Any]


def snapshot(text: str = CONFIG) -> Snapshot:
    return loads(text, env={})


class World:
    def __init__(self, p: Parts, scripts: Scripts, text: str) -> None:
        self.p, self.scripts = p, scripts
        self.snapshot = snapshot(text)
        self.p.registry.declare(self.snapshot.meters)
        self.calendars = calendar_use(self.snapshot.plans.values())
        self.seeder = Seeder(
            p.store,
            p.database,
            lambda: Catalogue(self.snapshot.meters, self.calendars),
            p.registry,
        )
        self.periods = Periods(
            p.store,
            p.database,
            p.keyspace,
            p.registry,
            lambda: self.snapshot,
            batch=3,
            roll=scripts.scripts["roll"],
        )
        self.retention = Retention(p.store, p.database, p.keyspace)
        self.customer = ""

    def at(self, now_ms: int) -> None:
        self.scripts.at(now_ms * 1000)

    @property
    def now_ms(self) -> int:
        return self.scripts.now_ms

    async def subscribe(self, plan: str = "small", anchor_ms: int = ANCHOR_MS) -> str:
        if not self.customer:
            creator = await directory.create_creator(self.p.database, name="c", email="c@d.e")
            customer = await directory.create_customer(
                self.p.database, creator_id=creator.id, name="c", email="c@d.e"
            )
            self.customer = customer.id
        found = await directory.create_subscription(
            self.p.database, customer_id=self.customer, plan=plan, anchor_ms=anchor_ms
        )
        return found.id

    async def spend(self, subject: str, times: int = 1, **costs: int) -> Outcome:
        """As a gateway does: the subscription's plan and bounds now, seeded when cold."""
        found = await directory.get_subscription(self.p.database, subject)
        plan = self.snapshot.plans[found.plan]
        program = compile_program(
            plan, costs or {"requests": 1}, self.snapshot.meters, self.calendars
        )
        span = billing_period(found.anchor_ms, plan.interval_months, self.now_ms)
        for _ in range(times):
            outcome = self.scripts.admit(subject, program, span=span)
            if outcome.status is Verdict.COLD:
                await self.seeder.seed(
                    subject, self.p.keyspace.state(subject), plan.limits, self.now_ms, RUN
                )
                outcome = self.scripts.admit(subject, program, span=span)
            assert outcome.admitted, outcome
        return outcome

    async def flush(self) -> None:
        await self.p.flusher.flush_all()
        await self.p.events.store_all()

    async def seal(self) -> SealResult:
        return await self.periods.seal_due(self.now_ms, SEAL_AFTER_MS)

    async def seal_all(self) -> SealResult:
        """Flushes, closes, flushes, seals."""
        await self.flush()
        first = await self.seal()
        await self.flush()
        second = await self.seal()
        second.closed += first.closed
        second.sealed += first.sealed
        second.resets += first.resets
        return second

    async def retain(self, days: int = 62) -> RetentionResult:
        return await self.retention.run(self.now_ms, days * DAY_MS)

    def evict(self, subject: str) -> None:
        self.scripts.redis.delete(self.p.keyspace.state(subject))

    async def rows(self, sql: str, *args: object) -> list[dict[str, Any]]:
        async with self.p.database._pool.acquire() as connection:
            return [dict(row) for row in await connection.fetch(sql, *args)]

    async def sealed(self, subject: str, meter: str = "requests") -> list[Sealed]:
        """The periods of a meter, oldest first; `start` in ms."""
        rows = await self.rows(
            "SELECT * FROM ledger_periods WHERE subject = $1 AND meter = $2 ORDER BY period_start",
            subject,
            meter,
        )
        return [row | {"start": from_datetime(row["period_start"])} for row in rows]

    async def resets(self, subject: str) -> list[tuple[str, Decimal, int]]:
        """Limit, what was used, and the start of the period that begins, in order of limit."""
        rows = await self.p.database.fetch("events_of_subject", subject, to_datetime(0))
        return sorted(
            (row["limit_name"], row["usage"], from_datetime(row["period_start"]))
            for row in rows
            if row["kind"] == "reset"
        )


def run(
    redis_url: str,
    postgres_url: str,
    check: Callable[[World], Awaitable[None]],
    text: str = CONFIG,
) -> None:
    async def main() -> None:
        async with parts(redis_url, postgres_url, meters=METERS) as p:
            scripts = Scripts(redis_url)
            scripts.at(ANCHOR_MS * 1000)
            world = World(p, scripts, text)
            await p.registry.pin(p.database)
            await check(world)

    asyncio.run(main())


async def execute(url: str, sql: str, *args: object) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql, *args)
    finally:
        await connection.close()
