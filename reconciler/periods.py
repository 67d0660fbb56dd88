"""Sealing: a billing period that has ended becomes final, with what an invoice needs of it.

Periods are found by the index on unsealed ones, page by page; nothing sweeps over subjects. Steps
for each page, and what a crash after each leaves behind:
  1. read a page of periods whose end, and the time for late   nothing
     answers, has passed
  2. lua/roll.lua closes them in the live states, atomically   closed there, their subjects listed
     for each subject, and tells the resets                    as changed: the flush stores them
  3. one transaction: lock the subjects, as a flush does,      nothing: rolled back
     seal the periods of which Redis has nothing more, tell
     the resets of subjects that are not in Redis

A period of which Redis still has something waits for the flush and is sealed in a later round.
When a sealed one changes after all, the flush unseals it (`store_periods`), and it is sealed again:
`seals` counts. What is sealed is computed from the row under the subject's lock, so it is never
older than what Redis was asked for in step 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal, Inexact
from typing import Any

from core import clock
from core.config import Snapshot
from core.db import Database, Row, Transaction
from core.directory.lookup import SubscriptionRow, lookup_subscriptions
from core.failpoints import reach
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.period import Span, billing_period
from core.policy import Meter, PeriodKind, Plan, Quota, Status
from core.redis.scripts import Script, load
from core.redis.store import Argument, Store
from core.telemetry import logs

_log = logs.get_logger()

_DONE, _GONE, _STALE, _BROKEN = 0, 1, 2, 3  # as lua/roll.lua numbers them

# Wider than any product of a count and a price: one that does not fit is an error, never rounded.
_EXACT = Context(prec=200, traps=[Inexact])

_Key = tuple[str, str, datetime]  # subject, meter, period start


@dataclass(slots=True)
class SealResult:
    """What one run did. `waiting` are ended periods of which Redis has something still."""

    closed: int = 0
    sealed: int = 0
    resealed: int = 0
    resets: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a subject's subscription says now. Without a subscription, all but `known` is None.

    `known` is False for a subscription on a plan that the configuration does not have: its prices
    are wanted but cannot be said.
    """

    known: bool
    plan: Plan | None = None
    span: Span | None = None
    canceled: bool = False

    def quotas(self, meter: str) -> list[Quota]:
        """The enforced billing quotas of a meter, whose end is told."""
        return [
            limit
            for limit in (self.plan.limits if self.plan else ())
            if isinstance(limit, Quota)
            and limit.period is PeriodKind.BILLING
            and limit.enforce
            and limit.meter == meter
        ]


