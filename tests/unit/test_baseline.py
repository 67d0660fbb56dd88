"""A state out of the ledger: totals, hours, calendars and windows, for each aggregation."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from core.admission.baseline import (
    Fired,
    HourTotal,
    Ledger,
    PeriodTotal,
    aggregate,
    cold_fields,
    hours_needed_since,
    overlay,
    warm_fields,
)
from core.clock import from_datetime
from core.period import DAY_MS, HOUR_MS, calendar_period
from core.policy import Aggregation, FixedWindow, Gcra, Meter, PeriodKind, SlidingWindow

NOW = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
HOUR = NOW - NOW % HOUR_MS
METERS = {
    "requests": Meter("requests"),
    "peak": Meter("peak", aggregation=Aggregation.MAX),
    "seats": Meter("seats", aggregation=Aggregation.LAST),
}


def hour(meter: str, ago: int, total: int, period: int = 0, overage: int = 0) -> HourTotal:
    return HourTotal(meter, period, HOUR - ago * HOUR_MS, total, overage)


@pytest.mark.parametrize(("meter", "expected"), [("requests", 14), ("peak", 8), ("seats", 1)])
def test_aggregate(meter: str, expected: int) -> None:
    rows = [hour(meter, 9, 100), hour(meter, 3, 5), hour(meter, 2, 8), hour(meter, 1, 1)]
    rows += [hour("other", 2, 7), hour(meter, 0, 50)]
    assert aggregate(METERS[meter], rows, HOUR - 3 * HOUR_MS, HOUR) == expected


def test_live_hours_replace_those_of_the_ledger() -> None:
    live = {
        "ver": "7",
        "p:requests": f"100 {2**42} {HOUR}",
        "m:requests": "30 2 4 1 9",
        f"ch:requests:50:{HOUR}": "3 0",  # the same hour, before the period ended
        f"ch:requests:50:{HOUR - HOUR_MS}": "6 0",
        "cp:requests:50": "100 77 0",
    }
    ledger = [hour("requests", 1, 5, 50), hour("requests", 2, 1, 50), hour("requests", 0, 1, 50)]
    assert overlay(ledger, live) == [
        hour("requests", 2, 1, 50),
        hour("requests", 1, 6, 50),
        hour("requests", 0, 3, 50),
        hour("requests", 0, 4, 100, 1),
    ]


def test_the_last_value_is_that_of_the_later_period() -> None:
    """One hour with a period's end in it: the order of the hash's fields must not matter."""
    live = {
        "p:seats": f"{HOUR + 60_000} {2**42} {HOUR}",
        "m:seats": "9 0 9 0 2",
        f"ch:seats:50:{HOUR}": "3 0",
    }
    fields = warm_fields(Ledger(), live, METERS, {"seats": (PeriodKind.DAY,)}, NOW)
    assert fields == {"q:seats:day": f"{calendar_period(PeriodKind.DAY, NOW)[0]} 9 2"}


def test_cold_fields() -> None:
    ledger = Ledger(
        [PeriodTotal("requests", 5, 2**42, 90, 4), PeriodTotal("requests", 3, 2**42, 11, 0)],
        [hour("requests", 30, 7, 5), hour("requests", 1, 2, 5), hour("requests", 0, 3, 5, 1)],
        [Fired("monthly", 5, 80), Fired("monthly", 3, 95)],
    )
    limits = [
        FixedWindow("daily", "requests", 100, DAY_MS),
        FixedWindow("minute", "requests", 100, 60_000),
        SlidingWindow("two_days", "requests", 100, DAY_MS),
        FixedWindow("of_peak", "peak", 100, DAY_MS),
        Gcra("rate", "requests", 1, 1, 1),
    ]
    day = NOW - NOW % DAY_MS
    assert cold_fields(ledger, METERS, {"requests": (PeriodKind.DAY,)}, limits, NOW) == {
        "p:requests": f"5 {2**42} {HOUR}",
        "m:requests": "90 4 3 1 0",
        "q:requests:day": f"{day} 5 0",
        "w:daily": f"{day} 5",
        "s:two_days": f"{day} 5 7",
        "t:monthly": "5 80",
    }


def test_a_new_subject_gets_its_calendar_counters_alone() -> None:
    calendars = {"requests": (PeriodKind.DAY,), "peak": (PeriodKind.YEAR,)}
    fields = cold_fields(Ledger(), METERS, calendars, [], NOW)
    assert {name: text.split()[1:] for name, text in fields.items()} == {
        "q:requests:day": ["0", "0"],
        "q:peak:year": ["0", "0"],
    }


def test_hours_needed() -> None:
    assert hours_needed_since(NOW, {}, []) == HOUR
    year = {"requests": (PeriodKind.DAY, PeriodKind.YEAR)}
    assert hours_needed_since(NOW, year, []) == calendar_period(PeriodKind.YEAR, NOW)[0]
    day = NOW - NOW % DAY_MS
    assert hours_needed_since(NOW, {}, [FixedWindow("w", "requests", 1, DAY_MS)]) == day
    sliding = SlidingWindow("s", "requests", 1, DAY_MS)
    assert hours_needed_since(NOW, {}, [sliding]) == day - DAY_MS
    assert hours_needed_since(NOW, {}, [FixedWindow("w", "requests", 1, 90_000)]) == HOUR
