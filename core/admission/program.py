"""Compiles a plan and a route's costs into the program that `lua/admit.lua` runs.

A program is JSON, decoded once per batch however many checks use it:

    fields     fields of the state hash, in the order the script reads them
    meters     [name, cost, aggregation, position of its bounds; its totals follow]
    calendars  [field, meter index, calendar index, cost, aggregation, position]
    limits     GCRA         [1, field, enforce, cost, rate, period µs, burst, position]
               fixed        [2, field, enforce, cost, limit, window ms, position]
               sliding      [3, field, enforce, cost, limit, window ms, position]
               quota        [4, field, enforce, limit, counter, action, meter index, name, meter,
                             [[percent, units, kind], ...]]
               concurrency  [5, name, enforce, limit, lease ms]
    leases     number of concurrency limits
    reserve    0, or ms after which an admitted check that was not settled is taken back
    keep       there only with units: what stays charged of each meter's cost then, in their order
    event      there, and true, in the program of one usage event
    ttl        0 for a subject in the ledger; else ms after which an idle subject is forgotten

Positions and indexes count from 1, as Lua does. A quota's counter is a meter index when positive
(its billing period) and a calendar index when negative.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType

import orjson

from core import keyspace
from core.period import CALENDAR_KINDS, DAY_MS
from core.policy import (
    Action,
    Aggregation,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    PeriodKind,
    Plan,
    Quota,
    SlidingWindow,
)


class Verdict(IntEnum):
    """Status of one check, as lua/includes/status.lua numbers it."""

    ADMIT = 0
    REJECT = 1
    COLD = 2  # no state, or a calendar counter is missing: seed it and ask again
    STALE = 3  # outside the bounds given: work them out anew and ask again
    LATE = 4  # reached Redis after the caller's time-out
    BROKEN = 5  # a field of the state cannot be read
    UNVERIFIED = 6  # not compared with the ledger since this server started: seed it and ask again
    DUPLICATE = 7  # a usage event that was counted before


# Flags of one limit's answer, as lua/includes/status.lua numbers them.
REFUSED, OVERAGE, WARNED = 1, 2, 4

# A threshold of 101 stands for "above the limit": it can only fire where the action admits that.
EXCEEDED = 101
CRITICAL_FROM = 95

_AGGREGATION = {Aggregation.SUM: 1, Aggregation.MAX: 2, Aggregation.LAST: 3}
_ACTION = {Action.BLOCK: 0, Action.WARN: 1, Action.OVERAGE: 2}
_CALENDAR_DAYS = {
    PeriodKind.DAY: 1,
    PeriodKind.WEEK: 7,
    PeriodKind.MONTH: 31,
    PeriodKind.YEAR: 366,
}
# An idle keyless subject keeps its state at least this long, so that a burst limit survives.
_MIN_TTL_MS = 60_000
_MONTHS_A_YEAR = 12


@dataclass(frozen=True, slots=True)
class Program:
    """What a batch needs of a (plan, costs) pair. `limits` are those the costs touch, in order;
    `lease_limits` names the concurrency limits among them and `lease_ms` says how long their leases
    last; `plan_limits` are all of the plan's, with which a cold subject is rebuilt. `costs`
    are in smallest units; `single` is whether each check is one of its own, not grouped. `watch`
    are rows of the quotas that a corrected cost may pass, as lua/settle.lua reads them, and
    `watch_calendar` is whether one of them follows the calendar."""

    text: bytes
    limits: tuple[Limit, ...]
    lease_limits: tuple[str, ...]
    durable: bool
    answer_size: int
    plan_limits: tuple[Limit, ...]
    lease_ms: tuple[int, ...]
    costs: Mapping[str, int]
    reserve_ms: int = 0
    single: bool = False
    watch: str = ""
    watch_calendar: bool = False


CalendarUse = Mapping[str, tuple[PeriodKind, ...]]


def calendar_use(plans: Iterable[Plan]) -> CalendarUse:
    """Calendar periods per meter that any of the plans counts.

    Every subject keeps all of them, whatever its own plan counts, so that a plan change finds the
    counter of its new plan up to date.
    """
    found: dict[str, set[PeriodKind]] = {}
    for plan in plans:
        for limit in plan.limits:
            if isinstance(limit, Quota) and limit.period is not PeriodKind.BILLING:
                found.setdefault(limit.meter, set()).add(limit.period)
    return {
        meter: tuple(kind for kind in CALENDAR_KINDS if kind in kinds)
        for meter, kinds in found.items()
    }


def thresholds(quota: Quota) -> list[tuple[int, int, str]]:
    """(percent, units from which it fires, kind of event), ascending."""
    rows: list[tuple[int, int, str]] = []
    if quota.limit > 0:
        for percent in quota.thresholds:
            kind = "critical" if percent >= CRITICAL_FROM else "warning"
            rows.append((percent, -(-quota.limit * percent // 100), kind))
    rows.append((EXCEEDED, quota.limit + 1, "exceeded"))
    return rows


class _Builder:
    def __init__(self, meters: Mapping[str, Meter], costs: Mapping[str, int]) -> None:
        self.meters = meters
        self.costs = {name: cost for name, cost in costs.items() if cost > 0}
        self.fields = [keyspace.VERSION, keyspace.RUN]
        self.meter_rows: list[list[object]] = []
        self.meter_index: dict[str, int] = {}
        self.calendar_rows: list[list[object]] = []
        self.calendar_index: dict[tuple[str, PeriodKind], int] = {}

    def field(self, name: str) -> int:
        self.fields.append(name)
        return len(self.fields)

    def add_meter(self, name: str) -> None:
        aggregation = _AGGREGATION[self.meters[name].aggregation]
        position = self.field(keyspace.BOUNDS + name)
        self.field(keyspace.METER + name)  # the script reads it at position + 1
        self.meter_rows.append([name, self.costs[name], aggregation, position])
        self.meter_index[name] = len(self.meter_rows)

    def add_calendar(self, name: str, kind: PeriodKind) -> None:
        if (name, kind) in self.calendar_index:
            return
        field = f"{keyspace.CALENDAR}{name}:{kind}"
        self.calendar_rows.append(
            [
                field,
                self.meter_index.get(name, 0),
                CALENDAR_KINDS.index(kind) + 1,
                self.costs[name],
                _AGGREGATION[self.meters[name].aggregation],
                self.field(field),
            ]
        )
        self.calendar_index[name, kind] = len(self.calendar_rows)

    def limit(self, limit: Limit) -> list[object]:
        enforce = int(limit.enforce)
        if isinstance(limit, Concurrency):
            return [5, limit.name, enforce, limit.limit, limit.lease_ms]
        cost = self.costs[limit.meter]
        if isinstance(limit, Gcra):
            field = keyspace.RATE + limit.name
            return [
                1,
                field,
                enforce,
                cost,
                limit.rate,
                limit.period_us,
                limit.burst,
                self.field(field),
            ]
        if isinstance(limit, FixedWindow | SlidingWindow):
            fixed = isinstance(limit, FixedWindow)
            field = (keyspace.FIXED if fixed else keyspace.SLIDING) + limit.name
            kind = 2 if fixed else 3
            return [kind, field, enforce, cost, limit.limit, limit.window_ms, self.field(field)]
        if limit.period is PeriodKind.BILLING:
            counter = self.meter_index[limit.meter]
        else:
            counter = -self.calendar_index[limit.meter, limit.period]
        return [
            4,
            keyspace.FIRED + limit.name,
            enforce,
            limit.limit,
            counter,
            _ACTION[limit.action],
            self.meter_index.get(limit.meter, 0),
            limit.name,
            limit.meter,
            thresholds(limit),
        ]


def _ttl_ms(limits: Iterable[Limit]) -> int:
    longest = _MIN_TTL_MS
    for limit in limits:
        if isinstance(limit, Gcra):
            longest = max(longest, -(-limit.burst * limit.period_us // (limit.rate * 1000)))
        elif isinstance(limit, FixedWindow | SlidingWindow):
            longest = max(longest, 2 * limit.window_ms)
        elif isinstance(limit, Quota):
            longest = max(longest, _CALENDAR_DAYS[limit.period] * DAY_MS)
        else:
            longest = max(longest, limit.lease_ms + _MIN_TTL_MS)
    return longest


def rest_ms(limits: Iterable[Limit]) -> int:
    """Ms after which rate limits and leases are as if nothing had been counted in them.

    Quotas are left out: theirs is what the ledger knows.
    """
    return _ttl_ms(limit for limit in limits if not isinstance(limit, Quota))


def _without_anchor(limit: Limit, plan: Plan) -> Limit:
    """A client address has no billing anchor: its billing quotas follow the calendar."""
    if isinstance(limit, Quota) and limit.period is PeriodKind.BILLING:
        year = plan.interval_months == _MONTHS_A_YEAR
        return replace(limit, period=PeriodKind.YEAR if year else PeriodKind.MONTH)
    return limit


def compile_program(
    plan: Plan,
    costs: Mapping[str, int],
    meters: Mapping[str, Meter],
    calendars: CalendarUse,
    *,
    durable: bool = True,
    reserve_ms: int = 0,
    event: bool = False,
    keep: Mapping[str, int] | None = None,
    corrected: Collection[str] = (),
    slots: bool = True,
) -> Program:
    """The program of a plan for one set of costs (meter name to units; 0 leaves a meter out).

    `calendars` comes from `calendar_use` over all plans in force. `durable=False` is for keyless
    subjects: no ledger, no meters, forgotten when idle; their billing quotas follow the calendar
    month or year. With `reserve_ms` an admitted check is a reservation, to be settled within that
    time; of one that is not, the units in `keep` stay charged. The cost of the `corrected` meters
    is an estimate, settled by what it really was. `event` is for usage that is reported, not
    proxied: quotas alone apply to it. Without `slots` concurrency limits are left out: for what
    happens within a request that holds its own.

    Raises:
        KeyError: a cost names a meter that is not in `meters`.
    """
    builder = _Builder(meters, costs)
    plan_limits = plan.limits if durable else tuple(_without_anchor(x, plan) for x in plan.limits)
    limits = tuple(
        limit
        for limit in plan_limits
        if (slots if isinstance(limit, Concurrency) else limit.meter in builder.costs)
        and (not event or isinstance(limit, Quota))
    )
    if durable:
        for name in builder.costs:
            builder.add_meter(name)
        for name, kinds in calendars.items():
            if name in builder.costs:
                for kind in kinds:
                    builder.add_calendar(name, kind)
    else:
        for limit in limits:
            if isinstance(limit, Quota):
                builder.add_calendar(limit.meter, limit.period)
    rows = [builder.limit(limit) for limit in limits]
    leases = tuple(limit.name for limit in limits if isinstance(limit, Concurrency))
    text = orjson.dumps(
        {
            "fields": builder.fields,
            "meters": builder.meter_rows,
            "calendars": builder.calendar_rows,
            "limits": rows,
            "leases": len(leases),
            "reserve": reserve_ms,
            **({"event": True} if event else {}),
            **({"keep": [keep.get(name, 0) for name in builder.costs]} if keep else {}),
            # of the whole plan: a route that costs one meter must not forget the others' counts
            "ttl": 0 if durable else _ttl_ms(plan_limits),
        }
    )
    lease_ms = tuple(limit.lease_ms for limit in limits if isinstance(limit, Concurrency))
    watch, watch_calendar = _watched(limits, rows, corrected)
    return Program(
        text,
        limits,
        leases,
        durable,
        1 + 3 * len(limits),
        plan_limits,
        lease_ms,
        MappingProxyType(builder.costs),
        reserve_ms,
        bool(leases or reserve_ms or event),
        watch,
        watch_calendar,
    )


def _watched(
    limits: Sequence[Limit], rows: Sequence[list[object]], corrected: Collection[str]
) -> tuple[str, bool]:
    """`watch` and `watch_calendar` of a program; a shadow quota tells nobody."""
    watched: list[list[object]] = []
    calendar = False
    for limit, row in zip(limits, rows, strict=True):
        if isinstance(limit, Quota) and limit.enforce and limit.meter in corrected:
            billing = limit.period is PeriodKind.BILLING
            kind = 0 if billing else CALENDAR_KINDS.index(limit.period) + 1
            watched.append([*row[:4], kind, *row[5:]])
            calendar = calendar or not billing
    return (orjson.dumps(watched).decode() if watched else ""), calendar
