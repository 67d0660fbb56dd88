"""What a subscription has used: the live state of Redis laid over the ledger.

Redis is exact now, the ledger is behind it by a flush and holds everything else. What Redis lacks
(a subject without state, or Redis down) is computed from the ledger, by the same functions that
rebuild a live state. Quantities are exact `Decimal`s in units of the meter, times epoch ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from core import clock, directory, keyspace
from core.admission.baseline import (
    PeriodTotal,
    cold_fields,
    live_hours,
    warm_fields,
)
from core.admission.ledger import Catalogue, Wanted, read_ledgers
from core.admission.program import CalendarUse, calendar_use
from core.config import Snapshot
from core.db import Database
from core.errors import StoreUnavailableError
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.period import DAY_MS, HOUR_MS, Span, billing_period
from core.policy import (
    Concurrency,
    Meter,
    Plan,
)
from core.redis.store import Store
from core.usage_limits import LimitStatus, LimitUsage, current_record, limit_usage

# A flush between reading Redis and reading the ledger makes the ledger look newer; then both are
# read again. More often than this in one call means that it is newer.
_MAX_READS = 4


@dataclass(frozen=True, slots=True)
class MeterUsage:
    """A meter in its current billing period [start, end). `live` is whether Redis said so."""

    meter: str
    unit: str
    start_ms: int
    end_ms: int
    total: Decimal
    overage: Decimal
    live: bool


@dataclass(frozen=True, slots=True)
class HourUsage:
    """A meter's hour within a billing period. `live` is whether Redis said so.

    `day`: it is the whole day that begins at `hour_start_ms`, whose hours were rolled up.
    """

    meter: str
    period_start_ms: int
    hour_start_ms: int
    total: Decimal
    overage: Decimal
    live: bool
    day: bool = False


@dataclass(frozen=True, slots=True)
class LimitEvent:
    """A threshold passed or a period reset, as the ledger has it; `threshold` in percent."""

    limit: str
    meter: str
    kind: str
    threshold: int
    used: Decimal
    maximum: Decimal
    start_ms: int
    end_ms: int
    occurred_at_ms: int


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the ledger is behind Redis for this subject.

    Attributes:
        unflushed: whether Redis holds changes that the ledger lacks; None when Redis is down.
        since_ms: time of the first of them.
        behind: the ledger is the newer one: Redis lost writes.
        ledger_epoch, ledger_version: what the ledger has; None before the first flush.
        live_epoch, live_version: what Redis has; None without a live state.
    """

    unflushed: bool | None
    since_ms: int | None
    behind: bool
    ledger_epoch: int | None
    ledger_version: int | None
    live_epoch: int | None
    live_version: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """`redis` is whether Redis answered; `note` says in words what is missing, '' when nothing."""

    subscription: str
    plan: str
    status: str
    as_of_ms: int
    redis: bool
    note: str
    meters: tuple[MeterUsage, ...]
    limits: tuple[LimitUsage, ...]
    hours: tuple[HourUsage, ...]
    events: tuple[LimitEvent, ...]
    lag: Lag


