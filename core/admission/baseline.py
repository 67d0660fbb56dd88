"""Rebuilds the live state of a subject from the ledger: new subject, evicted key, wiped Redis.

The ledger holds totals per billing period and per hour. Everything that a long limit counts is an
aggregate over hours, so quotas of any calendar and windows of whole hours continue where the last
flush left them. Shorter windows and bursts start afresh.

A state is rebuilt as it was left, at the latest hour that the ledger has, and not as it should be
now: the script rolls it over as it would have a live one. So a closed row is never written again,
whatever became of the plan's interval or of Redis' clock, and the end of a period is told.
Pure functions: the I/O is that of `core.admission.ledger` and the seeder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from core import keyspace
from core.admission.program import CalendarUse
from core.period import HOUR_MS, Span, calendar_period
from core.policy import Aggregation, FixedWindow, Limit, Meter, SlidingWindow

MeterSpan = tuple[str, int, int]
"""A meter and the hours that start in [start, end), epoch ms."""


@dataclass(frozen=True, slots=True)
class PeriodTotal:
    """A meter's billing period, in smallest units; times in epoch ms."""

    meter: str
    start_ms: int
    end_ms: int
    total: int
    overage: int


@dataclass(frozen=True, slots=True)
class HourTotal:
    """A meter's hour, split at period boundaries; smallest units, epoch ms."""

    meter: str
    period_start_ms: int
    hour_start_ms: int
    total: int
    overage: int


@dataclass(frozen=True, slots=True)
class Record:
    """A meter's latest period in the ledger and the latest hour of it.

    `counted_ms` is the hour of the last count in any period, None when that is `hour`'s: a period
    may have begun since without any, and the calendars and windows of then are still to be told.
    """

    period: PeriodTotal
    hour: HourTotal
    counted_ms: int | None = None


@dataclass(frozen=True, slots=True)
class SpanTotal:
    """All aggregates over a span's hours; `last` was counted in the hour and period `last_at`."""

    total: int
    highest: int
    last: int = 0
    last_at: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Fired:
    """The highest threshold of a limit of so many units that fired in the period of `start_ms`."""

    limit: str
    start_ms: int
    percent: int
    units: int


@dataclass(slots=True)
class Ledger:
    """What the ledger knows of one subject.

    `spans` has the spans that were asked for and have hours; `held` what it has of the hours that
    the live state holds as well.
    """

    records: dict[str, Record] = field(default_factory=dict)
    spans: dict[MeterSpan, SpanTotal] = field(default_factory=dict)
    held: list[HourTotal] = field(default_factory=list)
    fired: list[Fired] = field(default_factory=list)


def live_hours(live: Mapping[str, str]) -> list[HourTotal]:
    """The hours in a state hash: the current ones and the closed ones that are not flushed yet.

    Absolute totals, so they are right wherever there is one.

    Raises:
        ValueError, KeyError: a field cannot be read.
    """
    rows: list[HourTotal] = []
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
        rows.append(HourTotal(meter, start, hour, total, overage))
    return rows


def _moment(name: str, ledger: Ledger, now_ms: int) -> int:
    """The time as of which a cold subject's counters are rebuilt."""
    record = ledger.records.get(name)
    if record is None:
        return now_ms
    return record.hour.hour_start_ms if record.counted_ms is None else record.counted_ms


def _warm_moment(name: str, ledger: Ledger, hours: Iterable[HourTotal], now_ms: int) -> int:
    """The present, or later when the clock went back: a counter never does."""
    later = [row.hour_start_ms for row in hours if row.meter == name]
    record = ledger.records.get(name)
    return max([now_ms, *later, *([record.hour.hour_start_ms] if record else [])])


def _windows(
    limits: Iterable[Limit], meters: Mapping[str, Meter]
) -> list[FixedWindow | SlidingWindow]:
    """Windows that hours add up to: whole hours, of meters that are sums."""
    return [
        limit
        for limit in limits
        if isinstance(limit, FixedWindow | SlidingWindow)
        and limit.window_ms % HOUR_MS == 0
        and meters[limit.meter].aggregation is Aggregation.SUM
    ]


