"""Plans, limits, meters and routes in the compiled form that the hot path reads.

`core.config` parses and validates YAML and builds these; nothing here does I/O. Quantities are
integers in the meter's smallest unit (`10 ** -decimals` of a unit); times are integer milliseconds
or microseconds as the field name says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

from core.cost import ActualCost
from core.rules import NO_RULES, RouteRules
from core.upstream import Upstream as Upstream

# Lua numbers are doubles: integers are exact up to here, and every product that a script forms
# is checked against it when the config is loaded.
MAX_EXACT = 2**53 - 1

# The meter that exists without being declared: one unit a request.
REQUESTS = "requests"


class Action(StrEnum):
    """What a quota does when a request would pass it."""

    BLOCK = "block"  # refuse: 429
    WARN = "warn"  # admit, event, header
    OVERAGE = "overage"  # admit, event, header; the excess is counted apart and billed


class Aggregation(StrEnum):
    SUM = "sum"
    MAX = "max"
    LAST = "last"


class OutageMode(StrEnum):
    """What a route does while Redis does not answer."""

    CLOSED = "closed"  # refuse: 503
    OPEN = "open"  # admit, count afterwards
    LOCAL = "local"  # admit within this worker's share of each limit, count afterwards


class PeriodKind(StrEnum):
    """The calendar a quota follows. All in UTC; weeks start on Monday."""

    BILLING = "billing"  # anchored to the subscription
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


class Status(StrEnum):
    """A subscription's status, in Stripe's terms."""

    TRIALING = "trialing"
    ACTIVE = "active"
    PAST_DUE = "past_due"
    PAUSED = "paused"
    CANCELED = "canceled"


@dataclass(frozen=True, slots=True)
class Meter:
    """What is counted. `decimals` (0-6) fixes the smallest unit: 10 ** -decimals."""

    name: str
    unit: str = "request"
    aggregation: Aggregation = Aggregation.SUM
    decimals: int = 0

    def to_units(self, quantity: Decimal) -> int:
        """A quantity as an integer count of smallest units.

        Raises:
            ValueError: the quantity has more decimals than the meter keeps.
        """
        units = int(quantity.scaleb(self.decimals))
        # Compared with the quantity itself: scaling rounds what has very many digits.
        if self.from_units(units) != quantity:
            raise ValueError(
                f"{quantity} has more than the {self.decimals} decimals meter {self.name!r} keeps"
            )
        return units

    def from_units(self, units: int) -> Decimal:
        """An integer count of smallest units as an exact quantity."""
        return Decimal(units).scaleb(-self.decimals)


def changed_meters(old: Mapping[str, Meter], new: Mapping[str, Meter]) -> list[str]:
    """For each property of a meter in both that must not change: `path: value: fix`.

    Live counters and the ledger are in the meter's smallest unit and hold what its aggregation made
    of them: neither can be read in another way.
    """
    problems: list[str] = []
    for name, meter in new.items():
        known = old.get(name, meter)
        for key, was, now in (
            ("decimals", known.decimals, meter.decimals),
            ("aggregation", known.aggregation, meter.aggregation),
        ):
            if was != now:
                problems.append(
                    f"meters.{name}.{key}: {now}: pinned as {was} since the meter was first used, "
                    f"and what was counted cannot be converted: set it back to {was}, "
                    "or declare a new meter"
                )
    return problems


@dataclass(frozen=True, slots=True)
class Gcra:
    """`rate` units per `period_us`, of which `burst` may come at once.

    `rate` and `period_us` are reduced by their greatest common divisor.
    """

    name: str
    meter: str
    rate: int
    period_us: int
    burst: int
    enforce: bool = True


@dataclass(frozen=True, slots=True)
class FixedWindow:
    """At most `limit` units in each window of `window_ms`, aligned to the Unix epoch."""

    name: str
    meter: str
    limit: int
    window_ms: int
    enforce: bool = True


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """At most `limit` units in any `window_ms`, estimated from two aligned buckets."""

    name: str
    meter: str
    limit: int
    window_ms: int
    enforce: bool = True


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `limit` units of `meter` per period.

    `thresholds` are whole percentages in ascending order, each firing one event a period.
    """

    name: str
    meter: str
    limit: int
    period: PeriodKind
    action: Action = Action.BLOCK
    thresholds: tuple[int, ...] = (80, 90, 95, 100)
    enforce: bool = True


@dataclass(frozen=True, slots=True)
class Concurrency:
    """At most `limit` requests in flight; a slot whose holder died is free after `lease_ms`."""

    name: str
    limit: int
    lease_ms: int = 30_000
    enforce: bool = True


Limit = Gcra | FixedWindow | SlidingWindow | Quota | Concurrency


@dataclass(frozen=True, slots=True)
class MeterPrice:
    """Price of one meter in a plan: `included` units (of the meter, not scaled) are in the base."""

    included: Decimal
    overage: Decimal


@dataclass(frozen=True, slots=True)
class Price:
    base: Decimal
    currency: str
    meters: Mapping[str, MeterPrice] = field(default_factory=dict)


# What each subscription status answers when the plan says nothing: None admits,
# 402 asks for payment, 403 refuses.
DEFAULT_STATUS_RULE: Mapping[Status, int | None] = {
    Status.TRIALING: None,
    Status.ACTIVE: None,
    Status.PAST_DUE: 402,
    Status.PAUSED: 403,
    Status.CANCELED: 403,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A named set of limits. `interval_months` is the length of its billing period."""

    name: str
    limits: tuple[Limit, ...]
    interval_months: int = 1
    description: str = ""
    price: Price | None = None
    status_rule: Mapping[Status, int | None] = field(default_factory=lambda: DEFAULT_STATUS_RULE)


@dataclass(frozen=True, slots=True)
class FrameCost:
    """What `meter` counts of a WebSocket: `units` for each message, or each byte of payload.

    `sender` is whose: client, upstream or both.
    """

    meter: str
    units: int
    per_byte: bool
    sender: str


@dataclass(frozen=True, slots=True)
class WebSocket:
    """How a route serves WebSockets. `origins` empty means any; `max_message` 0 means any size."""

    origins: frozenset[bytes] = frozenset()
    costs: tuple[FrameCost, ...] = ()
    idle_ms: int = 300_000
    max_message: int = 0
    recheck_ms: int = 10_000
    max_connections: int = 10_000


@dataclass(frozen=True, slots=True)
class Route:
    """What a request matches and what then happens to it.

    `path` is an exact path, or a prefix when it ends in `/*`; `methods` empty means every method;
    `host` empty means every host. `costs` maps meter name to units (scaled) charged a request.
    `plan` is set on keyless routes only (`keyless`), and names the plan of each client address.
    `reserve` makes the charge wait for its answer, and `charged` then says which statuses are paid
    for; None means whatever the upstream answers. Of `actual` meters the cost is an estimate, which
    the answer corrects. Without `websocket` a request to open one is answered as any other.
    """

    name: str
    path: str
    upstream: str  # empty where `rules.answer` answers
    methods: frozenset[str] = frozenset()
    host: str = ""
    strip_prefix: str = ""
    costs: Mapping[str, int] = field(default_factory=lambda: {REQUESTS: 1})
    keyless: bool = False
    plan: str = ""
    forward_key: bool = False
    reserve: bool = False
    charged: frozenset[int] | None = None
    actual: tuple[ActualCost, ...] = ()
    outage: OutageMode = OutageMode.CLOSED
    websocket: WebSocket | None = None
    rules: RouteRules = NO_RULES