async def read_usage(
    database: Database,
    store: Store,
    snapshot: Snapshot,
    subscription_id: str,
    *,
    hours_from: int | None = None,
    hours_to: int | None = None,
) -> Usage:
    """The usage of a subscription, now.

    Hours are those that start in [hours_from, hours_to), epoch ms; by default those of the current
    billing period; days where those were rolled up. Redis being away is no error: the ledger
    answers alone, and `note` says so.

    Raises:
        NotFoundError: no such subscription.
        StoreUnavailableError: Postgres does not answer.
        ConfigError: the snapshot changes a meter that was counted otherwise.
    """
    registry = MeterRegistry(snapshot.meters, snapshot.source)
    await registry.refresh(database)
    registry.check(snapshot.meters)
    subscription = await directory.get_subscription(database, subscription_id)
    plan = snapshot.plans.get(subscription.plan)
    notes = []
    if plan is None:
        notes.append(
            f"plan {subscription.plan!r} is not in the configuration: its limits are left out"
        )
    read = await _read(database, store, registry, snapshot, plan, subscription.id)
    if not read.up:
        notes.append(
            "Redis does not answer: this is what the ledger has, without unflushed changes"
        )
    interval = plan.interval_months if plan else 1
    period = billing_period(subscription.anchor_ms, interval, read.now_ms)
    meters = _meters(read, snapshot.meters, period)
    limits = tuple(
        limit_usage(
            limit,
            read.state,
            read.held.get(limit.name, 0),
            snapshot.meters,
            period,
            read.now_ms,
            live=read.up,
        )
        for limit in (plan.limits if plan else ())
    )
    since = min([period[0], *(row.start_ms for row in meters)])
    hours = await _hours(
        database,
        read.live,
        registry,
        subscription.id,
        since - since % HOUR_MS if hours_from is None else hours_from,
        read.now_ms + HOUR_MS if hours_to is None else hours_to,
    )
    rows = await database.fetch("events_of_subject", subscription.id, clock.to_datetime(since))
    events = tuple(
        LimitEvent(
            row["limit_name"],
            row["meter"],
            row["kind"],
            row["threshold"],
            row["usage"],
            row["limit_quantity"],
            clock.from_datetime(row["period_start"]),
            clock.from_datetime(row["period_end"]),
            clock.from_datetime(row["occurred_at"]),
        )
        for row in rows
    )
    return Usage(
        subscription.id,
        subscription.plan,
        subscription.status,
        read.now_ms,
        read.up,
        "; ".join(notes),
        meters,
        limits,
        hours,
        events,
        read.lag,
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """`live` is the hash as it is, `state` completed from the ledger; `held` by limit name."""

    up: bool
    now_ms: int
    live: Mapping[str, str]
    state: Mapping[str, str]
    held: Mapping[str, int]
    lag: Lag


async def _read(
    database: Database,
    store: Store,
    registry: MeterRegistry,
    snapshot: Snapshot,
    plan: Plan | None,
    subject: str,
) -> _Read:
    """Redis first, then the ledger: what a flush drops from Redis in between is in the ledger."""
    keys = Keyspace()
    key, dirty_key = keys.state(subject), keys.dirty(keys.shard(subject))
    limits = plan.limits if plan else ()
    calendars: CalendarUse = calendar_use([plan] if plan else [])
    catalogue = Catalogue(snapshot.meters, calendars)
    for _ in range(_MAX_READS):
        up, live, held, since_ms = True, dict[str, str](), dict[str, int](), None
        try:
            now_ms = await store.now_ms()
            live = (await store.hgetall_many([key]))[0]
            since_ms = await store.score(dirty_key, key)
            for limit in limits:
                if isinstance(limit, Concurrency):
                    lease_key = keys.leases(subject, limit.name)
                    held[limit.name] = await store.count_above(lease_key, now_ms)
        except StoreUnavailableError:
            up, live, held, since_ms, now_ms = False, {}, {}, None, clock.now_ms()
        epochs = await database.fetch("read_epochs", [subject])
        wanted = {subject: Wanted(limits, live)}
        ledger = (await read_ledgers(database, registry, catalogue, wanted, now_ms))[subject]
        lag = _lag(
            up, live, since_ms, (epochs[0]["epoch"], epochs[0]["version"]) if epochs else None
        )
        if not lag.behind:
            break
    if live:
        rebuilt = warm_fields(ledger, live, snapshot.meters, calendars, now_ms)
        state = {**live, **{name: text for name, text in rebuilt.items() if _is_behind(name, live)}}
    else:
        state = cold_fields(ledger, snapshot.meters, calendars, limits, now_ms)
    return _Read(up, now_ms, live, state, held, lag)


def _lag(
    up: bool, live: Mapping[str, str], since_ms: int | None, stored: tuple[int, int] | None
) -> Lag:
    mine = (int(live[keyspace.EPOCH]), int(live[keyspace.VERSION])) if live else None
    unflushed = (mine is not None and mine != stored) if up else None
    behind = mine is not None and stored is not None and mine < stored
    return Lag(
        unflushed,
        since_ms if unflushed else None,
        behind,
        *(stored or (None, None)),
        *(mine or (None, None)),
    )


def _is_behind(field: str, live: Mapping[str, str]) -> bool:
    """Whether a calendar counter is missing, or was not updated with its meter's last change."""
    text = live.get(field)
    meter = field.removeprefix(keyspace.CALENDAR).rsplit(":", 1)[0]
    count = live.get(keyspace.METER + meter, "0").rsplit(" ", 1)[-1]
    return text is None or text.rsplit(" ", 1)[-1] != count


def _meters(read: _Read, meters: Mapping[str, Meter], period: Span) -> tuple[MeterUsage, ...]:
    rows = []
    for name, meter in meters.items():
        row = current_record(read.state, name, read.now_ms) or PeriodTotal(name, *period, 0, 0)
        rows.append(
            MeterUsage(
                name,
                meter.unit,
                row.start_ms,
                row.end_ms,
                meter.from_units(row.total),
                meter.from_units(row.overage),
                keyspace.METER + name in read.live,
            )
        )
    return tuple(rows)


async def _hours(
    database: Database,
    live: Mapping[str, str],
    registry: MeterRegistry,
    subject: str,
    from_ms: int,
    to_ms: int,
) -> tuple[HourUsage, ...]:
    found: dict[tuple[int, str, int], HourUsage] = {}
    days: set[tuple[int, str, int]] = set()
    start, end = clock.to_datetime(from_ms), clock.to_datetime(to_ms)
    for row in await database.fetch("hours_of_subject", subject, start, end):
        hour = clock.from_datetime(row["hour_start"])
        first = clock.from_datetime(row["period_start"])
        found[hour, row["meter"], first] = HourUsage(
            row["meter"], first, hour, row["total"], row["overage"], False, row["day"]
        )
        if row["day"]:
            days.add((hour, row["meter"], first))
    for item in live_hours(live):
        meter = registry.get(item.meter)
        day_ms = item.hour_start_ms - item.hour_start_ms % DAY_MS
        if (day_ms, item.meter, item.period_start_ms) in days:
            continue  # the last hour of a subject that has been idle since
        if meter is not None and from_ms <= item.hour_start_ms < to_ms:
            found[item.hour_start_ms, item.meter, item.period_start_ms] = HourUsage(
                item.meter,
                item.period_start_ms,
                item.hour_start_ms,
                meter.from_units(item.total),
                meter.from_units(item.overage),
                True,
            )
    return tuple(found[key] for key in sorted(found))


__all__ = [
    "HourUsage",
    "Lag",
    "LimitEvent",
    "LimitStatus",
    "LimitUsage",
    "MeterUsage",
    "Usage",
    "read_usage",
]
