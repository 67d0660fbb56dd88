"""The algorithms again, in plain Python on exact integers: what the Lua scripts must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

from core.period import HOUR_MS, calendar_period
from core.policy import (
    Action,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    PeriodKind,
    Quota,
    SlidingWindow,
)


@dataclass
class State:
    """Live state of one subject. Meters sum up (aggregation sum)."""

    backlog: dict[str, tuple[int, Fraction]] = field(default_factory=dict)  # µs, units
    period_us: dict[str, int] = field(default_factory=dict)  # limit -> grain of its backlog
    windows: dict[str, dict[int, int]] = field(default_factory=dict)  # limit -> start -> count
    spent: list[tuple[int, int, str, int]] = field(default_factory=list)  # ms, period, meter, cost
    leases: dict[str, list[int]] = field(default_factory=dict)  # limit -> expiries in ms
    fired: set[tuple[str, int, int]] = field(default_factory=set)  # limit, period, percent


class Model:
    def __init__(self) -> None:
        self.state = State()

    def used(self, quota: Quota, now_ms: int, span: tuple[int, int]) -> tuple[int, int]:
        """Units spent in the quota's current period, and where that period starts."""
        start, end = (
            span if quota.period is PeriodKind.BILLING else calendar_period(quota.period, now_ms)
        )
        total = sum(
            cost
            for at, _, meter, cost in self.state.spent
            if meter == quota.meter and start <= at < end
        )
        return total, start

    def left(self, limit: Limit, cost: int, now_us: int, span: tuple[int, int]) -> Fraction:
        """Units left before the check; a limit refuses when the cost is more than that."""
        now_ms = now_us // 1000
        if isinstance(limit, Gcra):
            last, backlog = self.state.backlog.get(limit.name, (now_us, Fraction(0)))
            if self.state.period_us.get(limit.name, limit.period_us) != limit.period_us:
                # a changed limit keeps its backlog in units, rounded up to the new grain
                backlog = Fraction(ceil(backlog * limit.period_us), limit.period_us)
            drained = Fraction((now_us - last) * limit.rate, limit.period_us)
            return limit.burst - max(Fraction(0), backlog - drained)
        if isinstance(limit, FixedWindow):
            start = now_ms - now_ms % limit.window_ms
            return Fraction(limit.limit - self.state.windows.get(limit.name, {}).get(start, 0))
        if isinstance(limit, SlidingWindow):
            start = now_ms - now_ms % limit.window_ms
            counts = self.state.windows.get(limit.name, {})
            share = Fraction(limit.window_ms - (now_ms - start), limit.window_ms)
            before = counts.get(start - limit.window_ms, 0)
            return limit.limit - counts.get(start, 0) - before * share
        if isinstance(limit, Quota):
            return Fraction(limit.limit - self.used(limit, now_ms, span)[0])
        held = [end for end in self.state.leases.get(limit.name, []) if end > now_ms]
        return Fraction(limit.limit - len(held))

    def check(
        self, limits: list[Limit], costs: dict[str, int], now_us: int, span: tuple[int, int]
    ) -> tuple[bool, list[bool], list[int]]:
        """Admits or refuses, and changes the state accordingly.

        Returns whether it was admitted, for each limit whether it would refuse, and for each limit
        the units left afterwards.
        """
        now_ms = now_us // 1000
        full: list[bool] = []
        before: list[Fraction] = []
        for limit in limits:
            cost = 1 if isinstance(limit, Concurrency) else costs[limit.meter]
            left = self.left(limit, cost, now_us, span)
            before.append(left)
            blocks = not isinstance(limit, Quota) or limit.action is Action.BLOCK
            full.append(blocks and cost > left)
        admitted = not any(
            refuses and limit.enforce for refuses, limit in zip(full, limits, strict=True)
        )
        if not admitted:
            clamped = [
                floor(left) if isinstance(limit, Quota) else max(0, floor(left))
                for left, limit in zip(before, limits, strict=True)
            ]
            return False, full, clamped
        for limit, refuses, left in zip(limits, full, before, strict=True):
            if refuses:  # a shadow limit does not count what it would have refused
                if isinstance(limit, Gcra):  # but what drained until now drained at today's rate
                    self.state.backlog[limit.name] = (now_us, limit.burst - left)
                    self.state.period_us[limit.name] = limit.period_us
                continue
            if isinstance(limit, Gcra):
                used = limit.burst - left + costs[limit.meter]
                self.state.backlog[limit.name] = (now_us, used)
                self.state.period_us[limit.name] = limit.period_us
            elif isinstance(limit, FixedWindow | SlidingWindow):
                start = now_ms - now_ms % limit.window_ms
                counts = self.state.windows.setdefault(limit.name, {})
                counts[start] = counts.get(start, 0) + costs[limit.meter]
            elif isinstance(limit, Concurrency):
                self.state.leases.setdefault(limit.name, []).append(now_ms + limit.lease_ms)
        for meter, cost in costs.items():
            self.state.spent.append((now_ms, span[0], meter, cost))
        left_after = []
        for limit, refuses, left in zip(limits, full, before, strict=True):
            if isinstance(limit, Quota):
                left_after.append(limit.limit - self.used(limit, now_ms, span)[0])
            elif refuses:
                left_after.append(max(0, floor(left)))
            else:
                cost = 1 if isinstance(limit, Concurrency) else costs[limit.meter]
                left_after.append(max(0, floor(left - cost)))
        return True, full, left_after

    def totals(self, meter: str) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
        """Ledger of a meter: total per period start, and per (period start, hour)."""
        periods: dict[int, int] = {}
        hours: dict[tuple[int, int], int] = {}
        for at, period, name, cost in self.state.spent:
            if name == meter:
                periods[period] = periods.get(period, 0) + cost
                hour = period, at - at % HOUR_MS
                hours[hour] = hours.get(hour, 0) + cost
        return periods, hours
