"""One subject on real servers, next to the model of what Redis and the ledger must hold of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

import asyncpg

from core import clock
from core.admission.ledger import Catalogue
from core.admission.program import Verdict, calendar_use, compile_program
from core.admission.seeder import Seeder
from core.db import Database
from core.meters import MeterRegistry
from core.policy import Aggregation, Meter, PeriodKind
from core.redis.store import Store
from reconciler.events import EventStore
from reconciler.flush import Flusher, FlushResult
from tests.property.metering import Entry, Metering
from tests.property.walk import SLOTS, Plan, Step, Time
from tests.support.scripts import RUN, Outcome, Scripts, plan_of

_subjects = count()


@dataclass(frozen=True)
class Lose:
    """The state is gone, or everything; then the new server's clock is behind by so many ms."""

    everything: bool = True
    behind: int = 0


@dataclass(frozen=True)
class Flush:
    """Once; or read only, to be stored later: at `STORE`, which stores what was read first."""

    store: bool = True


STORE = "store what was read"
CLAIM = "another process claims an epoch and dies"
Move = Step | Lose | Flush | str


class ControlledStore(Store):
    """A store whose server's clock is that of the scripts."""

    scripts: Scripts

    async def now_ms(self) -> int:
        return self.scripts.now_ms


class GatedStore(ControlledStore):
    """Its first read of states is answered at once and handed over only when the gate opens."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.read, self.gate = asyncio.Event(), asyncio.Event()

    async def hgetall_many(self, keys: object) -> list[dict[str, str]]:
        found = await super().hgetall_many(keys)  # type: ignore[arg-type]
        self.read.set()
        await self.gate.wait()
        return found


@dataclass
class Pending:
    """A flush that has read a state and not stored it."""

    store: GatedStore
    task: asyncio.Task[object]
    epoch: int
    log: list[Entry]


@dataclass
class World:
    """The servers and the model of what they must hold for one subject."""

    scripts: Scripts
    store: ControlledStore
    database: Database
    meters: Mapping[str, Meter]
    pool: list[Plan]
    time: Time
    subject: str
    model: Metering
    registry: MeterRegistry
    plan: Plan = field(default_factory=list)
    durable: list[Entry] = field(default_factory=list)
    live: bool = False
    epoch: int = 0  # of the live state
    claimed: int = 0  # of the ledger
    pending: list[Pending] = field(default_factory=list)
    closed: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)
    lossless: bool = True  # nothing was lost that was not stored before

    async def go(self, walk: list[Move]) -> None:
        self.plan = self.pool[0]
        self.at()
        await self.registry.pin(self.database)
        for move in walk:
            if isinstance(move, Step):
                await self.admit(move)
            elif isinstance(move, Lose):
                self.lose(move)
            elif isinstance(move, Flush):
                await (self.flush() if move.store else self.read())
            elif move == CLAIM:
                await self.database.fetch("claim_epochs", [self.subject])
                self.claimed += 1
            elif self.pending:
                await self.finish(self.pending.pop(0))
        for pending in self.pending:
            await self.finish(pending)
        await self.flush()
        if self.live:
            await self.flush()  # the first may have had to pass an epoch on
            assert self.durable == self.model.log
        await self.compare()
        if self.lossless:
            await self.compare_events()

    def at(self) -> None:
        self.scripts.at(self.time.now * 1000 + 7)

    def lose(self, move: Lose) -> None:
        self.lossless &= self.durable == self.model.log and not self.scripts.events()
        if move.everything:
            self.scripts.redis.flushall()
            self.time.now -= move.behind
        else:
            self.scripts.redis.delete(self.scripts.keyspace.state(self.subject))
        self.at()
        self.live = False

    async def admit(self, step: Step) -> None:
        self.time.move(step)
        self.at()
        if step.plan is not None:  # in a new configuration, which counts other calendars
            self.plan = self.pool[step.plan % len(self.pool)]
        for requests, credit in step.costs:
            cost = {"requests": requests, "credits": credit}
            outcome = await self.ask(cost)
            expected = self.model.check(self.plan, cost, self.time.now, self.time.span)
            answers = [(a.flags, a.remaining, a.reset_ms) for a in outcome.limits]
            assert (outcome.admitted, answers) == (expected.admitted, expected.answers), step

    async def ask(self, cost: dict[str, int]) -> Outcome:
        plan = plan_of(*self.plan)
        catalogue = Catalogue(self.meters, calendar_use([plan]))
        program = compile_program(plan, cost, self.meters, catalogue.calendars)
        seeder = Seeder(self.store, self.database, lambda: catalogue, self.registry)
        for _ in range(2):
            outcome = self.scripts.batch([(self.subject, program)], span=self.time.span)[0]
            if outcome.status is not Verdict.COLD:
                break
            key = self.scripts.keyspace.state(self.subject)
            await seeder.seed(self.subject, key, program.plan_limits, self.time.now, RUN)
            if not self.live:
                self.live, self.model.log = True, list(self.durable)
                self.claimed += 1
            self.epoch = self.claimed
        assert outcome.status in (Verdict.ADMIT, Verdict.REJECT)
        return outcome

    def flusher(self, store: Store) -> Flusher:
        return Flusher(store, self.database, self.scripts.keyspace, self.registry)

    async def flush(self) -> None:
        key, dirty = self.scripts.keyspace.state(self.subject), self.scripts.keyspace.dirty(0)
        listed = self.scripts.redis.zscore(dirty, key) is not None
        result = await self.flusher(self.store).flush_all()
        events = EventStore(self.store, self.database, self.scripts.keyspace, self.registry)
        await events.store_all()
        assert not result.behind
        assert not result.unreadable
        if self.live and listed:
            self.stored(self.epoch, list(self.model.log))
        await self.compare()

    async def read(self) -> None:
        store = GatedStore(self.store._client)
        store.scripts = self.scripts
        task = asyncio.create_task(self.flusher(store).flush_all())
        read = asyncio.create_task(store.read.wait())
        await asyncio.wait([task, read], return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and self.live:
            self.pending.append(Pending(store, task, self.epoch, list(self.model.log)))
            return
        read.cancel()
        store.gate.set()
        await task

    async def finish(self, pending: Pending) -> None:
        pending.store.gate.set()
        result = await pending.task
        assert isinstance(result, FlushResult)
        assert not result.behind  # an old reading is no sign that anything was lost
        self.stored(pending.epoch, pending.log)
        await self.compare()

    def stored(self, epoch: int, log: list[Entry]) -> None:
        if epoch < self.claimed:  # overtaken: the live state is told the epoch
            self.epoch = self.claimed
        elif len(log) > len(self.durable):
            self.durable = log

    async def compare(self) -> None:
        """The ledger holds the durable part of the log and nothing else; what is closed stays."""
        expected = Metering(self.meters, self.durable)
        periods, hours = {}, {}
        for row in await self.database.fetch("ledger_of_subject", self.subject, 1_000):
            meter = self.meters[row["meter"]]
            end = clock.from_datetime(row["period_end"])
            amounts = meter.to_units(row["total"]), meter.to_units(row["overage"])
            periods[meter.name, clock.from_datetime(row["period_start"])] = end, *amounts
        first, last = clock.to_datetime(0), clock.to_datetime(2**42)
        for row in await self.database.fetch("hours_of_subject", self.subject, first, last):
            meter = self.meters[row["meter"]]
            start, hour = (clock.from_datetime(row[n]) for n in ("period_start", "hour_start"))
            amounts = meter.to_units(row["total"]), meter.to_units(row["overage"])
            if any(amounts):  # an hour in which a state was rebuilt and nothing counted
                hours[meter.name, start, hour] = amounts
        assert periods == expected.periods()
        assert hours == expected.hours()
        for (name, start), (_, *amounts) in periods.items():
            if self.meters[name].aggregation is Aggregation.SUM:
                parts = [row for key, row in hours.items() if key[:2] == (name, start)]
                assert [sum(column) for column in zip(*parts, strict=True)] == amounts
            if any(key[0] == name and key[1] > start for key in periods):
                assert (
                    self.closed.setdefault((name, start), periods[name, start])
                    == (periods[name, start])
                )

    async def compare_events(self) -> None:
        """Thresholds and ended billing periods, each once. The end of a calendar period is told
        by a counter that was counting before it: one that had to be rebuilt says nothing."""
        told = {
            (limit, kind, min(percent, 100), start, most)
            for limit, _, kind, percent, _, most, start, _, _ in self.model.events
            if kind != "reset" or SLOTS[limit][1] is PeriodKind.BILLING
        }
        rows = await self.database.fetch("events_of_subject", self.subject, clock.to_datetime(0))
        stored = [
            (
                row["limit_name"],
                row["kind"],
                row["threshold"],
                clock.from_datetime(row["period_start"]),
                self.meters[row["meter"]].to_units(row["limit_quantity"]),
            )
            for row in rows
            if row["kind"] != "reset" or SLOTS[row["limit_name"]][1] is PeriodKind.BILLING
        ]
        assert sorted(stored) == sorted(told)


@dataclass
class Servers:
    runner: asyncio.Runner
    scripts: Scripts
    store: ControlledStore
    database: Database
    connection: asyncpg.Connection

    def walk(
        self, meters: Mapping[str, Meter], pool: list[Plan], walk: list[Move], start: int
    ) -> World:
        """Goes a walk with a subject that was never there before."""

        async def main() -> World:
            self.scripts.redis.flushall()
            await self.connection.execute("TRUNCATE meters")
            world = World(
                self.scripts,
                self.store,
                self.database,
                meters,
                pool,
                Time(start),
                f"s{next(_subjects)}",
                Metering(meters),
                MeterRegistry(meters),
            )
            await world.go(walk)
            return world

        return self.runner.run(main())
