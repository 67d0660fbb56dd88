"""Billing-period and calendar arithmetic, in UTC, on integer milliseconds.

A billing period is `interval_months` long and starts on the anchor's day of the month at the
anchor's time of day. Where a month has no such day, that one boundary is clamped to its last day;
the next returns to the anchor's day (31 January, 28 February, 31 March). UTC has no daylight
saving, so a day is always 86,400,000 ms. Nothing here does I/O.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta

from core.clock import from_datetime, to_datetime
from core.policy import PeriodKind

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
WEEK_MS = 7 * DAY_MS
# 1 January 1970 was a Thursday; ISO weeks start on Monday.
_MONDAY_OFFSET_MS = 3 * DAY_MS

Span = tuple[int, int]  # [start, end) in epoch milliseconds


def add_months(anchor: datetime, months: int) -> datetime:
    """The anchor moved by whole months, its day clamped to the target month's last day."""
    index = anchor.year * 12 + anchor.month - 1 + months
    year, month = divmod(index, 12)
    day = min(anchor.day, monthrange(year, month + 1)[1])
    return anchor.replace(year=year, month=month + 1, day=day)


def billing_period(anchor_ms: int, interval_months: int, at_ms: int) -> Span:
    """The billing period that holds `at_ms`; times before the anchor count backwards from it."""
    anchor = to_datetime(anchor_ms)
    at = to_datetime(at_ms)
    months = (at.year - anchor.year) * 12 + at.month - anchor.month
    step = months // interval_months
    # The month difference is at most one interval off, in either direction, through the day of
    # the month and the clamping.
    while add_months(anchor, step * interval_months) > at:
        step -= 1
    while add_months(anchor, (step + 1) * interval_months) <= at:
        step += 1
    return (
        from_datetime(add_months(anchor, step * interval_months)),
        from_datetime(add_months(anchor, (step + 1) * interval_months)),
    )


def calendar_period(kind: PeriodKind, at_ms: int) -> Span:
    """The UTC day, ISO week, month or year that holds `at_ms`.

    Raises:
        ValueError: `kind` is billing, which needs an anchor.
    """
    if kind is PeriodKind.DAY:
        start = at_ms - at_ms % DAY_MS
        return start, start + DAY_MS
    if kind is PeriodKind.WEEK:
        start = at_ms - (at_ms + _MONDAY_OFFSET_MS) % WEEK_MS
        return start, start + WEEK_MS
    at = to_datetime(at_ms)
    if kind is PeriodKind.MONTH:
        first = datetime(at.year, at.month, 1, tzinfo=UTC)
        after = (first + timedelta(days=32)).replace(day=1)
    elif kind is PeriodKind.YEAR:
        first = datetime(at.year, 1, 1, tzinfo=UTC)
        after = datetime(at.year + 1, 1, 1, tzinfo=UTC)
    else:
        raise ValueError("a billing period needs an anchor: use billing_period")
    return from_datetime(first), from_datetime(after)


# The order in which the admission script receives the calendar: see lua/admit.lua.
CALENDAR_KINDS = (PeriodKind.DAY, PeriodKind.WEEK, PeriodKind.MONTH, PeriodKind.YEAR)


def calendar_bounds(at_ms: int) -> tuple[int, ...]:
    """Start and end of the current day, week, month and year: eight numbers, in that order."""
    bounds: list[int] = []
    for kind in CALENDAR_KINDS:
        bounds.extend(calendar_period(kind, at_ms))
    return tuple(bounds)
