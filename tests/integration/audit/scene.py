"""Admission, flusher and audit on real servers, and SQL by hand to spoil what they left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import redis

from core.audit import AuditReport, Cause, Drift, audit
from core.clock import now_ms
from core.meters import MeterRegistry
from core.period import HOUR_MS
from core.policy import Action, PeriodKind, Quota
from reconciler.flush import Flusher
from tests.integration.admission.stack import METERS, Stack, stack
from tests.support.scripts import plan_of
from tests.support.wait import wait_until_async

_TURN_MS = 30_000
PLAN = plan_of(
    Quota("monthly", "requests", 5, PeriodKind.BILLING, Action.OVERAGE),
    Quota("daily", "requests", 10**6, PeriodKind.DAY),
)
CONFIG = """
upstreams: {api: {urls: [http://127.0.0.1:1]}}
routes: [{match: {path: /*}, upstream: api}]
meters:
  credits: {unit: credit, decimals: 2}
  peak: {unit: MB, aggregation: max}
  seats: {unit: seat, aggregation: last}
plans: {free: {limits: {monthly: {period: billing, limit: 5, action: overage}}}}
"""


@dataclass
class Scene:
    stack: Stack
    flusher: Flusher
    registry: MeterRegistry
    sql: Any  # an asyncpg connection
    redis: redis.Redis[str]

    async def hit(self, subject: str, times: int = 1, **costs: int) -> None:
        admission = self.stack.admission(PLAN, costs or {"requests": 1})
        assert all(one.admitted for one in await self.stack.hit(admission, subject, times))

    async def used(self, subject: str, times: int = 1, **costs: int) -> None:
        """Hits, all of them in the ledger."""
        await self.hit(subject, times, **costs)
        await self.flusher.flush_all()

    async def audit(self, **more: Any) -> AuditReport:
        return await audit(self.stack.database, self.stack.store, self.registry, **more)

    async def only(self, cause: Cause, **more: Any) -> Drift:
        """The one difference that an audit finds, of this cause."""
        report = await self.audit(**more)
        assert [drift.cause for drift in report.drifts] == [cause], report.drifts
        assert report.found == {cause: 1}
        return report.drifts[0]

    def key(self, subject: str) -> str:
        return self.stack.keyspace.state(subject)

    @property
    def dirty(self) -> str:
        return self.stack.keyspace.dirty(0)


@asynccontextmanager
async def scene(redis_url: str, postgres_url: str) -> AsyncIterator[Scene]:
    async with stack(redis_url, postgres_url, PLAN) as found:
        registry = MeterRegistry(METERS)
        await registry.pin(found.database)
        flusher = Flusher(found.store, found.database, found.keyspace, registry)
        sql = await asyncpg.connect(postgres_url)
        try:
            with redis.Redis.from_url(redis_url, decode_responses=True) as client:
                yield Scene(found, flusher, registry, sql, client)
        finally:
            await sql.close()


def play(redis_url: str, postgres_url: str, act: Callable[[Scene], Awaitable[None]]) -> None:
    """Runs `act`, within one hour: what it counts must not be split over two."""

    async def main() -> None:
        await wait_until_async(lambda: now_ms() % HOUR_MS < HOUR_MS - _TURN_MS, _TURN_MS / 500)
        async with scene(redis_url, postgres_url) as found:
            await act(found)

    asyncio.run(main())
