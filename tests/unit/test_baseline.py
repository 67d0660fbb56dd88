"""A state out of the ledger: records, calendars and windows, for each aggregation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import pytest

from core.admission.baseline import (
    Fired,
    HourTotal,
    Ledger,
    PeriodTotal,
    Record,
    SpanTotal,
    cold_fields,
    hours_held,
    live_hours,
    spans_needed,
    warm_fields,
)
from core.admission.program import CalendarUse
from core.clock import from_datetime
from core.period import DAY_MS, HOUR_MS, calendar_period
from core.policy import Aggregation, FixedWindow, Gcra, Limit, Meter, PeriodKind, SlidingWindow

NOW = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
HOUR = NOW - NOW % HOUR_MS
DAY = NOW - NOW % DAY_MS
END = 2**42
METERS = {
    "requests": Meter("requests"),
    "peak": Meter("peak", aggregation=Aggregation.MAX),
    "seats": Meter("seats", aggregation=Aggregation.LAST),
}


def record(meter: str, total: int, ago: int = 0, hour_total: int = 0, overage: int = 0) -> Record:
    """A period since 5 ms that still runs, last used so many hours ago."""
    period = PeriodTotal(meter, 5, END, total, overage)
    return Record(period, HourTotal(meter, 5, HOUR - ago * HOUR_MS, hour_total, min(overage, 1)))


def needed(
    ledger: Ledger, calendars: CalendarUse, limits: Iterable[Limit] = (), **live: str
) -> set[tuple[str, int, int]]:
    return spans_needed(ledger, live, METERS, calendars, limits, NOW)


def test_the_hours_of_a_live_state() -> None:
    live = {
        "ver": "7",
        "p:requests": f"100 {END} {HOUR}",
        "m:requests": "30 2 4 1 9",
        f"ch:requests:50:{HOUR}": "3 0",  # the same hour, before the period ended
        f"ch:requests:50:{HOUR - HOUR_MS}": "6 0",
        f"ch:peak:50:{HOUR}": "8 0",
        "cp:requests:50": "100 77 0",
    }
    mine = [
        HourTotal("requests", 100, HOUR, 4, 1),
        HourTotal("requests", 50, HOUR, 3, 0),
        HourTotal("requests", 50, HOUR - HOUR_MS, 6, 0),
    ]
    assert live_hours(live) == [*mine, HourTotal("peak", 50, HOUR, 8, 0)]
    assert hours_held(live, {"requests": (PeriodKind.DAY,)}) == mine


def test_cold_fields() -> None:
    ledger = Ledger(
        {"requests": record("requests", 90, hour_total=3, overage=4)},
        {
            ("requests", DAY, DAY + DAY_MS): SpanTotal(5, 3, 3, (HOUR, 5)),
            ("requests", DAY - DAY_MS, DAY): SpanTotal(7, 7, 7, (HOUR - 30 * HOUR_MS, 5)),
        },
        fired=[Fired("monthly", 5, 80, 100)],
    )
    limits = [
        FixedWindow("daily", "requests", 100, DAY_MS),
        FixedWindow("minute", "requests", 100, 60_000),
        SlidingWindow("two_days", "requests", 100, DAY_MS),
        FixedWindow("of_peak", "peak", 100, DAY_MS),
        Gcra("rate", "requests", 1, 1, 1),
    ]
    calendars = {"requests": (PeriodKind.DAY,)}
    assert needed(ledger, calendars, limits) == ledger.spans.keys()
    assert cold_fields(ledger, METERS, calendars, limits, NOW) == {
        "p:requests": f"5 {END} {HOUR}",
        "m:requests": "90 4 3 1 0",
        "q:requests:day": f"{DAY} 5 0",
        "w:daily": f"{DAY} 5",
        "s:two_days": f"{DAY} 5 7",
        "t:monthly": "5 80 100",
    }


@pytest.mark.parametrize("ago", [30, -30])
def test_a_cold_state_is_as_it_was_left_not_as_it_would_be_now(ago: int) -> None:
    """Used yesterday, or tomorrow by a clock that was ahead: the script rolls it over or waits."""
    at = HOUR - ago * HOUR_MS
    day, year = (calendar_period(kind, at) for kind in (PeriodKind.DAY, PeriodKind.YEAR))
    ledger = Ledger(
        {"requests": record("requests", 90, ago, hour_total=3)},
        {("requests", *day): SpanTotal(6, 3), ("requests", *year): SpanTotal(70, 3)},
    )
    calendars = {"requests": (PeriodKind.DAY, PeriodKind.YEAR)}
    limits = [SlidingWindow("hours", "requests", 9, HOUR_MS)]
    assert needed(ledger, calendars, limits) == {
        *ledger.spans,
        ("requests", at, at + HOUR_MS),
        ("requests", at - HOUR_MS, at),
    }
    assert cold_fields(ledger, METERS, calendars, [], NOW) == {
        "p:requests": f"5 {END} {at}",
        "m:requests": "90 0 3 0 0",
        "q:requests:day": f"{day[0]} 6 0",
        "q:requests:year": f"{year[0]} 70 0",
    }


def test_a_new_subject_gets_its_calendar_counters_alone() -> None:
    calendars = {"requests": (PeriodKind.DAY,), "peak": (PeriodKind.YEAR,)}
    assert needed(Ledger(), calendars, [FixedWindow("daily", "requests", 1, DAY_MS)]) == set()
    fields = cold_fields(Ledger(), METERS, calendars, [], NOW)
    assert {name: text.split()[1:] for name, text in fields.items()} == {
        "q:requests:day": ["0", "0"],
        "q:peak:year": ["0", "0"],
    }


def test_a_meter_that_the_configuration_dropped_is_seeded_too() -> None:
    ledger = Ledger({"tokens": record("tokens", 50, 2, hour_total=5)})
    assert cold_fields(ledger, METERS, {}, [], NOW) == {
        "p:tokens": f"5 {END} {HOUR - 2 * HOUR_MS}",
        "m:tokens": "50 0 5 0 0",
    }


def warm(meter: str, ledger: Ledger, live: Mapping[str, str]) -> str:
    fields = warm_fields(ledger, live, METERS, {meter: (PeriodKind.DAY,)}, NOW)
    return fields[f"q:{meter}:day"]


@pytest.mark.parametrize(
    ("meter", "stored", "expected"),
    [
        # 40 in the ledger, of which 3 in an hour that Redis holds as 5, and 2 since
        ("requests", SpanTotal(40, 20, 3, (HOUR - HOUR_MS, 5)), 40 - 3 + 5 + 2),
        ("peak", SpanTotal(40, 20, 3, (HOUR - HOUR_MS, 5)), 20),
        ("peak", SpanTotal(4, 4, 3, (HOUR - HOUR_MS, 5)), 5),
        ("seats", SpanTotal(40, 20, 3, (HOUR - HOUR_MS, 5)), 2),
        ("seats", SpanTotal(40, 20, 9, (HOUR + HOUR_MS, 5)), 9),  # ahead of Redis' clock
    ],
)
def test_live_hours_take_the_place_of_the_ledgers(
    meter: str, stored: SpanTotal, expected: int
) -> None:
    live = {
        f"p:{meter}": f"5 {END} {HOUR}",
        f"m:{meter}": "100 0 2 0 17",
        f"ch:{meter}:5:{HOUR - HOUR_MS}": "5 0",
        f"ch:{meter}:5:{DAY - HOUR_MS}": "1000 0",  # of yesterday
    }
    ledger = Ledger(
        {meter: record(meter, 90, 1)},
        {(meter, DAY, DAY + DAY_MS): stored},
        [HourTotal(meter, 5, HOUR - HOUR_MS, 3, 0), HourTotal(meter, 5, DAY - HOUR_MS, 900, 0)],
    )
    assert warm(meter, ledger, live) == f"{DAY} {expected} 17"
    assert needed(ledger, {meter: (PeriodKind.DAY,)}, **live) == ledger.spans.keys()


def test_an_hour_without_a_count_says_nothing_of_the_last_value() -> None:
    live = {"p:seats": f"5 {END} {HOUR}", "m:seats": "7 0 0 0 3"}
    ledger = Ledger(
        {"seats": record("seats", 7, 3, 7)},
        {("seats", DAY, DAY + DAY_MS): SpanTotal(7, 7, 7, (HOUR - 3 * HOUR_MS, 5))},
    )
    assert warm("seats", ledger, live) == f"{DAY} 7 3"


def test_the_last_value_is_that_of_the_later_period() -> None:
    """One hour with a period's end in it: the order of the hash's fields must not matter."""
    live = {
        "p:seats": f"{HOUR + 60_000} {END} {HOUR}",
        "m:seats": "9 0 9 0 2",
        f"ch:seats:50:{HOUR}": "3 0",
    }
    assert warm("seats", Ledger(), live) == f"{DAY} 9 2"


def test_a_warm_state_gets_the_records_it_lacks_and_no_others() -> None:
    live = {"p:requests": f"5 {END} {HOUR}", "m:requests": "9 0 9 0 2"}
    ledger = Ledger({"requests": record("requests", 90), "peak": record("peak", 60, 1, 40)})
    assert warm_fields(ledger, live, METERS, {}, NOW) == {
        "p:peak": f"5 {END} {HOUR - HOUR_MS}",
        "m:peak": "60 0 40 0 0",
    }