def spans_needed(
    ledger: Ledger,
    live: Mapping[str, str],
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    limits: Iterable[Limit],
    now_ms: int,
) -> set[MeterSpan]:
    """The spans that the fields are aggregates over; `live` is empty for a cold subject."""
    spans: set[MeterSpan] = set()
    hours = live_hours(live)
    for name, kinds in calendars.items():
        if name in ledger.records:
            at = _moment(name, ledger, now_ms)
            if live:
                at = _warm_moment(name, ledger, hours, now_ms)
            spans.update((name, *calendar_period(kind, at)) for kind in kinds)
    for limit in () if live else _windows(limits, meters):
        if limit.meter in ledger.records:
            at = _moment(limit.meter, ledger, now_ms)
            start = at - at % limit.window_ms
            spans.add((limit.meter, start, start + limit.window_ms))
            if isinstance(limit, SlidingWindow):
                spans.add((limit.meter, start - limit.window_ms, start))
    return spans


def hours_held(live: Mapping[str, str], calendars: CalendarUse) -> list[HourTotal]:
    """The hours of a live state whose rows in the ledger have to be known, to take their place."""
    return [row for row in live_hours(live) if row.meter in calendars]


def _aggregate(meter: Meter, span: Span, ledger: Ledger, hours: Iterable[HourTotal]) -> int:
    """The meter's aggregate over a span: the ledger's, with `hours` in place of those it has."""
    found = ledger.spans.get((meter.name, *span), SpanTotal(0, 0))

    def within(rows: Iterable[HourTotal]) -> list[HourTotal]:
        return [r for r in rows if r.meter == meter.name and span[0] <= r.hour_start_ms < span[1]]

    live = within(hours)
    if meter.aggregation is Aggregation.SUM:
        stored = sum(row.total for row in within(ledger.held))
        return found.total - stored + sum(row.total for row in live)
    if meter.aggregation is Aggregation.MAX:  # of an hour that both have, the live one is no lower
        return max([found.highest, *(row.total for row in live)])
    counted = [((r.hour_start_ms, r.period_start_ms), r.total) for r in live if r.total]
    at, value = max(counted, default=((0, 0), 0))
    return value if at >= found.last_at else found.last


def _record_fields(name: str, record: Record) -> dict[str, str]:
    period, hour = record.period, record.hour
    return {
        keyspace.BOUNDS + name: f"{period.start_ms} {period.end_ms} {hour.hour_start_ms}",
        keyspace.METER + name: (f"{period.total} {period.overage} {hour.total} {hour.overage} 0"),
    }


def cold_fields(
    ledger: Ledger,
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    limits: Iterable[Limit],
    now_ms: int,
) -> dict[str, str]:
    """All fields of a subject that has no live state."""
    fields: dict[str, str] = {}
    for name, record in ledger.records.items():
        fields |= _record_fields(name, record)
    for name, kinds in calendars.items():
        at = _moment(name, ledger, now_ms)
        for kind in kinds:
            span = calendar_period(kind, at)
            total = _aggregate(meters[name], span, ledger, ())
            fields[f"{keyspace.CALENDAR}{name}:{kind}"] = f"{span[0]} {total} 0"
    for limit in _windows(limits, meters):
        at = _moment(limit.meter, ledger, now_ms)
        window, meter = limit.window_ms, meters[limit.meter]
        start = at - at % window
        count = _aggregate(meter, (start, start + window), ledger, ())
        if isinstance(limit, FixedWindow):
            if count:
                fields[keyspace.FIXED + limit.name] = f"{start} {count}"
        else:
            before = _aggregate(meter, (start - window, start), ledger, ())
            if count or before:
                fields[keyspace.SLIDING + limit.name] = f"{start} {count} {before}"
    for item in ledger.fired:
        fields[keyspace.FIRED + item.limit] = f"{item.start_ms} {item.percent} {item.units}"
    return fields


def warm_fields(
    ledger: Ledger,
    live: Mapping[str, str],
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    now_ms: int,
) -> dict[str, str]:
    """The calendar counters of a subject that has state but lacks some of them.

    And the record of a meter that only the ledger has.
    """
    fields: dict[str, str] = {}
    for name, record in ledger.records.items():
        if keyspace.METER + name not in live:
            fields |= _record_fields(name, record)
    hours = live_hours(live)
    for name, kinds in calendars.items():
        at = _warm_moment(name, ledger, hours, now_ms)
        count = live.get(keyspace.METER + name, "0").rsplit(" ", 1)[-1]
        for kind in kinds:
            span = calendar_period(kind, at)
            total = _aggregate(meters[name], span, ledger, hours)
            fields[f"{keyspace.CALENDAR}{name}:{kind}"] = f"{span[0]} {total} {count}"
    return fields


__all__ = [
    "Fired",
    "HourTotal",
    "Ledger",
    "MeterSpan",
    "PeriodTotal",
    "Record",
    "SpanTotal",
    "cold_fields",
    "hours_held",
    "live_hours",
    "spans_needed",
    "warm_fields",
]
