"""The parts of a gateway that decide a request, put together on real servers, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from core import clock
from core.admission.ledger import Catalogue
from core.admission.program import CalendarUse, calendar_use, compile_program
from core.admission.seeder import Seeder
from core.admission.settlement import Settlement, cap_of
from core.db import Database, connect_pool
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.policy import Aggregation, Meter, OutageMode, Plan
from core.redis.scripts import load
from core.redis.store import Store
from gateway.admission.batcher import Batcher
from gateway.admission.leases import Leases
from gateway.admission.limiter import Admission, Decision, Limiter
from gateway.admission.settler import Settler
from gateway.answers.verdict import LimitState, policy_of
from gateway.outage import entries
from gateway.outage.decide import Outage, OutageRules
from gateway.outage.local import compile_local
from gateway.outage.memory import MemoryJournal
from gateway.outage.replay import Journal, Replay

METERS: Mapping[str, Meter] = {
    "requests": Meter("requests"),
    "credits": Meter("credits", unit="credit", decimals=2),
    "peak": Meter("peak", unit="MB", aggregation=Aggregation.MAX),
    "seats": Meter("seats", unit="seat", aggregation=Aggregation.LAST),
}


@dataclass
class Subscription:
    """What the limiter needs of one; billed from the epoch on unless told otherwise."""

    id: str
    anchor_ms: int = 0
    period_start_ms: int = 0
    period_end_ms: int = 0
    period_months: int = 0


@dataclass
class Stack:
    store: Store
    database: Database
    batcher: Batcher
    seeder: Seeder
    leases: Leases
    limiter: Limiter
    calendars: CalendarUse
    keyspace: Keyspace
    settlement: Settlement
    settler: Settler
    journal: Journal
    replay: Replay

    def admission(
        self,
        plan: Plan,
        costs: Mapping[str, int] | None = None,
        *,
        durable: bool = True,
        reserve_ms: int = 0,
        outage: OutageMode = OutageMode.CLOSED,
        share: int = 1,
    ) -> Admission:
        program = compile_program(
            plan,
            costs or {"requests": 1},
            METERS,
            self.calendars,
            durable=durable,
            reserve_ms=reserve_ms,
        )
        local = None
        if outage is OutageMode.LOCAL:
            local = compile_local(program.limits, program.costs, METERS, share)
        caps = {name: cap for name in program.costs if (cap := cap_of(plan, name)) is not None}
        rules = OutageRules(outage, local, caps)
        policies = tuple(policy_of(limit, METERS) for limit in program.limits)
        return Admission(program, policies, plan.interval_months, rules)

    async def hit(self, admission: Admission, subject: str, times: int) -> list[Decision]:
        """So many requests of one subscription at once."""
        subscription = Subscription(subject)
        return await asyncio.gather(
            *(
                self.limiter.admit(admission, replace(subscription), f"{subject}-{number}")
                for number in range(times)
            )
        )


@asynccontextmanager
async def stack(
    redis_url: str,
    postgres_url: str,
    *plans: Plan,
    timeout_s: float = 5.0,
    max_batch: int = 128,
    max_in_flight: int = 1,
    now_ms: clock.Clock = clock.now_ms,
    journal: Journal | None = None,
    meters: Mapping[str, Meter] = METERS,
) -> AsyncIterator[Stack]:
    """Calendar counters are those of `plans`; the time-out is long, as the machine may be busy."""
    keyspace = Keyspace()
    store = Store.connect(redis_url, 5.0)
    database = await connect_pool(postgres_url, size=4, timeout_s=10, require=False)
    batcher = Batcher(
        redis_url,
        load("admit"),
        keyspace,
        timeout_s=timeout_s,
        max_batch=max_batch,
        max_in_flight=max_in_flight,
        now_ms=now_ms,
        on_unresolved=lambda batch: journal.append_written(entries.unresolved(batch, METERS)),
    )
    await batcher.start()
    calendars = calendar_use(plans)
    catalogue = Catalogue(meters, calendars)
    seeder = Seeder(store, database, lambda: catalogue, MeterRegistry(meters))
    leases = Leases(store)
    settlement = Settlement(store, seeder, keyspace)
    settler = Settler(
        settlement,
        lambda: batcher.connected_run,
        timeout_s,
        redis_now_ms=batcher.redis_now_ms,
    )
    journal = journal or MemoryJournal()
    outage = Outage(journal, lambda: METERS)
    limiter = Limiter(batcher, seeder, leases, keyspace, settler, outage)
    replay = Replay(journal, settlement, store, keyspace, lambda: batcher.connected_run)
    try:
        yield Stack(
            store,
            database,
            batcher,
            seeder,
            leases,
            limiter,
            calendars,
            keyspace,
            settlement,
            settler,
            journal,
            replay,
        )
    finally:
        await leases.close()
        await settler.close()
        await seeder.close()
        await batcher.close()
        await store.close()
        await database.close()


def told(admission: Admission, decision: Decision) -> list[LimitState]:
    """The states of a decision, also where nobody needed them."""
    if not decision.numbers:
        return decision.states
    return [
        LimitState(*policy.static, remaining // policy.divisor, reset_ms)
        for policy, remaining, reset_ms in zip(
            admission.policies, decision.numbers[3::3], decision.numbers[4::3], strict=True
        )
    ]


def admitted(decisions: list[Decision]) -> int:
    return sum(decision.admitted for decision in decisions)
