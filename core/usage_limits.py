"""What is used of each limit, read from a subject's state as lua/admit.lua would read it now.

The same arithmetic as lua/includes/rate.lua, on exact integers. Pure functions: the I/O is
`core.usage`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from enum import StrEnum

from core import keyspace
from core.admission.baseline import PeriodTotal
from core.period import HOUR_MS, Span, calendar_period
from core.policy import (
    Action,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    PeriodKind,
    Quota,
    SlidingWindow,
)

WARNING_PERCENT, CRITICAL_PERCENT = 80, 95


class LimitStatus(StrEnum):
    """How much of a limit is used: warning from 80 %, critical from 95 %, exceeded above 100 %."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"
    EXCEEDED = "exceeded"


@dataclass(frozen=True, slots=True)
class LimitUsage:
    """One limit of the plan.

    Attributes:
        algorithm: gcra, fixed_window, sliding_window, quota, concurrency.
        meter: None for concurrency, whose unit is `request`.
        used: rounded up to whole smallest units where an algorithm keeps fractions of one.
        remaining: never below zero.
        percentage: of `used` in `limit`, with one decimal, rounded half up.
        start_ms: of the period or window; None for rates and concurrency.
        reset_ms: when the period or window ends, or a rate's burst is whole again; None when
            nothing is used of a rate, and for concurrency.
        known: False where the live state alone could tell and Redis did not answer.
    """

    name: str
    algorithm: str
    meter: str | None
    unit: str
    limit: Decimal
    used: Decimal
    remaining: Decimal
    percentage: str
    status: LimitStatus
    action: Action
    enforce: bool
    start_ms: int | None
    reset_ms: int | None
    known: bool = True


def current_record(state: Mapping[str, str], meter: str, now_ms: int) -> PeriodTotal | None:
    """The meter's record if its billing period holds the present."""
    bounds = state.get(keyspace.BOUNDS + meter)
    if bounds is None:
        return None
    start, end, _ = map(int, bounds.split(" "))
    total, overage, *_ = map(int, state[keyspace.METER + meter].split(" "))
    return PeriodTotal(meter, start, end, total, overage) if now_ms < end else None


def limit_usage(
    limit: Limit,
    state: Mapping[str, str],
    held: int,
    meters: Mapping[str, Meter],
    period: Span,
    now_ms: int,
    *,
    live: bool,
) -> LimitUsage:
    """The limit at `now_ms`.

    `state` is the hash, `held` the leases of a concurrency limit, `period` the billing period where
    the state has none, `live` whether Redis answered.
    """
    start: int | None = None
    reset: int | None = None
    known = live
    if isinstance(limit, Concurrency):
        used, algorithm = held, "concurrency"
        remaining, maximum = limit.limit - used, limit.limit
    elif isinstance(limit, Gcra):
        algorithm, maximum = "gcra", limit.burst
        backlog = _backlog(limit, state.get(keyspace.RATE + limit.name), now_ms)
        used = -(-backlog // limit.period_us)
        remaining = limit.burst - used
        if backlog:
            reset = now_ms + -(-backlog // (limit.rate * 1000))
    elif isinstance(limit, Quota):
        algorithm, maximum, known = "quota", limit.limit, True
        used, (start, reset) = _quota(limit, state, now_ms, period)
        remaining = limit.limit - used
    else:
        algorithm = "fixed_window" if isinstance(limit, FixedWindow) else "sliding_window"
        maximum, known = limit.limit, live or limit.window_ms % HOUR_MS == 0
        used, start = _window(limit, state, now_ms)
        reset = start + limit.window_ms
        remaining = limit.limit - used
    meter = Meter("") if isinstance(limit, Concurrency) else meters[limit.meter]
    return LimitUsage(
        limit.name,
        algorithm,
        meter.name or None,
        meter.unit,
        meter.from_units(maximum),
        meter.from_units(used),
        meter.from_units(max(0, remaining)),
        percentage(used, maximum),
        status_of(used, maximum),
        limit.action if isinstance(limit, Quota) else Action.BLOCK,
        limit.enforce,
        start,
        reset,
        known,
    )


def _backlog(limit: Gcra, text: str | None, now_ms: int) -> int:
    """What has not drained yet, in 1/period of a unit: see lua/includes/rate.lua."""
    if text is None:
        return 0
    last_us, backlog, unit = map(int, text.split(" "))
    if unit != limit.period_us:
        backlog = -(-backlog * limit.period_us // unit)
    return max(0, backlog - max(0, now_ms * 1000 - last_us) * limit.rate)


def _window(
    limit: FixedWindow | SlidingWindow, state: Mapping[str, str], now_ms: int
) -> tuple[int, int]:
    """Units used (of a sliding window rounded up) and the start of the window."""
    window = limit.window_ms
    start = now_ms - now_ms % window
    count = before = 0
    if isinstance(limit, FixedWindow):
        if (text := state.get(keyspace.FIXED + limit.name)) is not None:
            stored, held = map(int, text.split(" "))
            if stored >= start:
                start, count = stored - stored % window, held
        return count, start
    if (text := state.get(keyspace.SLIDING + limit.name)) is not None:
        stored, held, earlier = map(int, text.split(" "))
        if stored >= start:
            start, count, before = stored - stored % window, held, earlier
        elif stored + window >= start:
            before = held
    weighted = before * (window - max(0, now_ms - start)) + count * window
    return -(-weighted // window), start


def _quota(limit: Quota, state: Mapping[str, str], now_ms: int, period: Span) -> tuple[int, Span]:
    if limit.period is PeriodKind.BILLING:
        row = current_record(state, limit.meter, now_ms)
        return (row.total, (row.start_ms, row.end_ms)) if row else (0, period)
    span = calendar_period(limit.period, now_ms)
    text = state.get(f"{keyspace.CALENDAR}{limit.meter}:{limit.period}")
    if text is None:
        return 0, span
    start, total, _ = map(int, text.split(" "))
    return (total if start >= span[0] else 0), span


def percentage(used: int, limit: int) -> str:
    """`used` in percent of `limit`, with one decimal; of nothing allowed all is used at once."""
    if limit <= 0:
        return "0.0" if used <= 0 else "100.0"
    share = Decimal(used * 100) / Decimal(limit)
    return str(share.quantize(Decimal("0.1"), ROUND_HALF_UP))


def status_of(used: int, limit: int) -> LimitStatus:
    """Compared in integers, so that 94.99 % is not critical whatever the percentage is shown as."""
    if used > limit:
        return LimitStatus.EXCEEDED
    if limit > 0 and used * 100 >= limit * CRITICAL_PERCENT:
        return LimitStatus.CRITICAL
    if limit > 0 and used * 100 >= limit * WARNING_PERCENT:
        return LimitStatus.WARNING
    return LimitStatus.OK
