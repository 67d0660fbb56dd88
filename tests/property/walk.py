"""Random walks of one subject: what time does, what the plan becomes, what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hypothesis import strategies as st

from core.clock import from_datetime
from core.period import DAY_MS, HOUR_MS, Span, billing_period, calendar_period
from core.policy import Action, Aggregation, Meter, PeriodKind, Quota


def ms(*parts: int) -> int:
    return from_datetime(datetime(*parts, tzinfo=UTC))  # type: ignore[misc]


BILLING, DAY, WEEK, MONTH, YEAR = PeriodKind

# The periods of a quota go with its name, so that a plan changes numbers and actions only.
SLOTS = {
    "billing": ("requests", BILLING),
    "billing_too": ("requests", BILLING),
    "daily": ("requests", DAY),
    "monthly": ("requests", MONTH),
    "weekly": ("credits", WEEK),
    "yearly": ("credits", YEAR),
    "credits": ("credits", BILLING),
}
ANCHORS = [
    ms(2024, 1, 31, 10, 30),
    ms(2024, 2, 29, 23, 59, 59),
    ms(2025, 12, 31, 12),
    ms(2026, 3, 15, 6, 45, 30),
]
STARTS = [
    ms(2024, 2, 29, 9, 59, 59),
    ms(2026, 12, 31, 23, 58),
    ms(2028, 2, 28, 23, 59, 58),
    ms(2026, 6, 14, 11, 11, 11),
]


def quota(
    name: str,
    limit: int,
    action: Action = Action.OVERAGE,
    *,
    enforce: bool = True,
    thresholds: tuple[int, ...] = (80, 90, 95, 100),
) -> Quota:
    meter, period = SLOTS[name]
    return Quota(name, meter, limit, period, action, thresholds, enforce)


Plan = list[Quota]
quotas = st.builds(
    lambda name, limit, action, enforce, thresholds: quota(
        name, limit, action, enforce=enforce, thresholds=thresholds
    ),
    st.sampled_from(list(SLOTS)),
    st.integers(0, 12),
    st.sampled_from([Action.OVERAGE, Action.OVERAGE, Action.WARN, Action.BLOCK]),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([(), (100,), (50, 94, 95), (80, 90, 95, 100), (1, 33, 99)]),
)
plans = st.lists(quotas, min_size=1, max_size=4, unique_by=lambda row: row.name)


@dataclass(frozen=True)
class Step:
    """First time passes, then the plan or the period changes, then the checks come in one batch.

    `after` is a number of ms, below zero when the clock steps back, or the kind of boundary to go
    to, with ms to add; HOUR_MS in place of a kind is the next hour.
    """

    after: int | tuple[PeriodKind | int, int] = 0
    costs: tuple[tuple[int, int], ...] = ((1, 0),)
    plan: int | None = None
    billing: tuple[int, int] | None = None  # anchor, interval in months


after = st.one_of(
    st.integers(0, 3_000),
    st.integers(0, 2 * HOUR_MS),
    st.integers(0, 40 * DAY_MS),
    st.tuples(st.sampled_from([*PeriodKind, HOUR_MS]), st.sampled_from([-1, 0, 1, 0])),
    st.tuples(st.sampled_from([BILLING, HOUR_MS]), st.just(0)),
    st.sampled_from([-1, -2_000, -HOUR_MS, -25 * HOUR_MS]),
)
costs = st.tuples(st.integers(0, 6), st.integers(0, 6))
billings = st.tuples(st.sampled_from(ANCHORS), st.sampled_from([1, 3, 12]))
steps = st.builds(
    Step,
    after,
    st.lists(costs, min_size=1, max_size=3).map(tuple),
    st.one_of(st.none(), st.none(), st.sampled_from([0, 1, 2])),
    st.one_of(st.none(), st.none(), st.none(), billings),
)
aggregations = st.sampled_from(list(Aggregation))
meters = st.builds(
    lambda requests, credit: {
        "requests": Meter("requests", aggregation=requests),
        "credits": Meter("credits", unit="credit", aggregation=credit, decimals=2),
    },
    aggregations,
    aggregations,
)
SUMS = {"requests": Meter("requests"), "credits": Meter("credits", unit="credit", decimals=2)}


@dataclass
class Time:
    """The clock and the billing periods of the subject."""

    now: int
    anchor: int = ANCHORS[0]
    interval: int = 1

    @property
    def span(self) -> Span:
        return billing_period(self.anchor, self.interval, self.now)

    def move(self, step: Step) -> None:
        if step.billing is not None:
            self.anchor, self.interval = step.billing
        if isinstance(step.after, int):
            self.now += step.after
            return
        kind, extra = step.after
        if not isinstance(kind, PeriodKind):
            boundary = self.now - self.now % kind + kind
        elif kind is PeriodKind.BILLING:
            boundary = self.span[1]
        else:
            boundary = calendar_period(kind, self.now)[1]
        self.now = boundary + extra
