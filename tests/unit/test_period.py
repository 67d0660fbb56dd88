"""Billing periods and the calendar: month ends, leap days, times before the anchor."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import from_datetime, to_datetime
from core.period import (
    CALENDAR_KINDS,
    DAY_MS,
    WEEK_MS,
    add_months,
    billing_period,
    calendar_bounds,
    calendar_period,
)
from core.policy import PeriodKind


def ms(text: str) -> int:
    return from_datetime(datetime.fromisoformat(text).replace(tzinfo=UTC))


def shown(span: tuple[int, int]) -> tuple[str, str]:
    start, end = (to_datetime(at).strftime("%Y-%m-%dT%H:%M") for at in span)
    return start, end


@pytest.mark.parametrize(
    ("anchor", "months", "at", "start", "end"),
    [
        ("2026-01-31", 1, "2026-02-01", "2026-01-31T00:00", "2026-02-28T00:00"),
        ("2026-01-31", 1, "2026-02-28", "2026-02-28T00:00", "2026-03-31T00:00"),
        ("2026-01-31", 1, "2026-04-30", "2026-04-30T00:00", "2026-05-31T00:00"),
        ("2024-01-31", 1, "2024-02-29", "2024-02-29T00:00", "2024-03-31T00:00"),
        ("2024-02-29", 12, "2025-03-01", "2025-02-28T00:00", "2026-02-28T00:00"),
        ("2024-02-29", 12, "2028-02-28", "2027-02-28T00:00", "2028-02-29T00:00"),
        ("2026-01-15T10:30", 1, "2026-02-15T10:29:59", "2026-01-15T10:30", "2026-02-15T10:30"),
        ("2026-01-15T10:30", 1, "2026-02-15T10:30", "2026-02-15T10:30", "2026-03-15T10:30"),
        ("2026-01-15", 3, "2026-06-30", "2026-04-15T00:00", "2026-07-15T00:00"),
        ("2026-01-15", 3, "2026-01-14", "2025-10-15T00:00", "2026-01-15T00:00"),
        ("2026-08-31", 1, "2026-02-28T23:00", "2026-02-28T00:00", "2026-03-31T00:00"),
        ("2026-12-31T23:59", 1, "2027-01-01", "2026-12-31T23:59", "2027-01-31T23:59"),
    ],
)
def test_billing_period(anchor: str, months: int, at: str, start: str, end: str) -> None:
    assert shown(billing_period(ms(anchor), months, ms(at))) == (start, end)


moments = st.integers(ms("1980-01-01"), ms("2100-01-01"))


@given(anchor=moments, at=moments, months=st.sampled_from([1, 3, 12]))
def test_billing_periods_hold_the_moment_and_follow_each_other(
    anchor: int, at: int, months: int
) -> None:
    start, end = billing_period(anchor, months, at)
    assert start <= at < end
    assert billing_period(anchor, months, start) == (start, end)
    assert billing_period(anchor, months, end)[0] == end
    assert billing_period(anchor, months, start - 1)[1] == start
    assert 28 * months <= (end - start) / DAY_MS <= 31 * months


@given(at=moments, kind=st.sampled_from(CALENDAR_KINDS))
def test_calendar_periods_hold_the_moment_and_follow_each_other(at: int, kind: PeriodKind) -> None:
    start, end = calendar_period(kind, at)
    assert start <= at < end
    assert calendar_period(kind, end)[0] == end
    assert start % DAY_MS == end % DAY_MS == 0
    if kind is PeriodKind.WEEK:
        assert to_datetime(start).isoweekday() == 1
        assert end - start == WEEK_MS
    if kind in (PeriodKind.MONTH, PeriodKind.YEAR):
        assert to_datetime(start).day == to_datetime(end).day == 1


def test_calendar_bounds_are_in_the_order_of_the_script() -> None:
    at = ms("2026-06-17T11:20")
    bounds = [to_datetime(value).strftime("%Y-%m-%d") for value in calendar_bounds(at)]
    assert bounds == [
        "2026-06-17", "2026-06-18", "2026-06-15", "2026-06-22",
        "2026-06-01", "2026-07-01", "2026-01-01", "2027-01-01",
    ]  # fmt: skip


def test_a_billing_period_is_no_calendar_period() -> None:
    with pytest.raises(ValueError, match="anchor"):
        calendar_period(PeriodKind.BILLING, 0)


def test_add_months_clamps_and_returns() -> None:
    anchor = datetime(2026, 1, 31, 5, 6, tzinfo=UTC)
    days = [add_months(anchor, step).strftime("%m-%d %H:%M") for step in (-2, -1, 0, 1, 2, 13)]
    assert days == [
        "11-30 05:06", "12-31 05:06", "01-31 05:06", "02-28 05:06", "03-31 05:06", "02-28 05:06",
    ]  # fmt: skip
