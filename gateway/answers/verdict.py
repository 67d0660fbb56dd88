"""What the limiter reports about one limit of one request, in the terms of the answer's headers.

Quantities here are whole units of the meter, as a customer reads them: `Policy.divisor` turns the
smallest units that are counted into them, rounding down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from core.policy import Concurrency, Gcra, Limit, Meter, PeriodKind, Quota

Kind = Literal["rate", "window", "quota", "concurrency"]

REQUESTS_UNIT = "requests"
CONCURRENT_UNIT = "concurrent-requests"

# Months, years and billing periods differ in length, so they carry no `w`.
_PERIOD_S = {PeriodKind.DAY: 86_400, PeriodKind.WEEK: 7 * 86_400}


class LimitState(NamedTuple):
    """One limit after one decision.

    A NamedTuple, not a frozen dataclass: the limiter makes one per limit and request, and the tuple
    takes a quarter of the time.

    Attributes:
        name: the limit's name in the plan.
        kind: rate (with burst), window, quota (a period's), concurrency.
        limit: q, whole units >= 0; the burst for a rate.
        window_s: w in seconds; 0 when it has none (concurrency, months, billing periods).
        unit: `requests`, `concurrent-requests`, or the unit of another meter.
        remaining: whole units left, rounded down. Negative by the excess when a quota with action
            warn or overage is passed; the RateLimit header then says 0.
        reset_ms: until the limit has more quota; of a refusal, until this request would fit. 0 when
            unknown (concurrency) or when nothing is used.
        allowed: False when this limit refuses the request.
        overage: the request is (partly) counted as overage.
        warned: a quota with action warn is passed.
        shadow_refused: a limit with `enforce: false` would have refused.
    """

    name: str
    kind: Kind
    limit: int
    window_s: int
    unit: str
    remaining: int
    reset_ms: int
    allowed: bool = True
    overage: bool = False
    warned: bool = False
    shadow_refused: bool = False


class Policy(NamedTuple):
    """The part of a `LimitState` that the plan fixes; compiled once a configuration.

    `LimitState(*policy.static, remaining // policy.divisor, ...)` completes it.
    """

    static: tuple[str, Kind, int, int, str]
    divisor: int
    enforce: bool


def policy_of(limit: Limit, meters: Mapping[str, Meter]) -> Policy:
    """What a plan's limit promises. `meters` by name; `requests` need not be among them."""
    if isinstance(limit, Concurrency):
        static: tuple[str, Kind, int, int, str] = (
            limit.name, "concurrency", limit.limit, 0, CONCURRENT_UNIT,
        )  # fmt: skip
        return Policy(static, 1, limit.enforce)
    meter = meters.get(limit.meter) or Meter(limit.meter)
    divisor: int = 10**meter.decimals
    unit = REQUESTS_UNIT if meter.unit in ("request", "requests") else meter.unit
    if isinstance(limit, Gcra):
        # q is what may come at once, w the time in which all of it returns: q/w is the rate.
        window_us = -(-limit.burst * limit.period_us // limit.rate)
        window_s = -(-window_us // 1_000_000)
        static = (limit.name, "rate", limit.burst // divisor, window_s, unit)
    elif isinstance(limit, Quota):
        static = (
            limit.name, "quota", limit.limit // divisor, _PERIOD_S.get(limit.period, 0), unit,
        )  # fmt: skip
    else:
        window_s = -(-limit.window_ms // 1000)
        static = (limit.name, "window", limit.limit // divisor, window_s, unit)
    return Policy(static, divisor, limit.enforce)