class Periods:
    """Seals periods. `snapshot()` gives the configuration in force, `roll` the script."""

    def __init__(
        self,
        store: Store,
        database: Database,
        keyspace: Keyspace,
        registry: MeterRegistry,
        snapshot: Callable[[], Snapshot],
        *,
        batch: int = 500,
        roll: Script | None = None,
    ) -> None:
        self._store = store
        self._database = database
        self._keyspace = keyspace
        self._registry = registry
        self._snapshot = snapshot
        self._batch = batch
        self._roll = roll or load("roll")

    async def lag_ms(self, now_ms: int, seal_after_ms: int) -> int:
        """For how long the oldest ended period could have been sealed; 0 when there is none.

        Raises:
            StoreUnavailableError: Postgres did not answer.
        """
        oldest = await self._database.fetchval("oldest_unsealed")
        if oldest is None:
            return 0
        return max(0, now_ms - seal_after_ms - clock.from_datetime(oldest))

    async def seal_due(self, now_ms: int, seal_after_ms: int) -> SealResult:
        """Seals what ended `seal_after_ms` before `now_ms` (Redis time), as far as it is flushed.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer; what was done stays done.
        """
        result = SealResult()
        until = clock.to_datetime(now_ms - seal_after_ms)
        after: tuple[object, ...] = (clock.to_datetime(0), "", "", clock.to_datetime(0))
        while True:
            # Step 1
            rows = await self._database.fetch("unsealed_periods", until, *after, self._batch)
            if rows:
                await self._seal_page(rows, now_ms, result)
            if len(rows) < self._batch:
                return result
            last = rows[-1]
            after = (last["period_end"], last["subject"], last["meter"], last["period_start"])

    async def _seal_page(self, rows: Sequence[Row], now_ms: int, result: SealResult) -> None:
        by_subject: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_subject[row["subject"]].append(row)
        await self._registry.unknown(self._database, {row["meter"] for row in rows})
        terms = await self._terms(by_subject, now_ms)
        # Step 2
        flushed, idle = await self._close(by_subject, terms, result)
        reach("periods.rolled")
        # Step 3
        sealed = await self._seal(flushed, idle, terms, now_ms, result) if flushed else 0
        result.waiting += len(rows) - sealed

    async def _terms(self, subjects: Iterable[str], now_ms: int) -> dict[str, _Terms]:
        plans = self._snapshot().plans
        found = {subject: _Terms(known=True) for subject in subjects}
        for row in await lookup_subscriptions(self._database, list(found)):
            plan = plans.get(row.plan)
            if plan is None:
                _log.error(
                    "period_waits",
                    subject=row.id,
                    reason=f"plan {row.plan!r} is not in the configuration: its prices are missing",
                    fix="put the plan back, or move the subscription to another one",
                )
                found[row.id] = _Terms(known=False)
                continue
            found[row.id] = self._terms_of(row, plan, now_ms)
        return found

    @staticmethod
    def _terms_of(row: SubscriptionRow, plan: Plan, now_ms: int) -> _Terms:
        span = billing_period(row.anchor_ms, plan.interval_months, now_ms)
        return _Terms(True, plan, span, row.status is Status.CANCELED)

    async def _close(
        self,
        by_subject: Mapping[str, list[Row]],
        terms: Mapping[str, _Terms],
        result: SealResult,
    ) -> tuple[list[_Key], set[str]]:
        """Step 2: the periods that Redis has nothing more of, and the subjects that it has not."""
        subjects = [subject for subject in by_subject if terms[subject].known]
        if not subjects:
            return [], set()
        replies: list[list[int]] = await self._store.run_many(
            self._roll, [self._call(s, by_subject[s], terms[s]) for s in subjects]
        )
        flushed: list[_Key] = []
        idle: set[str] = set()
        for subject, (status, *numbers) in zip(subjects, replies, strict=True):
            rows = by_subject[subject]
            if status == _GONE:
                idle.add(subject)
                done = [1] * len(rows)
            elif status == _DONE:
                closed, *done = numbers
                result.closed += closed
            else:
                if status == _BROKEN:
                    _log.error("state_unreadable", subject=subject)
                continue
            flushed += [
                (subject, row["meter"], row["period_start"])
                for row, ready in zip(rows, done, strict=True)
                if ready
            ]
        return flushed, idle

    def _call(
        self, subject: str, rows: Sequence[Row], terms: _Terms
    ) -> tuple[list[str], list[Argument]]:
        shard = self._keyspace.shard(subject)
        keys = [
            self._keyspace.dirty(shard),
            self._keyspace.events(shard),
            self._keyspace.state(subject),
        ]
        arguments: list[Argument] = [*(terms.span or ("", "")), rows[0]["version"], len(rows)]
        for row in rows:
            arguments += (row["meter"], clock.from_datetime(row["period_start"]))
        for meter in dict.fromkeys(row["meter"] for row in rows):
            for quota in () if terms.canceled else terms.quotas(meter):
                arguments += (meter, quota.name, quota.limit)
        return keys, arguments

    async def _seal(
        self,
        keys: Sequence[_Key],
        idle: set[str],
        terms: Mapping[str, _Terms],
        now_ms: int,
        result: SealResult,
    ) -> int:
        """Step 3; the number of periods sealed."""
        async with self._database.transaction() as transaction:
            locked = {
                row["subject"]
                for row in await transaction.fetch("lock_subjects", list({key[0] for key in keys}))
            }
            mine = [key for key in keys if key[0] in locked]
            rows = await transaction.fetch("periods_to_seal", *_columns(mine, 3))
            sealed = await transaction.fetch(
                "seal_periods",
                clock.to_datetime(now_ms),
                *_columns([self._final(row, terms[row["subject"]]) for row in rows], 9),
            )
            resets = 0
            for row in rows:
                if row["subject"] in idle and row["latest"] and row["total"] > 0:
                    resets += await self._start_next(
                        transaction, row, terms[row["subject"]], now_ms
                    )
            reach("periods.sealed")
        result.sealed += len(sealed)
        result.resealed += sum(row["seals"] > 1 for row in sealed)
        result.resets += resets
        return len(sealed)

    def _meter(self, name: str) -> Meter:
        return self._registry.get(name) or Meter(name)

    def _final(self, row: Row, terms: _Terms) -> tuple[object, ...]:
        """The arguments of `seal_periods`."""
        name = row["meter"]
        limit: Decimal | None = None
        exceeded: bool | None = None
        charge: Decimal | None = None
        currency: str | None = None
        if terms.plan is not None:
            units = min((quota.limit for quota in terms.quotas(name)), default=None)
            limit = None if units is None else self._meter(name).from_units(units)
            exceeded = limit is not None and row["total"] > limit
            price = terms.plan.price
            if price is not None:
                line = price.meters.get(name)
                charge = _EXACT.multiply(row["overage"], line.overage) if line else Decimal(0)
                currency = price.currency
        return (
            row["subject"],
            name,
            row["period_start"],
            row["peak_hour"],
            row["average_hour"],
            limit,
            exceeded,
            charge,
            currency,
        )

    async def _start_next(
        self, transaction: Transaction, row: Row, terms: _Terms, now_ms: int
    ) -> int:
        """An idle subject's next period, and its resets: what the script does for a live one."""
        if terms.span is None:
            return 0
        start, end = terms.span
        # As open_meter: under another anchor the current one may have begun before this one ended.
        if clock.from_datetime(row["period_start"]) >= start:
            start = clock.from_datetime(row["period_end"])
        first, after = clock.to_datetime(start), clock.to_datetime(end)
        subject, name = row["subject"], row["meter"]
        await transaction.execute("start_periods", [subject], [name], [first], [after])
        quotas = [] if terms.canceled else terms.quotas(name)
        meter = self._meter(name)
        events = [
            (
                subject,
                quota.name,
                name,
                "reset",
                0,
                row["total"],
                meter.from_units(quota.limit),
                first,
                after,
                clock.to_datetime(now_ms),
                None,
            )
            for quota in quotas
        ]
        if not events:
            return 0
        stored = await transaction.fetch("store_events", *_columns(events, 11))
        for event in stored:
            _log.info("limit_event", **dict(event))
        return len(stored)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as a query takes them: one list a column."""
    return [[row[at] for row in rows] for at in range(width)]
