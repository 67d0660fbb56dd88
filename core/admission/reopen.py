"""Reads closed hours and periods back from the ledger, for a correction that comes late.

Redis keeps a closed hour or period until it is in the ledger. A settlement that arrives after that
finds it missing; it is then given its ledger row again, an absolute total, corrects that, and the
next flush takes it back. Nothing is ever added up from two places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from core import clock, keyspace
from core.db.pool import Database
from core.meters import MeterRegistry
from core.period import HOUR_MS

Hour = tuple[str, int, int, int]
"""Meter, start and end of the billing period, start of the hour; epoch ms."""


@dataclass(slots=True)
class Lacking:
    """What a subject lacks: hours that are to be corrected, and reservations whose hours are."""

    hours: set[Hour] = field(default_factory=set)
    reservations: set[str] = field(default_factory=set)

    def merge(self, other: Lacking) -> None:
        self.hours |= other.hours
        self.reservations |= other.reservations


def reserved_hours(live: Mapping[str, str], names: Iterable[str]) -> set[Hour]:
    """The hours in which reservations of a state were counted; those it does not have give none.

    Their periods are in the state or the ledger, so their ends need not be known.
    """
    found: set[Hour] = set()
    for name in names:
        text = live.get(keyspace.RESERVED + name) or live.get(keyspace.EXPIRED + name)
        if text is None:
            continue
        words = text.split(" ")
        made = int(words[1])
        for at in range(2, len(words), 5):
            start, hour = int(words[at + 2]), int(words[at + 3])
            of_admission = max(made, hour)
            found.add((words[at], start, start + 1, of_admission - of_admission % HOUR_MS))
    return found


def missing(live: Mapping[str, str], hours: Iterable[Hour]) -> tuple[dict[str, str], set[Hour]]:
    """Fields that a state lacks for corrections of these hours, and hours to ask the ledger for.

    The fields are records of meters that start from zero.
    """
    fields: dict[str, str] = {}
    asked: set[Hour] = set()
    for meter, start, end, hour in sorted(hours, key=lambda h: h[3]):
        bounds = live.get(keyspace.BOUNDS + meter) or fields.get(keyspace.BOUNDS + meter)
        if bounds is None:
            fields[keyspace.BOUNDS + meter] = f"{start} {end} {hour}"
            fields[keyspace.METER + meter] = "0 0 0 0 0"
            continue
        live_start, _, live_hour = map(int, bounds.split(" "))
        if start > live_start or (start == live_start and hour >= live_hour):
            continue
        asked.add((meter, start, end, hour))
    return fields, asked


async def closed_fields(
    database: Database,
    registry: MeterRegistry,
    subject: str,
    live: Mapping[str, str],
    hours: set[Hour],
) -> dict[str, str]:
    """The `ch:` and `cp:` fields of these hours that the state does not have, from the ledger.

    Raises:
        StoreUnavailableError: Postgres did not answer.
        ValueError: an hour was rolled up into its day, months ago.
    """
    rows = sorted(hours)
    names = [row[0] for row in rows]
    starts = [clock.to_datetime(row[1]) for row in rows]
    subjects = [subject] * len(rows)
    stored_hours = {
        (
            r["meter"],
            clock.from_datetime(r["period_start"]),
            clock.from_datetime(r["hour_start"]),
        ): r
        for r in await database.fetch(
            "these_hours", subjects, names, starts, [clock.to_datetime(row[3]) for row in rows]
        )
    }
    stored_periods = {
        (r["meter"], clock.from_datetime(r["period_start"])): r
        for r in await database.fetch("these_periods", subjects, names, starts)
    }
    fields: dict[str, str] = {}
    for meter, start, end, hour in rows:
        kept = registry.get(meter)
        if kept is None:
            raise ValueError(f"no process declared the meter {meter}")
        found = stored_hours.get((meter, start, hour))
        numbers = "0 0"
        if found is not None and found["total"] is None:
            raise ValueError(f"the hour of a correction of {subject} has become part of a day")
        if found is not None:
            numbers = f"{kept.to_units(found['total'])} {kept.to_units(found['overage'])}"
        fields[f"{keyspace.CLOSED_HOUR}{meter}:{start}:{hour}"] = numbers
        bounds = live.get(keyspace.BOUNDS + meter, "")
        if bounds.split(" ")[0] == str(start):
            continue
        period = stored_periods.get((meter, start))
        text = f"{end} 0 0"
        if period is not None:
            text = (
                f"{clock.from_datetime(period['period_end'])} "
                f"{kept.to_units(period['total'])} {kept.to_units(period['overage'])}"
            )
        fields[f"{keyspace.CLOSED_PERIOD}{meter}:{start}"] = text
    return {name: text for name, text in fields.items() if name not in live}
