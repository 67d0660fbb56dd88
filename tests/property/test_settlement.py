"""Reservations and corrections against a model, on real servers, over hours and periods.

Whatever is settled, in whatever order, twice, after its expiry, after its hour or period was closed
and dropped from Redis, or while a flush is under way: the ledger holds, for each period and
hour, what was charged in it. A lost and rebuilt state is the subject of test_ledger.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.admission.ledger import Catalogue
from core.admission.program import Verdict, calendar_use, compile_program
from core.admission.seeder import Seeder
from core.admission.settlement import Change, Kind, Operation, Settled, Settlement
from core.clock import from_datetime
from core.db import Database, connect_pool
from core.meters import MeterRegistry
from core.period import DAY_MS, HOUR_MS, billing_period
from core.policy import Action, Meter, PeriodKind, Quota
from core.redis.store import Store
from reconciler.flush import Flusher
from tests.property.world import ControlledStore
from tests.support.scripts import RUN, Scripts, plan_of

START_MS = from_datetime(datetime(2026, 1, 31, 22, 20, tzinfo=UTC))
METERS = {"requests": Meter("requests"), "credits": Meter("credits", decimals=6)}
LIMIT = 12
PLAN = plan_of(
    Quota("monthly", "requests", LIMIT, PeriodKind.BILLING, Action.OVERAGE),
    Quota("daily", "requests", 10**6, PeriodKind.DAY),
)
RESERVE_MS = 60_000
_subjects = count()


class TornStore(ControlledStore):
    """Calls `between` after the states of a flush were read."""

    between: Callable[[], Awaitable[None]] | None = None

    async def hgetall_many(self, keys: object) -> list[dict[str, str]]:
        found = await super().hgetall_many(keys)  # type: ignore[arg-type]
        if self.between is not None:
            between, self.between = self.between, None
            await between()
        return found


@dataclass
class Held:
    """A reservation: what it counts for now, what it reserved, and what stays if it expires."""

    id: str
    period: tuple[int, int]
    hour: int
    cost: dict[str, int]
    keep: dict[str, int]
    counted: dict[str, int]
    expired: bool = False
    known: bool = True  # neither settled nor forgotten
    expiry: int = 0

    def progress(self, credit: int) -> None:
        self.keep["credits"] = max(self.keep["credits"], credit)
        self.cost["credits"] = max(self.cost["credits"], self.keep["credits"])
        self.counted = dict(self.keep if self.expired else self.cost)


@dataclass
class Servers:
    runner: asyncio.Runner
    scripts: Scripts
    store: TornStore
    database: Database


@dataclass
class Walk:
    servers: Servers
    subject: str
    settlement: Settlement
    flusher: Flusher
    now_ms: int = START_MS
    held: list[Held] = field(default_factory=list)
    adjusted: Counter[tuple[int, int]] = field(default_factory=Counter)
    number: int = 0

    def at(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.servers.scripts.at(now_ms * 1000 + 7)

    async def admit(self, credit: int, kept: int = 0) -> None:
        """`kept` credits stay charged when it expires, and the request then too."""
        name, scripts = f"r{len(self.held)}", self.servers.scripts
        program = compile_program(
            PLAN,
            {"requests": 1, "credits": credit},
            METERS,
            calendar_use([PLAN]),
            reserve_ms=RESERVE_MS,
            keep={"requests": 1, "credits": kept} if kept else None,
        )
        period = billing_period(START_MS, 1, self.now_ms)
        for _ in range(3):
            outcome = scripts.admit(self.subject, program, span=period, lease=name)
            if outcome.status is Verdict.ADMIT:
                break
            assert outcome.status is Verdict.COLD, outcome
            await self.settlement._seeder.seed(
                self.subject, scripts.keyspace.state(self.subject), PLAN.limits, self.now_ms, RUN
            )
        assert outcome.admitted
        hour = self.now_ms - self.now_ms % HOUR_MS
        expiry = self.now_ms + RESERVE_MS
        cost = {"requests": 1, "credits": credit}
        keep = {"requests": 1 if kept else 0, "credits": kept}
        self.held.append(Held(name, period, hour, cost, keep, dict(cost), expiry=expiry))

    async def settle(self, kind: Kind, index: int, credit: int = 0) -> None:
        """`credit` is what a cost, or progress, says."""
        if not self.held:
            return
        held = self.held[index % len(self.held)]
        told = kind in (Kind.COST, Kind.PROGRESS)
        changes = (Change("credits", credit, 0, 0, 0),) if told else ()
        ms = RESERVE_MS if kind in (Kind.RENEW, Kind.PROGRESS) else self.now_ms
        found = await self.settlement.settle(
            [Operation(kind, self.subject, held.id, changes, ms)], RUN
        )
        if kind in (Kind.RENEW, Kind.PROGRESS) and held.known and not held.expired:
            held.expiry = self.now_ms + RESERVE_MS
        if kind is Kind.RENEW:
            return
        assert found == [Settled.DONE if held.known else Settled.GONE]
        if not held.known:
            return
        if kind is Kind.PROGRESS:
            held.progress(credit)
            return
        held.known = False
        held.counted = {} if kind is Kind.REFUND else dict(held.cost)
        if kind is Kind.COST:
            held.counted["credits"] = credit

    async def expire(self) -> None:
        """What the reconciler does with what is due."""
        scripts = self.servers.scripts
        due = scripts.redis.zrangebyscore(scripts.keyspace.due(0), "-inf", self.now_ms)
        assert isinstance(due, list)
        names = [member.split(" ")[0] for member in due if member.endswith(f":{self.subject}")]
        if names:
            await self.settlement.settle(
                [Operation(Kind.EXPIRE, self.subject, name) for name in names], RUN
            )
        for held in self.held:
            if held.id in names and held.known:
                if held.expired:
                    held.known = False  # its tombstone is gone
                elif held.expiry <= self.now_ms:
                    held.expired = True
                    held.counted = dict(held.keep)

    async def adjust(self, back: int, units: int, again: bool) -> None:
        at = self.now_ms - back
        start, end = billing_period(START_MS, 1, at)
        self.number += 1
        operation = Operation(
            Kind.ADJUST, self.subject, changes=(Change("requests", units, start, end, at, LIMIT),)
        )
        sender = f"spool-{self.subject}"
        assert await self.settlement.adjust([operation], RUN, sender, self.number)
        if again:
            assert not await self.settlement.adjust([operation], RUN, sender, self.number)
        self.adjusted[start, at - at % HOUR_MS] += units

    async def flush(self) -> None:
        result = await self.flusher.flush_all()
        assert not result.behind
        assert not result.unreadable

    def expected(self) -> dict[str, Counter[tuple[int, int]]]:
        requests, credit = Counter(self.adjusted), Counter[tuple[int, int]]()
        for held in self.held:
            requests[held.period[0], held.hour] += held.counted.get("requests", 0)
            credit[held.period[0], held.hour] += held.counted.get("credits", 0)
        return {"requests": requests, "credits": credit}

    async def compare(self) -> None:
        await self.flush()
        await self.flush()
        hours = await self.servers.database.fetch(
            "hours_of_subject",
            self.subject,
            datetime(2020, 1, 1, tzinfo=UTC),
            datetime(2030, 1, 1, tzinfo=UTC),
        )
        found: dict[str, Counter[tuple[int, int]]] = {"requests": Counter(), "credits": Counter()}
        over: Counter[int] = Counter()
        for row in hours:
            start = from_datetime(row["period_start"])
            units = METERS[row["meter"]].to_units(Decimal(row["total"]))
            found[row["meter"]][start, from_datetime(row["hour_start"])] += units
            if row["meter"] == "requests":
                over[start] += int(row["overage"])
        expected = self.expected()
        for meter, counted in expected.items():
            assert +found[meter] == +counted, meter
            assert not -found[meter]
        periods = await self.servers.database.fetch("ledger_of_subject", self.subject, 100)
        for row in periods:
            start = from_datetime(row["period_start"])
            units = METERS[row["meter"]].to_units(Decimal(row["total"]))
            counted = sum(n for (at, _), n in expected[row["meter"]].items() if at == start)
            assert units == counted
            if row["meter"] == "requests":
                assert row["overage"] == max(0, counted - LIMIT) == over[start]


@pytest.fixture
def servers(valkey: str, database: str) -> Iterator[Servers]:
    scripts = Scripts(valkey)
    with asyncio.Runner() as runner:

        async def connect() -> Servers:
            store = TornStore.connect(valkey, 5.0)
            assert isinstance(store, TornStore)
            store.scripts = scripts
            pool = await connect_pool(database, size=4, timeout_s=10)
            await MeterRegistry(METERS).pin(pool)
            return Servers(runner, scripts, store, pool)

        async def close(servers: Servers) -> None:
            await servers.store.close()
            await servers.database.close()

        servers = runner.run(connect())
        yield servers
        runner.run(close(servers))


def walk_of(servers: Servers) -> Walk:
    subject = f"s{next(_subjects)}"
    catalogue = Catalogue(METERS, calendar_use([PLAN]), {"plan": PLAN})
    registry = MeterRegistry(METERS)
    store: Store = servers.store
    seeder = Seeder(store, servers.database, lambda: catalogue, registry)
    settlement = Settlement(store, seeder, servers.scripts.keyspace)
    settlement._script = servers.scripts.scripts["settle"]
    flusher = Flusher(store, servers.database, servers.scripts.keyspace, registry)
    walk = Walk(servers, subject, settlement, flusher)
    walk.at(START_MS)
    return walk


kinds = st.sampled_from([Kind.CONFIRM, Kind.REFUND, Kind.COST, Kind.RENEW, Kind.PROGRESS])
settles = st.tuples(st.just("settle"), kinds, st.integers(0, 20), st.integers(0, 9))
backs = st.sampled_from([0, 5_000, HOUR_MS, 2 * HOUR_MS, DAY_MS, 20 * DAY_MS])
adjusts = st.tuples(st.just("adjust"), backs, st.integers(1, 9), st.booleans())
gaps = st.sampled_from([0, 1_000, RESERVE_MS, RESERVE_MS, HOUR_MS, HOUR_MS, DAY_MS, 28 * DAY_MS])
moves = st.one_of(
    st.tuples(st.just("admit"), st.integers(1, 5)),
    st.tuples(st.just("admit"), st.integers(1, 5), st.integers(0, 7)),
    settles,
    settles,
    adjusts,
    st.tuples(st.just("wait"), gaps),
    st.tuples(st.just("expire")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("torn"), settles),
)


async def go(walk: Walk, steps: list[tuple[object, ...]]) -> None:
    async def one(name: object, *rest: object) -> None:
        if name == "wait":
            walk.at(walk.now_ms + rest[0])  # type: ignore[operator]
        elif name == "torn":

            async def between() -> None:
                await one(*rest[0])  # type: ignore[misc]

            walk.servers.store.between = between
            await walk.flush()
            walk.servers.store.between = None
        else:
            await getattr(walk, str(name))(*rest)

    for step in steps:
        await one(*step)
    await walk.compare()


@settings(
    max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(moves, min_size=1, max_size=25))
@example(  # a refund while the closed hour it changes is on its way into the ledger
    steps=[
        ("admit", 3),
        ("wait", HOUR_MS),
        ("admit", 1),
        ("torn", ("settle", Kind.REFUND, 0)),
        ("flush",),
    ]
)
@example(  # taken back when it expired, and served after all, in the next period
    steps=[
        *[("admit", 1)] * 14,
        ("wait", RESERVE_MS),
        ("expire",),
        ("flush",),
        ("wait", 28 * DAY_MS),
        ("admit", 1),
        ("flush",),
        ("settle", Kind.CONFIRM, 0),
        ("settle", Kind.CONFIRM, 0),
    ]
)
@example(  # cut off while it streamed: what was told is kept, and its real cost corrects that
    steps=[
        ("admit", 2, 1),
        ("settle", Kind.PROGRESS, 0, 7),
        ("settle", Kind.PROGRESS, 0, 3),
        ("wait", RESERVE_MS),
        ("expire",),
        ("flush",),
        ("wait", 28 * DAY_MS),
        ("admit", 1),
        ("flush",),
        ("settle", Kind.PROGRESS, 0, 8),
        ("settle", Kind.COST, 0, 5),
    ]
)
@example(  # counted late, in an hour that was never there, and in one that was dropped
    steps=[
        ("admit", 1),
        ("wait", DAY_MS),
        ("admit", 1),
        ("flush",),
        ("adjust", DAY_MS, 2, True),
        ("adjust", 2 * HOUR_MS, 2, True),
        ("flush",),
        ("adjust", DAY_MS, 2, False),
    ]
)
def test_every_settlement_lands_in_its_period_and_hour(
    servers: Servers, steps: list[tuple[object, ...]]
) -> None:
    servers.runner.run(go(walk_of(servers), steps))
