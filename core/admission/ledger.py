"""Reads what the ledger knows of subjects whose live state is missing or incomplete.

The aggregates are computed by Postgres: one row for each subject, meter and span, however many
hours there are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from core import clock
from core.admission.baseline import (
    Fired,
    HourTotal,
    Ledger,
    MeterSpan,
    PeriodTotal,
    Record,
    SpanTotal,
    hours_held,
    spans_needed,
)
from core.admission.program import CalendarUse
from core.db.pool import Database, Row, Transaction
from core.meters import MeterRegistry
from core.period import HOUR_MS
from core.policy import Limit, Meter, Plan


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a rebuilt state depends on; replaced whole when the configuration is reloaded."""

    meters: Mapping[str, Meter]
    calendars: CalendarUse
    plans: Mapping[str, Plan] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be rebuilt of a subject: its plan's limits, and what it has, {} when cold."""

    limits: tuple[Limit, ...]
    live: Mapping[str, str]


async def read_ledgers(
    database: Database,
    registry: MeterRegistry,
    catalogue: Catalogue,
    wanted: Mapping[str, Wanted],
    now_ms: int,
) -> dict[str, Ledger]:
    """What the ledger knows of each subject, at one point of time of the ledger.

    Raises:
        StoreUnavailableError: Postgres did not answer.
        ValueError: a row has more decimals than its meter keeps, or a meter that no process pinned.
    """
    async with database.transaction() as transaction:
        await transaction.execute("consistent_read")
        await transaction.execute("keep_hours")
        reading = _Reading(transaction, registry, wanted)
        await reading.records(now_ms)
        await reading.spans(catalogue, now_ms)
        await reading.held(catalogue)
        await reading.fired(now_ms)
    return reading.ledgers


class _Reading:
    def __init__(
        self, transaction: Transaction, registry: MeterRegistry, wanted: Mapping[str, Wanted]
    ) -> None:
        self._transaction = transaction
        self._registry = registry
        self._wanted = wanted
        self.ledgers = {subject: Ledger() for subject in wanted}

    async def _meters(self, rows: list[Row]) -> dict[str, Meter]:
        names = {row["meter"] for row in rows}
        unknown = await self._registry.unknown(self._transaction, names)
        if unknown:
            raise ValueError(f"the ledger has meters that were never pinned: {sorted(unknown)}")
        return {name: meter for name in names if (meter := self._registry.get(name)) is not None}

    async def records(self, now_ms: int) -> None:
        rows = await self._transaction.fetch("latest_records", list(self._wanted))
        meters = await self._meters(rows)
        for row in rows:
            meter = meters[row["meter"]]
            start = clock.from_datetime(row["period_start"])
            period = PeriodTotal(
                meter.name,
                start,
                clock.from_datetime(row["period_end"]),
                meter.to_units(row["total"]),
                meter.to_units(row["overage"]),
            )
            if row["hour_start"] is None:
                at = min(max(now_ms, period.start_ms), period.end_ms - 1)
                hour = HourTotal(meter.name, start, at - at % HOUR_MS, 0, 0)
            else:
                hour = HourTotal(
                    meter.name,
                    start,
                    clock.from_datetime(row["hour_start"]),
                    meter.to_units(row["hour_total"]),
                    meter.to_units(row["hour_overage"]),
                )
            counted = row["counted_at"] and clock.from_datetime(row["counted_at"])
            self.ledgers[row["subject"]].records[meter.name] = Record(period, hour, counted)

    async def spans(self, catalogue: Catalogue, now_ms: int) -> None:
        asked: list[tuple[str, MeterSpan]] = [
            (subject, span)
            for subject, ledger in self.ledgers.items()
            for span in spans_needed(
                ledger,
                self._wanted[subject].live,
                catalogue.meters,
                catalogue.calendars,
                self._wanted[subject].limits,
                now_ms,
            )
        ]
        if not asked:
            return
        times: dict[int, datetime] = {
            at: clock.to_datetime(at) for _, span in asked for at in span[1:]
        }
        rows = await self._transaction.fetch(
            "span_totals",
            [subject for subject, _ in asked],
            [span[0] for _, span in asked],
            [times[span[1]] for _, span in asked],
            [times[span[2]] for _, span in asked],
        )
        for row in rows:
            subject, span = asked[row["position"] - 1]
            to_units = catalogue.meters[span[0]].to_units
            last, last_at = 0, (0, 0)
            if row["last"] is not None:
                last = to_units(row["last"])
                last_at = (
                    clock.from_datetime(row["hour_start"]),
                    clock.from_datetime(row["period_start"]),
                )
            self.ledgers[subject].spans[span] = SpanTotal(
                to_units(row["total"]), to_units(row["highest"]), last, last_at
            )

    async def held(self, catalogue: Catalogue) -> None:
        """What the ledger has of hours that live states hold."""
        asked = {
            (subject, row.meter, row.period_start_ms, row.hour_start_ms): row
            for subject, wanted in self._wanted.items()
            for row in hours_held(wanted.live, catalogue.calendars)
        }
        if not asked:
            return
        rows = await self._transaction.fetch(
            "these_hours",
            [item[0] for item in asked],
            [item[1] for item in asked],
            [clock.to_datetime(item[2]) for item in asked],
            [clock.to_datetime(item[3]) for item in asked],
        )
        for row in rows:
            subject, name = row["subject"], row["meter"]
            start = clock.from_datetime(row["period_start"])
            hour = clock.from_datetime(row["hour_start"])
            if row["total"] is None:  # rolled up into a day, as the state has it
                total = asked[subject, name, start, hour].total
            else:
                total = catalogue.meters[name].to_units(row["total"])
            self.ledgers[subject].held.append(HourTotal(name, start, hour, total, 0))

    async def fired(self, now_ms: int) -> None:
        cold = [subject for subject, wanted in self._wanted.items() if not wanted.live]
        if not cold:
            return
        now = clock.to_datetime(now_ms)
        rows = await self._transaction.fetch("thresholds_fired", cold, now)
        meters = await self._meters(rows)
        for row in rows:
            self.ledgers[row["subject"]].fired.append(
                Fired(
                    row["limit_name"],
                    clock.from_datetime(row["period_start"]),
                    row["highest"],
                    meters[row["meter"]].to_units(row["limit_quantity"]),
                )
            )


__all__ = ["Catalogue", "Wanted", "read_ledgers"]
