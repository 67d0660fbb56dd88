"""Does the ledger agree with itself? Periods with their hours, hours with their usage events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from core import clock
from core.admission.baseline import live_hours
from core.audit.report import Cause, Drift
from core.config import Snapshot
from core.config.units import format_quantity
from core.db import Database, Row
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.redis import survey
from core.redis.store import Store

# How often a difference between events and hours is looked at before it is believed.
_LOOKS = 3

EventsWaiting = Callable[[], Awaitable[bool]]
"""Whether usage events wait in Redis that are not in Postgres yet."""


@dataclass(frozen=True, slots=True)
class MeterUse:
    """What the configuration says of how meters are counted, and so of their usage events.

    Attributes:
        events_only: no route charges them: an hour is the sum of its events.
        refunded: an answer may give a charge back, in a later hour: an hour may be less than its
            events.
    """

    events_only: tuple[str, ...] = ()
    refunded: tuple[str, ...] = ()

    @classmethod
    def of(cls, snapshot: Snapshot) -> MeterUse:
        """As the configuration is now: what an earlier one did is not known."""
        charged: set[str] = set()
        refunded: set[str] = set()
        for route in snapshot.routes:
            names = {name for name, cost in route.costs.items() if cost > 0}
            charged |= names
            refunded |= names if route.reserve else {rule.meter for rule in route.actual}
        return cls(
            tuple(name for name in snapshot.meters if name not in charged),
            tuple(sorted(refunded)),
        )


async def batches(database: Database, size: int) -> AsyncIterator[list[str]]:
    """All subjects that have rows anywhere in the ledger, in order, so many at a time.

    Raises:
        StoreUnavailableError: Postgres did not answer.
    """
    last = ""
    while True:
        rows = await database.fetch("audit_subjects", last, size)
        if rows:
            last = rows[-1]["subject"]
            yield [row["subject"] for row in rows]
        if len(rows) < size:
            return


class LedgerAudit:
    """Checks subjects of the ledger in batches, each in one snapshot of the database."""

    def __init__(
        self,
        database: Database,
        store: Store,
        keyspace: Keyspace,
        registry: MeterRegistry,
        *,
        since_ms: int,
        use: MeterUse,
        events_waiting: EventsWaiting | None,
    ) -> None:
        self._database = database
        self._store = store
        self._keyspace = keyspace
        self._registry = registry
        self._since = clock.to_datetime(since_ms)
        self._use = use
        self._events_waiting = events_waiting

    async def check(self, subjects: Sequence[str]) -> list[Drift]:
        """The differences of these subjects.

        Raises:
            StoreUnavailableError: a store did not answer.
        """
        async with self._database.transaction() as transaction:
            await transaction.execute("consistent_read")
            periods = await transaction.fetch("audit_periods", list(subjects), self._since)
        found = [drift for row in periods for drift in _period(row)]
        return found + await self._events(subjects)

    async def _events(self, subjects: Sequence[str]) -> list[Drift]:
        """Usage events reach Postgres on another way than totals, so each may be ahead of the
        other: totals that are not flushed yet are read from Redis, and only what is found at each
        look counts.
        """
        suspects, found = list(subjects), dict[tuple[object, ...], Drift]()
        for look in range(_LOOKS):
            rows = await self._database.fetch(
                "audit_events",
                suspects,
                self._since,
                list(self._use.events_only),
                list(self._use.refunded),
            )
            seen = {(d.subject, d.meter, d.hour_start_ms, d.period_start_ms, d.cause): d
                    for d in await self._unexplained(rows)}  # fmt: skip
            found = {key: d for key, d in seen.items() if look == 0 or key in found}
            if not found:
                return []
            suspects = sorted({drift.subject for drift in found.values()})
        return list(found.values())

    async def _unexplained(self, rows: Sequence[Row]) -> list[Drift]:
        if not rows:
            return []
        waiting = self._events_waiting is not None and await self._events_waiting()
        subjects = sorted({row["subject"] for row in rows})
        states = await survey.states(self._store, [self._keyspace.state(s) for s in subjects])
        live: dict[tuple[str, str, int, int], Decimal] = {}
        for subject, state in zip(subjects, states, strict=True):
            try:
                hours = live_hours(state or {})
            except (ValueError, KeyError):
                continue  # told as state_unreadable
            for hour in hours:
                meter = self._registry.get(hour.meter)
                if meter is not None:
                    key = (subject, hour.meter, hour.period_start_ms, hour.hour_start_ms)
                    live[key] = meter.from_units(hour.total)
        return [drift for row in rows for drift in _hour(row, live, waiting)]


def _ms(value: datetime) -> int:
    return clock.from_datetime(value)


def _when(value: datetime) -> str:
    return clock.isoformat(_ms(value))


def _more(first: Decimal, second: Decimal) -> str:
    """`first` compared with `second`: `3 more` or `3 less`."""
    difference = first - second
    return f"{format_quantity(abs(difference))} {'more' if difference > 0 else 'less'}"


def _period(row: Row) -> Iterator[Drift]:
    subject, meter, start = row["subject"], row["meter"], _ms(row["period_start"])
    place = f"{subject}: {meter} of the period from {_when(row['period_start'])}"

    def drift(cause: Cause, text: str, expected: object = None, found: object = None) -> Drift:
        return Drift(
            cause, subject, text, meter, start, None,
            expected if isinstance(expected, Decimal) else None,
            found if isinstance(found, Decimal) else None,
        )  # fmt: skip

    if row["orphan"]:
        yield drift(
            Cause.ORPHAN,
            f"{place} has hours that come to {format_quantity(row['hours'])} and no period: its "
            "row was deleted, so it is neither sealed nor billed; the next count of it brings "
            "it back if it is the current one",
            Decimal(0), row["hours"],
        )  # fmt: skip
        return
    if row["unknown"]:
        yield drift(
            Cause.ORPHAN,
            f"{place} belongs to a subject that the ledger does not list: its row in "
            "ledger_subjects was deleted, so a state of any age would be taken for the newest",
        )
    total, hours = row["total"], row["hours"]
    sealed = ", and it is sealed" if row["sealed_at"] else ""
    how = {"max": "have at most", "last": "end with"}.get(row["aggregation"], "add up to")
    if total != hours:
        yield drift(
            Cause.PERIOD_SUM,
            f"{place} says {format_quantity(total)} and its hours {how} {format_quantity(hours)} "
            f"({_more(total, hours)}){sealed}: a row was changed, deleted or written twice "
            "outside a flush",
            hours, total,
        )  # fmt: skip
    if row["overage"] != row["hours_overage"]:
        yield drift(
            Cause.HOUR_OVERAGE_SUM,
            f"{place} says {format_quantity(row['overage'])} of overage and its hours add up to "
            f"{format_quantity(row['hours_overage'])} "
            f"({_more(row['overage'], row['hours_overage'])}){sealed}: a row was changed, deleted "
            "or written twice outside a flush",
            row["hours_overage"], row["overage"],
        )  # fmt: skip
    if row["sealed_at"] is not None and row["sealed_at"] < row["updated_at"]:
        yield drift(
            Cause.SEALED_CHANGED,
            f"{place} was sealed at {_when(row['sealed_at'])} and written at "
            f"{_when(row['updated_at'])} without losing its seal: what was billed may not be the "
            f"{format_quantity(total)} it says now",
            None, total,
        )  # fmt: skip
    if total < 0:
        yield drift(
            Cause.NEGATIVE_TOTAL,
            f"{place} is {format_quantity(total)}: refunds of what an earlier period charged "
            "exceed what this one has charged",
            None, total,
        )  # fmt: skip
    if row["seals"] > 1:
        yield drift(
            Cause.RESEALED,
            f"{place} was sealed {row['seals']} times: counts came after the first seal, and "
            f"{format_quantity(total)} is what it came to",
            None, total,
        )  # fmt: skip


def _hour(
    row: Row, live: dict[tuple[str, str, int, int], Decimal], waiting: bool
) -> Iterator[Drift]:
    subject, meter, slot = row["subject"], row["meter"], _ms(row["slot"])
    start, quantity = _ms(row["period_start"]), row["quantity"]
    total = row["total"]
    if not row["day"]:  # a total that is behind the ledger's is told as redis_behind
        total = max(total, live.get((subject, meter, start, slot), total))
    unit = "day" if row["day"] else "hour"
    events = f"{row['events']} usage event{'' if row['events'] == 1 else 's'}"
    place = f"{subject}: {meter} of the {unit} from {_when(row['slot'])}"
    if quantity > total:
        yield Drift(
            Cause.EVENT_EXCESS, subject,
            f"{place} is {format_quantity(total)} and its {events} come to "
            f"{format_quantity(quantity)} ({_more(quantity, total)}): counts of events were lost "
            "from Redis before they were flushed, or the total was changed outside a flush",
            meter, start, slot, total, quantity,
        )  # fmt: skip
    elif quantity < total and not waiting:
        yield Drift(
            Cause.EVENT_MISSING, subject,
            f"{place} is {format_quantity(total)} and its {events} come to "
            f"{format_quantity(quantity)} ({_more(quantity, total)}), while no route charges "
            "this meter: events are missing, unless a route of an earlier configuration did",
            meter, start, slot, total, quantity,
        )  # fmt: skip
