"""From what the file says to what the hot path reads: meters and plans of `core.policy`.

Works piece by piece on the raw data, so that references and numbers are checked wherever a piece
is sound, even if another one is not. What is wrong inside a piece is reported by its model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from core.config.catalog import (
    INTERVAL_MONTHS,
    AnyLimit,
    ConcurrencyLimit,
    LimitSpec,
    MeterSpec,
    PeriodLimit,
    PlanSpec,
    RateLimit,
    WindowLimit,
)
from core.config.document import Path
from core.config.problems import Problems, did_you_mean
from core.policy import (
    DEFAULT_STATUS_RULE,
    MAX_EXACT,
    REQUESTS,
    Action,
    Aggregation,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    MeterPrice,
    PeriodKind,
    Plan,
    Price,
    Quota,
    SlidingWindow,
)

# A client address is no customer, and what it counts lives in Redis as long as its longest limit.
KEYLESS_WINDOW_MS = 7 * 86_400_000
_KEYLESS_PERIODS = (PeriodKind.DAY, PeriodKind.WEEK)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def attempt(kind: Any, raw: object) -> Any:
    """`raw` as a `kind`, or None where its model has reported why not."""
    try:
        return _adapter(kind).validate_python(raw)
    except ValidationError:
        return None


def mapping(data: Any, key: str) -> Mapping[str, Any]:
    """The mapping under `key`, empty if there is none."""
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}


class Meters:
    """The meters of a file, and the checks that need them."""

    def __init__(self, data: Mapping[str, Any], problems: Problems) -> None:
        self._problems = problems
        raw = mapping(data, "meters")
        self.known = {REQUESTS, *raw}
        self.compiled = {} if REQUESTS in raw else {REQUESTS: Meter(REQUESTS)}
        for name, value in raw.items():
            spec: MeterSpec | None = attempt(MeterSpec, value)
            if spec is not None:
                self.compiled[name] = Meter(name, spec.unit, spec.aggregation_kind, spec.decimals)

    def refer(self, path: Path, name: object, *, value: bool = True) -> None:
        """Report a meter that is not declared."""
        if isinstance(name, str) and name not in self.known:
            hint = did_you_mean(name, self.known)
            self._problems.add(path, f"unknown meter; declare it under meters{hint}", value=value)

    def scale(self, path: Path, name: str, quantity: Decimal) -> int | None:
        """A quantity in the meter's smallest units; None after reporting why not."""
        meter = self.compiled.get(name)
        if meter is None:
            return None
        try:
            units = meter.to_units(quantity)
        except ValueError:
            self._problems.add(
                path, f"meter {name} keeps {meter.decimals} decimals; round it, or raise decimals"
            )
            return None
        if units > MAX_EXACT:
            self._problems.add(path, "too large to be counted exactly; lower it or the decimals")
            return None
        return units


