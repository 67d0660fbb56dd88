"""Overage and limit events against a model, on a real server, with the clock under control.

Meters of every aggregation, quotas of every calendar and action, shadow ones among them; numbers,
anchors and intervals that change in between, and a clock that steps back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.admission.program import calendar_use, compile_program
from core.period import HOUR_MS
from core.policy import Action, Aggregation, Meter, PeriodKind
from reconciler.snapshot import read_state
from tests.property.metering import Event, Metering
from tests.property.walk import STARTS, SUMS, Plan, Step, Time, meters, plans, quota, steps
from tests.support.scripts import Scripts, plan_of

HOUR, BILLING = HOUR_MS, PeriodKind.BILLING
LAST = {"requests": Meter("requests", aggregation=Aggregation.LAST), "credits": SUMS["credits"]}
PEAK = {"requests": Meter("requests", aggregation=Aggregation.MAX), "credits": SUMS["credits"]}


@pytest.fixture
def scripts(any_redis_url: str) -> Scripts:
    """On Valkey and on Redis: the scripts must behave the same."""
    return Scripts(any_redis_url)


def emitted(scripts: Scripts) -> list[Event]:
    found: list[Event] = []
    for row in scripts.events():
        assert row["key"] == scripts.keyspace.state("s")
        numbers = (int(row[name]) for name in ("threshold", "used", "max", "start", "end", "at"))
        found.append((row["limit"], row["meter"], row["kind"], *numbers))  # type: ignore[arg-type]
    return found


def run(
    scripts: Scripts, meters: Mapping[str, Meter], pool: list[Plan], walk: list[Step], start: int
) -> Metering:
    """Goes the walk with the scripts and the model; compares every answer."""
    calendars = calendar_use([plan_of(*plan) for plan in pool])
    model = Metering(meters)
    time = Time(start)
    scripts.redis.flushdb()
    scripts.at(start * 1000)
    kinds = [(meter, kind) for meter, found in calendars.items() for kind in found]
    scripts.seed("s", {f"q:{meter}:{kind}": "0 0 0" for meter, kind in kinds})
    plan = pool[0]
    for number, step in enumerate(walk):
        time.move(step)
        scripts.at(time.now * 1000 + 7)
        if step.plan is not None:
            plan = pool[step.plan % len(pool)]
        costs = [{"requests": a, "credits": b} for a, b in step.costs]
        programs = [compile_program(plan_of(*plan), cost, meters, calendars) for cost in costs]
        outcomes = scripts.batch([("s", program) for program in programs], span=time.span)
        for outcome, cost in zip(outcomes, costs, strict=True):
            expected = model.check(plan, cost, time.now, time.span)
            answers = [(a.flags, a.remaining, a.reset_ms) for a in outcome.limits]
            assert (outcome.admitted, answers) == (expected.admitted, expected.answers), number
    return model


common = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
walks = st.lists(steps, min_size=1, max_size=15)
pools = st.lists(plans, min_size=1, max_size=3)


@settings(common, max_examples=140)
@given(meters=meters, pool=pools, walk=walks, start=st.sampled_from(STARTS))
@example(  # a shadow quota behind an enforced one
    meters=SUMS,
    pool=[[quota("billing", 9), quota("daily", 3, enforce=False)]],
    walk=[Step(costs=((5, 0),))],
    start=STARTS[0],
)
@example(  # one cost over two limits: the larger excess, once; across an hour and a period
    meters=SUMS,
    pool=[[quota("billing", 9), quota("billing_too", 7), quota("daily", 4)], [quota("billing", 2)]],
    walk=[
        Step(costs=((6, 0), (6, 0))),
        Step(after=(HOUR, 0), costs=((2, 0),)),
        Step(costs=((2, 0),), plan=1),
        Step(after=(BILLING, -1), costs=((1, 0),)),
        Step(after=1, costs=((3, 0),)),
    ],
    start=STARTS[0],
)
@example(  # the highest value: its overage follows the limit, and every hour has its own
    meters=PEAK,
    pool=[[quota("billing", 4)], [quota("billing", 3)], [quota("billing", 3, Action.WARN)]],
    walk=[
        Step(costs=((6, 0), (2, 0))),
        Step(after=(HOUR, 0), costs=((5, 0),)),
        Step(costs=((1, 0),), plan=1),
        Step(costs=((6, 0),), plan=2),
    ],
    start=STARTS[0],
)
def test_overage_of_periods_and_hours(
    scripts: Scripts, meters: Mapping[str, Meter], pool: list[Plan], walk: list[Step], start: int
) -> None:
    model = run(scripts, meters, pool, walk, start)
    key = scripts.keyspace.state("s")
    state = read_state(key, scripts.state("s"))
    periods = {(r.meter, r.start_ms): (r.end_ms, r.total, r.overage) for r in state.periods}
    hours = {
        (r.meter, r.period_start_ms, r.hour_start_ms): (r.total, r.overage) for r in state.hours
    }
    assert periods == model.periods()
    assert hours == model.hours()
    assert len(state.periods) == len(periods)  # a row is in the state once
    assert len(state.hours) == len(hours)
    for (meter, first), (_, total, over) in periods.items():
        assert 0 <= over <= total or meters[meter].aggregation is not Aggregation.SUM
        if meters[meter].aggregation is Aggregation.SUM:
            parts = [row for name, row in hours.items() if name[:2] == (meter, first)]
            assert (sum(row[0] for row in parts), sum(row[1] for row in parts)) == (total, over)


@settings(common, max_examples=140)
@given(meters=meters, pool=pools, walk=walks, start=st.sampled_from(STARTS))
@example(  # a value that falls and rises again; two boundaries without a request in between
    meters=LAST,
    pool=[[quota("billing", 10)], [quota("billing", 20)], [quota("billing", 5)]],
    walk=[
        Step(costs=((9, 0), (1, 0), (9, 0))),
        Step(costs=((11, 0), (3, 0), (11, 0))),
        Step(costs=((19, 0),), plan=1),
        Step(costs=((3, 0), (6, 0)), plan=2),
        Step(after=(BILLING, 0), costs=()),
        Step(after=(BILLING, 0), costs=((0, 1), (5, 0))),
    ],
    start=STARTS[3],
)
@example(  # nothing was used of what is reset; the refused request does not reset
    meters=SUMS,
    pool=[[quota("daily", 4, Action.BLOCK), quota("billing", 40, enforce=False)]],
    walk=[
        Step(costs=((5, 0), (4, 0), (1, 0))),
        Step(after=(PeriodKind.DAY, 0), costs=((6, 0), (1, 0))),
    ],
    start=STARTS[3],
)
def test_every_event_once_and_in_order(
    scripts: Scripts, meters: Mapping[str, Meter], pool: list[Plan], walk: list[Step], start: int
) -> None:
    model = run(scripts, meters, pool, walk, start)
    events = emitted(scripts)
    assert events == model.events
    # once more without the model
    seen = Counter(row[:4] + row[5:7] for row in events)  # limit, kind, threshold, max, start
    falls = [name for name, meter in meters.items() if meter.aggregation is Aggregation.LAST]
    assert not [row for row, times in seen.items() if times > 1 and row[1] not in falls]
    shadows = [{row.name for row in plan if not row.enforce} for plan in pool]
    assert not {row[0] for row in events} & set.intersection(*shadows)
