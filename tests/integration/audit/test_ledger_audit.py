"""Each way in which the ledger can disagree with itself, made by hand, found and explained."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from core.audit import Cause, MeterUse
from core.clock import from_datetime
from tests.integration.audit.scene import Scene, play

# A month that was rolled up, a period of it, a day.
OLD = datetime(2026, 2, 1, tzinfo=UTC)
PERIOD = (OLD, OLD + timedelta(days=28))


async def usage(s: Scene) -> None:
    """Three subjects with meters of each kind, all of it flushed."""
    for number, subject in enumerate(("a", "b", "c"), start=2):
        await s.hit(subject, number * 4, requests=1, credits=150)
        await s.hit(subject, 1, peak=70, seats=9)
        await s.hit(subject, 1, peak=30, seats=4)
    await s.flusher.flush_all()


async def old_period(s: Scene, subject: str, meter: str = "requests", **more: object) -> None:
    """A period of 30 that ended: 10 in an hour, 20 in a day that was rolled up."""
    row = {"total": 30, "sealed_at": None, "updated_at": PERIOD[1], "seals": 0} | more
    await s.sql.execute(
        "INSERT INTO ledger_subjects VALUES ($1, 1, 1) ON CONFLICT DO NOTHING", subject
    )
    await s.sql.execute(
        "INSERT INTO ledger_periods (subject, meter, period_start, period_end, total, epoch, "
        "version, sealed_at, updated_at, seals) VALUES ($1, $2, $3, $4, $5, 1, 1, $6, $7, $8)",
        subject, meter, *PERIOD, row["total"], row["sealed_at"], row["updated_at"], row["seals"],
    )  # fmt: skip
    await s.sql.execute(
        "INSERT INTO ledger_days VALUES ($1, $2, $3, $3, 20, 0, 15, 2)", subject, meter, OLD
    )
    await s.sql.execute(
        "INSERT INTO ledger_hours (subject, meter, period_start, hour_start, total, epoch, "
        "version) VALUES ($1, $2, $3, $4, 10, 1, 1)",
        subject, meter, OLD, OLD + timedelta(days=3),
    )  # fmt: skip


def test_what_was_counted_and_flushed_adds_up(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await usage(s)
        await old_period(s, "d")
        report = await s.audit()
        assert (report.drifts, report.clean) == ((), True)
        assert (report.subjects, report.states, report.pending) == (4, 3, 0)

    play(valkey, database, act)


@pytest.mark.parametrize(
    ("statement", "cause", "meter", "expected", "found", "words"),
    [
        (
            "UPDATE ledger_hours SET total = total + 3 WHERE subject = 'b' AND meter = 'requests'",
            Cause.PERIOD_SUM, "requests", 15, 12,
            "says 12 and its hours add up to 15 (3 less)",
        ),
        (
            "UPDATE ledger_periods SET total = 17.5 WHERE subject = 'b' AND meter = 'credits'",
            Cause.PERIOD_SUM, "credits", 18, Decimal("17.5"),
            "says 17.5 and its hours add up to 18 (0.5 less)",
        ),
        (
            "DELETE FROM ledger_hours WHERE subject = 'b' AND meter = 'peak'",
            Cause.PERIOD_SUM, "peak", 0, 70, "its hours have at most 0 (70 more)",
        ),
        (
            "UPDATE ledger_hours SET total = 5 WHERE subject = 'b' AND meter = 'seats'",
            Cause.PERIOD_SUM, "seats", 5, 4, "its hours end with 5",
        ),
        (
            "UPDATE ledger_periods SET overage = 8 WHERE subject = 'b' AND meter = 'requests'",
            Cause.HOUR_OVERAGE_SUM, "requests", 7, 8, "of overage and its hours add up to 7",
        ),
        (
            "DELETE FROM ledger_periods WHERE subject = 'b' AND meter = 'requests'",
            Cause.ORPHAN, "requests", 0, 12, "hours that come to 12 and no period",
        ),
    ],
)  # fmt: skip
def test_rows_that_were_changed_by_hand(
    valkey: str, database: str,
    statement: str, cause: Cause, meter: str, expected: object, found: object, words: str,
) -> None:  # fmt: skip
    async def act(s: Scene) -> None:
        await usage(s)
        s.redis.flushall()  # the ledger alone
        await s.sql.execute(statement)
        before = await rows(s)
        for options in ({}, {"repair": True}, {"subject": "b"}, {"batch": 1}):
            drift = await s.only(cause, **options)
            assert (drift.subject, drift.meter) == ("b", meter)
            assert (drift.expected, drift.found) == (expected, found)
            assert words in drift.text
            assert drift.repaired == ""
        assert await rows(s) == before  # what is billed is never changed silently
        assert (await s.audit(subject="a")).clean

    play(valkey, database, act)


async def rows(s: Scene) -> list[object]:
    found: list[object] = []
    for table in ("ledger_subjects", "ledger_periods", "ledger_hours", "ledger_days"):
        found += map(tuple, await s.sql.fetch(f"SELECT * FROM {table} ORDER BY 1, 2, 3, 4"))
    return found


def test_rows_of_subjects_that_the_ledger_does_not_list(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await usage(s)
        s.redis.flushall()
        await s.sql.execute("DELETE FROM ledger_subjects")
        await s.sql.execute("DELETE FROM ledger_periods WHERE subject = 'c'")
        for size in (1, 2, 500):
            report = await s.audit(batch=size)
            assert report.subjects == 3
            assert report.found == {Cause.ORPHAN: 12}
            texts = [drift.text for drift in report.drifts if drift.subject == "c"]
            assert all("no period" in text for text in texts)

    play(valkey, database, act)


def test_days_of_a_month_that_was_rolled_up_count_as_hours(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await old_period(s, "a")
        await s.sql.execute("UPDATE ledger_days SET total = 21")
        drift = await s.only(Cause.PERIOD_SUM)
        assert (drift.expected, drift.found) == (31, 30)
        assert drift.period_start_ms == from_datetime(OLD)
        # it ended before what is asked for
        after = from_datetime(PERIOD[1])
        assert (await s.audit(since_ms=after)).clean
        assert not (await s.audit(since_ms=after - 1)).clean

    play(valkey, database, act)


def test_a_sealed_period_that_was_written_later(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        later = PERIOD[1] + timedelta(hours=1)
        await old_period(s, "a", sealed_at=later, updated_at=later, seals=1)
        await old_period(s, "b", sealed_at=later, updated_at=later, seals=2)
        report = await s.audit()
        assert report.clean
        assert [drift.cause for drift in report.drifts] == [Cause.RESEALED]  # a note
        assert "sealed 2 times" in report.drifts[0].text
        await s.sql.execute(
            "UPDATE ledger_periods SET updated_at = updated_at + interval '1 s' WHERE subject = 'a'"
        )
        report = await s.audit()
        assert report.found == {Cause.SEALED_CHANGED: 1, Cause.RESEALED: 1}
        assert not report.clean

    play(valkey, database, act)


def test_a_negative_period_is_a_note(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await old_period(s, "a", total=-3)
        await s.sql.execute("DELETE FROM ledger_days")
        await s.sql.execute("UPDATE ledger_hours SET total = -3")
        drift = await s.only(Cause.NEGATIVE_TOTAL)
        assert (drift.note, drift.found) == (True, -3)
        assert (await s.audit()).clean

    play(valkey, database, act)


async def event(s: Scene, subject: str, meter: str, quantity: object, number: int = 0) -> None:
    """An event counted in the hour and period that the ledger has of the meter, the latest."""
    await s.sql.execute(
        "INSERT INTO usage_events (subject, id, meter, quantity, occurred_at, counted_at, "
        "period_start, hour_start) SELECT subject, $3, meter, $4, hour_start, hour_start, "
        "period_start, hour_start FROM ledger_hours WHERE subject = $1 AND meter = $2 "
        "ORDER BY hour_start DESC LIMIT 1",
        subject, meter, f"{meter}-{number}", quantity,
    )  # fmt: skip


def test_events_are_part_of_their_hour(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 2, credits=150)
        await event(s, "a", "credits", 1)
        await event(s, "a", "credits", Decimal("1.75"), 1)
        assert (await s.audit()).clean  # a route may charge the rest
        # the rest of this hour may still be on its way to Postgres
        assert (await s.audit(use=MeterUse(("credits",)))).clean
        await event(s, "a", "credits", Decimal("0.5"), 2)
        drift = await s.only(Cause.EVENT_EXCESS, repair=True)
        assert (drift.expected, drift.found) == (3, Decimal("3.25"))
        assert "is 3 and its 3 usage events come to 3.25 (0.25 more)" in drift.text
        # unless what an earlier hour charged may have been given back in this one
        assert (await s.audit(use=MeterUse((), ("credits",)))).clean
        # counted in Redis, not flushed: the total that is compared is the live one
        await s.hit("a", 1, credits=25)
        report = await s.audit()
        assert (report.clean, report.pending) == (True, 1)

    play(valkey, database, act)


def test_events_that_are_missing_where_nothing_else_is_counted(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        waiting = True

        async def events_waiting() -> bool:
            return waiting

        await old_period(s, "a", "credits")
        await event(s, "a", "credits", 9)
        # the day that was rolled up has 20 and no event at all
        options = {"use": MeterUse(("credits",)), "events_waiting": events_waiting}
        assert (await s.audit(**options)).clean
        waiting = False
        report = await s.audit(**options)
        assert report.found == {Cause.EVENT_MISSING: 2}
        day, hour = report.drifts
        assert (day.expected, day.found) == (20, 0)
        assert (hour.expected, hour.found) == (10, 9)
        assert "while no route charges this meter" in hour.text
        await s.sql.execute("UPDATE usage_events SET quantity = 10")
        await s.sql.execute(
            "INSERT INTO usage_events SELECT subject, id || '-day', meter, 20, occurred_at, "
            "counted_at, period_start, $1 FROM usage_events",
            OLD + timedelta(hours=5),
        )
        assert (await s.audit(**options)).drifts == ()
        assert (await s.audit(**options, since_ms=from_datetime(OLD) + 1)).drifts == ()

    play(valkey, database, act)


def test_events_of_an_hour_that_was_lost(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 1, credits=100)
        await event(s, "a", "credits", 1)
        await s.sql.execute("DELETE FROM ledger_hours")
        await s.sql.execute("DELETE FROM ledger_periods")
        s.redis.flushall()
        drift = await s.only(Cause.EVENT_EXCESS, batch=1)
        assert (drift.expected, drift.found) == (0, 1)

    play(valkey, database, act)
