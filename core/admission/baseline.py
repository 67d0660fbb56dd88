"""Rebuilds the live state of a subject from the ledger: new subject, evicted key, wiped Redis.

The ledger holds totals per billing period and per hour. Everything that a long limit counts is an
aggregate over hours, so quotas of any calendar and windows of whole hours continue where the last
flush left them. Shorter windows and bursts start afresh. Pure functions: the I/O is the seeder's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from core import keyspace
from core.admission.program import CalendarUse
from core.period import HOUR_MS, Span, calendar_period
from core.policy import Aggregation, FixedWindow, Limit, Meter, SlidingWindow


@dataclass(frozen=True, slots=True)
class PeriodTotal:
    """A meter's billing period in the ledger, in smallest units; times in epoch ms."""

    meter: str
    start_ms: int
    end_ms: int
    total: int
    overage: int


@dataclass(frozen=True, slots=True)
class HourTotal:
    """A meter's hour in the ledger, split at period boundaries; smallest units, epoch ms."""

    meter: str
    period_start_ms: int
    hour_start_ms: int
    total: int
    overage: int


@dataclass(frozen=True, slots=True)
class Fired:
    """The highest threshold of a limit that fired in the period that starts at `start_ms`."""

    limit: str
    start_ms: int
    percent: int


@dataclass(slots=True)
class Ledger:
    """What the ledger knows of one subject. `periods` are those that hold the present."""

    periods: list[PeriodTotal] = field(default_factory=list)
    hours: list[HourTotal] = field(default_factory=list)
    fired: list[Fired] = field(default_factory=list)


def hours_needed_since(now_ms: int, calendars: CalendarUse, limits: Iterable[Limit]) -> int:
    """Start (epoch ms) of the oldest hour that some counter is rebuilt from."""
    since = now_ms - now_ms % HOUR_MS
    for kinds in calendars.values():
        for kind in kinds:
            since = min(since, calendar_period(kind, now_ms)[0])
    for limit in limits:
        if isinstance(limit, FixedWindow | SlidingWindow) and limit.window_ms % HOUR_MS == 0:
            windows = 2 if isinstance(limit, SlidingWindow) else 1
            start = now_ms - now_ms % limit.window_ms - (windows - 1) * limit.window_ms
            since = min(since, start)
    return since


def overlay(hours: Iterable[HourTotal], live: Mapping[str, str]) -> list[HourTotal]:
    """The ledger's hours, replaced by what the live hash still holds of them.

    The hash has the current hour and every closed hour that is not flushed yet, as absolute totals,
    so it is right wherever it has a value.
    """
    merged = {(row.meter, row.period_start_ms, row.hour_start_ms): row for row in hours}
    for name, text in live.items():
        if name.startswith(keyspace.METER):
            meter = name.removeprefix(keyspace.METER)
            start, _, hour = map(int, live[keyspace.BOUNDS + meter].split(" "))
            _, _, total, overage, _ = map(int, text.split(" "))
        elif name.startswith(keyspace.CLOSED_HOUR):
            meter, start_text, hour_text = name.removeprefix(keyspace.CLOSED_HOUR).rsplit(":", 2)
            start, hour = int(start_text), int(hour_text)
            total, overage = map(int, text.split(" "))
        else:
            continue
        merged[meter, start, hour] = HourTotal(meter, start, hour, total, overage)
    return sorted(
        merged.values(), key=lambda row: (row.meter, row.hour_start_ms, row.period_start_ms)
    )


def aggregate(meter: Meter, hours: Iterable[HourTotal], start_ms: int, end_ms: int) -> int:
    """The meter's aggregate over the hours within [start, end), which must be in order of time."""
    value = 0
    for row in hours:
        if row.meter == meter.name and start_ms <= row.hour_start_ms < end_ms:
            if meter.aggregation is Aggregation.SUM:
                value += row.total
            elif meter.aggregation is Aggregation.MAX:
                value = max(value, row.total)
            else:
                value = row.total
    return value


def _meter_counts(live: Mapping[str, str]) -> dict[str, int]:
    return {
        name.removeprefix(keyspace.METER): int(text.rsplit(" ", 1)[1])
        for name, text in live.items()
        if name.startswith(keyspace.METER)
    }


def calendar_fields(
    hours: Iterable[HourTotal],
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    now_ms: int,
    counts: Mapping[str, int],
) -> dict[str, str]:
    """Fields of the calendar counters. `counts` are the update counts of the live meter records."""
    rows = list(hours)
    fields: dict[str, str] = {}
    for name, kinds in calendars.items():
        for kind in kinds:
            start, end = calendar_period(kind, now_ms)
            total = aggregate(meters[name], rows, start, end)
            fields[f"{keyspace.CALENDAR}{name}:{kind}"] = f"{start} {total} {counts.get(name, 0)}"
    return fields


def _window_fields(
    hours: list[HourTotal], meters: Mapping[str, Meter], limits: Iterable[Limit], now_ms: int
) -> dict[str, str]:
    fields: dict[str, str] = {}
    for limit in limits:
        if not isinstance(limit, FixedWindow | SlidingWindow) or limit.window_ms % HOUR_MS:
            continue
        meter = meters[limit.meter]
        if meter.aggregation is not Aggregation.SUM:
            continue  # a window counts cost; only a sum's hours add up to it
        start = now_ms - now_ms % limit.window_ms
        count = aggregate(meter, hours, start, start + limit.window_ms)
        if isinstance(limit, FixedWindow):
            if count:
                fields[keyspace.FIXED + limit.name] = f"{start} {count}"
        else:
            before = aggregate(meter, hours, start - limit.window_ms, start)
            if count or before:
                fields[keyspace.SLIDING + limit.name] = f"{start} {count} {before}"
    return fields


def cold_fields(
    ledger: Ledger,
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    limits: Iterable[Limit],
    now_ms: int,
) -> dict[str, str]:
    """All fields of a subject that has no live state."""
    current: dict[str, PeriodTotal] = {}
    for row in ledger.periods:
        found = current.get(row.meter)
        if found is None or row.start_ms > found.start_ms:
            current[row.meter] = row
    fields: dict[str, str] = {}
    hour = now_ms - now_ms % HOUR_MS
    for name, row in current.items():
        this_hour = next(
            (
                item
                for item in ledger.hours
                if item.meter == name
                and item.hour_start_ms == hour
                and item.period_start_ms == row.start_ms
            ),
            None,
        )
        total = this_hour.total if this_hour else 0
        overage = this_hour.overage if this_hour else 0
        fields[keyspace.BOUNDS + name] = f"{row.start_ms} {row.end_ms} {hour}"
        fields[keyspace.METER + name] = f"{row.total} {row.overage} {total} {overage} 0"
    fields |= calendar_fields(ledger.hours, meters, calendars, now_ms, {})
    fields |= _window_fields(ledger.hours, meters, limits, now_ms)
    for item in sorted(ledger.fired, key=lambda row: row.start_ms):
        fields[keyspace.FIRED + item.limit] = f"{item.start_ms} {item.percent}"
    return fields


def warm_fields(
    ledger: Ledger,
    live: Mapping[str, str],
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    now_ms: int,
) -> dict[str, str]:
    """The calendar counters of a subject that has state but lacks some of them."""
    hours = overlay(ledger.hours, live)
    return calendar_fields(hours, meters, calendars, now_ms, _meter_counts(live))


__all__ = [
    "Fired",
    "HourTotal",
    "Ledger",
    "PeriodTotal",
    "Span",
    "aggregate",
    "calendar_fields",
    "cold_fields",
    "hours_needed_since",
    "overlay",
    "warm_fields",
]
