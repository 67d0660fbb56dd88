"""Meters and quotas once more, as a log of what was admitted: every counter is a fold over it.

No state is carried from one check to the next but the log itself and which thresholds have fired,
so that a mistake in the rolling over of a counter cannot be made twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from core.admission.program import OVERAGE, REFUSED, WARNED
from core.period import CALENDAR_KINDS, HOUR_MS, Span, calendar_period
from core.policy import Action, Aggregation, Meter, PeriodKind, Quota

Event = tuple[str, str, str, int, int, int, int, int, int]
"""limit, meter, kind, threshold (101: above the limit), used, max, start, end, at"""


@dataclass(frozen=True)
class Entry:
    """One admitted cost: what it counts in, and what of it is overage."""

    meter: str
    cost: int
    excess: int  # of a sum
    cap: int | None  # of max and last: above it the value is overage; None leaves it as it was
    period: Span
    hour: int
    calendar: Mapping[PeriodKind, int]

    def start(self, kind: PeriodKind) -> int:
        return self.period[0] if kind is PeriodKind.BILLING else self.calendar[kind]


@dataclass
class Check:
    """What the script has to answer: of each limit flags, what is left, ms until the reset."""

    admitted: bool
    answers: list[tuple[int, int, int]]


def fold(aggregation: Aggregation, entries: Iterable[Entry]) -> int:
    costs = [entry.cost for entry in entries]
    if aggregation is Aggregation.SUM:
        return sum(costs)
    if aggregation is Aggregation.MAX:
        return max(costs, default=0)
    return costs[-1] if costs else 0


def overage(aggregation: Aggregation, entries: Sequence[Entry]) -> int:
    if aggregation is Aggregation.SUM:
        return sum(entry.excess for entry in entries)
    capped = [at for at, entry in enumerate(entries) if entry.cap is not None]
    if not capped:
        return 0
    cap = entries[capped[-1]].cap
    assert cap is not None
    return max(0, fold(aggregation, entries[: capped[-1] + 1]) - cap)


def thresholds(quota: Quota) -> list[tuple[int, str, int]]:
    """(percent, kind, the smallest usage that reaches it), ascending."""
    found = []
    for percent in quota.thresholds if quota.limit else ():
        enough = next(u for u in range(quota.limit + 1) if u * 100 >= quota.limit * percent)
        found.append((percent, "warning" if percent < 95 else "critical", enough))
    return [*found, (101, "exceeded", quota.limit + 1)]


@dataclass
class Metering:
    """One subject. `log` may be cut: a wiped Redis forgets what the ledger does not hold."""

    meters: Mapping[str, Meter]
    log: list[Entry] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    # limit -> period start, highest threshold, the limit that it fired for
    fired: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def check(
        self, quotas: Sequence[Quota], costs: Mapping[str, int], now: int, span: Span
    ) -> Check:
        costs = {meter: cost for meter, cost in costs.items() if cost}
        quotas = [quota for quota in quotas if quota.meter in costs]
        entries = {meter: self._entry(meter, cost, now, span) for meter, cost in costs.items()}
        before = [self._used(quota, entries[quota.meter]) for quota in quotas]
        after = [self._used(quota, entries[quota.meter], entries[quota.meter]) for quota in quotas]
        flags = []
        for quota, used in zip(quotas, after, strict=True):
            flag = {Action.BLOCK: REFUSED, Action.OVERAGE: OVERAGE, Action.WARN: WARNED}
            flags.append(flag[quota.action] if used > quota.limit else 0)
        resets = [self._end(quota, entries[quota.meter], now) - now for quota in quotas]
        if any(q.enforce and flag == REFUSED for q, flag in zip(quotas, flags, strict=True)):
            return Check(
                False,
                [
                    (flag & REFUSED, quota.limit - used, reset)
                    for quota, flag, used, reset in zip(quotas, flags, before, resets, strict=True)
                ],
            )
        for quota, used, total in zip(quotas, before, after, strict=True):
            if quota.enforce:
                self._emit(quota, entries[quota.meter], used, total, now)
        for meter, entry in entries.items():
            billed = [
                (quota.limit, used)
                for quota, used in zip(quotas, after, strict=True)
                if quota.meter == meter and quota.enforce and quota.action is Action.OVERAGE
            ]
            beyond = [min(entry.cost, used - limit) for limit, used in billed if used > limit]
            excess = max(beyond, default=0)
            cap = min((limit for limit, _ in billed), default=None)
            self.log.append(
                Entry(meter, entry.cost, excess, cap, entry.period, entry.hour, entry.calendar)
            )
        return Check(
            True,
            [
                (flag, quota.limit - used, reset)
                for quota, flag, used, reset in zip(quotas, flags, after, resets, strict=True)
            ],
        )

    def of(self, meter: str) -> list[Entry]:
        return [entry for entry in self.log if entry.meter == meter]

    def periods(self) -> dict[tuple[str, int], tuple[int, int, int]]:
        """(meter, start) -> end, total, overage."""
        found = {}
        for meter, definition in self.meters.items():
            rows = self.of(meter)
            for period in {entry.period for entry in rows}:
                inside = [entry for entry in rows if entry.period == period]
                total = fold(definition.aggregation, inside)
                found[meter, period[0]] = period[1], total, overage(definition.aggregation, inside)
        return found

    def hours(self) -> dict[tuple[str, int, int], tuple[int, int]]:
        """(meter, period start, hour) -> total, overage."""
        found = {}
        for meter, definition in self.meters.items():
            rows = self.of(meter)
            for start, hour in {(entry.period[0], entry.hour) for entry in rows}:
                inside = [e for e in rows if (e.period[0], e.hour) == (start, hour)]
                found[meter, start, hour] = (
                    fold(definition.aggregation, inside),
                    overage(definition.aggregation, inside),
                )
        return found

    def _entry(self, meter: str, cost: int, now: int, span: Span) -> Entry:
        """Where a cost counts now. Nothing ever goes back to an earlier period, hour or day."""
        rows = self.of(meter)
        calendar = {kind: calendar_period(kind, now)[0] for kind in CALENDAR_KINDS}
        hour = now - now % HOUR_MS
        if not rows:
            return Entry(meter, cost, 0, None, span, hour, calendar)
        last = rows[-1]
        calendar = {kind: max(start, last.calendar[kind]) for kind, start in calendar.items()}
        start, end = last.period
        if start < span[0]:  # a later period than the last, however long that was meant to be
            period = span
        elif end <= now:  # the next, though the new anchor would have it begin earlier
            period = (end, span[1])
        else:
            period, hour = last.period, max(hour, last.hour)
        return Entry(meter, cost, 0, None, period, hour, calendar)

    def _used(self, quota: Quota, at: Entry, *more: Entry) -> int:
        start = at.start(quota.period)
        rows = [entry for entry in self.of(quota.meter) if entry.start(quota.period) == start]
        return fold(self.meters[quota.meter].aggregation, [*rows, *more])

    def _end(self, quota: Quota, at: Entry, now: int) -> int:
        billing = quota.period is PeriodKind.BILLING
        return at.period[1] if billing else calendar_period(quota.period, now)[1]

    def _emit(self, quota: Quota, at: Entry, before: int, after: int, now: int) -> None:
        start, end = at.start(quota.period), self._end(quota, at, now)

        def event(kind: str, percent: int, used: int) -> None:
            row = quota.name, quota.meter, kind, percent, used, quota.limit, start, end, now
            self.events.append(row)

        rows = self.of(quota.meter)
        if rows and rows[-1].start(quota.period) != start and (old := self._used(quota, rows[-1])):
            event("reset", 0, old)
        period, fired, limit = self.fired.get(quota.name, (start, 0, quota.limit))
        if period != start:
            fired = 0
        elif limit != quota.limit:  # under a new number what had been used already is no news
            fired = max((p for p, _, enough in thresholds(quota) if before >= enough), default=0)
        for percent, kind, enough in thresholds(quota):
            if percent > fired and after >= enough:
                event(kind, percent, after)
                self.fired[quota.name] = start, percent, quota.limit