class Plans:
    """Compiles the plans of a file; findings go to `problems`."""

    def __init__(self, data: Mapping[str, Any], meters: Meters, problems: Problems) -> None:
        self._meters = meters
        self._problems = problems
        self.known = set(mapping(data, "plans"))
        self.compiled: dict[str, Plan] = {}
        for name, raw in mapping(data, "plans").items():
            plan = self._plan(name, raw)
            if plan is not None:
                self.compiled[name] = plan

    def _plan(self, name: str, raw: Any) -> Plan | None:
        path: Path = ("plans", name)
        if not isinstance(raw, dict):
            return None
        raw_limits = raw.get("limits")
        if raw.get("unlimited") in (True, "true"):
            if raw_limits:
                self._problems.add(
                    (*path, "unlimited"), "the plan has limits too; remove one of the two"
                )
        elif not raw_limits:
            self._problems.add(
                (*path, "limits"),
                "a plan without limits; add one, or write unlimited: true",
                value=False,
            )
        for meter in mapping(raw.get("price"), "meters"):
            self._meters.refer((*path, "price", "meters", meter), meter, value=False)
        limits = tuple(
            self._limit((*path, "limits", key), key, value)
            for key, value in mapping(raw, "limits").items()
        )
        spec: PlanSpec | None = attempt(
            PlanSpec, {key: value for key, value in raw.items() if key != "limits"}
        )
        if spec is None:
            return None
        price = None
        if spec.price is not None:
            price = Price(
                base=spec.price.base,
                currency=spec.price.currency,
                meters={
                    meter: MeterPrice(line.included, line.overage)
                    for meter, line in spec.price.meters.items()
                },
            )
        return Plan(
            name=name,
            limits=tuple(limit for limit in limits if limit is not None),
            interval_months=INTERVAL_MONTHS[spec.price.interval] if spec.price else 1,
            description=spec.description,
            price=price,
            status_rule={**DEFAULT_STATUS_RULE, **spec.status_answers()},
        )

    def _limit(self, path: Path, name: str, raw: Any) -> Limit | None:
        if isinstance(raw, dict):
            self._meters.refer((*path, "meter"), raw.get("meter"))
        spec: AnyLimit | None = attempt(LimitSpec, raw)
        if spec is None:
            return None
        # One compiler a form; a dict of callables would lose the types.
        if isinstance(spec, RateLimit):
            return self._gcra(path, name, spec)
        if isinstance(spec, WindowLimit):
            return self._window(path, name, spec)
        if isinstance(spec, PeriodLimit):
            return self._quota(path, name, spec)
        return self._concurrency(name, spec)

    def check_keyless(self, name: str, route: str) -> None:
        """Report what a plan cannot have because a keyless route gives it to client addresses.

        `route` says which. A limit that is not sound is left out: its own problem is reported.
        """
        plan = self.compiled.get(name)
        for limit in plan.limits if plan is not None else ():
            path: Path = ("plans", name, "limits", limit.name)
            where = f"on {route}, which is keyless, each client address is counted"
            if isinstance(limit, Quota):
                if limit.period not in _KEYLESS_PERIODS:
                    self._problems.add(
                        (*path, "period"), f"too long: {where} in Redis alone; use day or week"
                    )
                if limit.action is Action.OVERAGE:
                    self._problems.add(
                        (*path, "action"),
                        f"nobody to bill: {where} and has no customer; use block or warn",
                    )
            elif (
                isinstance(limit, FixedWindow | SlidingWindow)
                and limit.window_ms > KEYLESS_WINDOW_MS
            ):
                self._problems.add(
                    (*path, "window"), f"too long: {where} in Redis alone; use 1w or less"
                )

    def _exact(self, path: Path, product: int, what: str) -> bool:
        # The scripts form these products in doubles, which are exact only below 2**53.
        if product < MAX_EXACT:
            return True
        self._problems.add(path, f"too large to be counted exactly: {what} must be < {MAX_EXACT}")
        return False

    def _countable(self, path: Path, meter: str) -> bool:
        # A rate and a window add costs up, which the total of such a meter does not.
        known = self._meters.compiled.get(meter)
        if known is None or known.aggregation is Aggregation.SUM:
            return True
        self._problems.add(
            (*path, "meter"),
            f"a rate or a window adds up, and this meter keeps the {known.aggregation} value; "
            "write a limit of the form {period, limit}, or name a meter with aggregation sum",
        )
        return False

    def _gcra(self, path: Path, name: str, spec: RateLimit) -> Gcra | None:
        if not self._countable(path, spec.meter):
            return None
        count, period_us = spec.rate
        rate = self._meters.scale((*path, "rate"), spec.meter, Decimal(count))
        given = Decimal(count) if spec.burst is None else spec.burst
        burst = self._meters.scale((*path, "burst"), spec.meter, given)
        if rate is None or burst is None:
            return None
        if burst < 1:
            self._problems.add((*path, "burst"), "admits nothing; write 1 or more")
            return None
        divisor = math.gcd(rate, period_us)
        rate, period_us = rate // divisor, period_us // divisor
        at = (*path, "rate" if spec.burst is None else "burst")
        what = "burst times period in microseconds (after reducing the rate)"
        if not self._exact(at, burst * period_us, what):
            return None
        return Gcra(name, spec.meter, rate, period_us, burst, spec.enforce)

    def _window(
        self, path: Path, name: str, spec: WindowLimit
    ) -> FixedWindow | SlidingWindow | None:
        if not self._countable(path, spec.meter):
            return None
        limit = self._meters.scale((*path, "limit"), spec.meter, spec.limit)
        if limit is None:
            return None
        if not spec.sliding:
            return FixedWindow(name, spec.meter, limit, spec.window_ms, spec.enforce)
        what = "limit times window in milliseconds"
        if not self._exact((*path, "limit"), limit * spec.window_ms, what):
            return None
        return SlidingWindow(name, spec.meter, limit, spec.window_ms, spec.enforce)

    def _quota(self, path: Path, name: str, spec: PeriodLimit) -> Quota | None:
        limit = self._meters.scale((*path, "limit"), spec.meter, spec.limit)
        if limit is None or not self._exact((*path, "limit"), limit * 100, "limit times 100"):
            return None
        return Quota(
            name,
            spec.meter,
            limit,
            spec.period_kind,
            spec.action_kind,
            spec.thresholds,
            spec.enforce,
        )

    @staticmethod
    def _concurrency(name: str, spec: ConcurrencyLimit) -> Concurrency:
        return Concurrency(name, spec.concurrency, spec.lease_ms, spec.enforce)
