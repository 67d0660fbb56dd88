"""Every algorithm against a plain-Python model, on a real server, with the clock under control.

The comparison is exact: admitted or not, which limits refuse, what is left of each, and in the end
the totals per period and hour that the ledger will be fed with.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.admission.program import REFUSED, Verdict, calendar_use, compile_program
from core.clock import from_datetime
from core.period import HOUR_MS, billing_period
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
from tests.property.model import Model
from tests.support.scripts import Scripts, plan_of

METERS = {"requests": Meter("requests"), "credits": Meter("credits", unit="credit")}
SECOND_US = 1_000_000


def ms(*parts: int) -> int:
    return from_datetime(datetime(*parts, tzinfo=UTC))  # type: ignore[misc]


# Moments around which things go wrong: month ends, a leap day, a year's end.
ANCHORS = [
    ms(2024, 1, 31, 10, 30),
    ms(2023, 8, 31),
    ms(2024, 2, 29, 23, 59, 59),
    ms(2025, 12, 31, 12),
    ms(2026, 3, 15, 6, 45, 30),
]
STARTS = [
    ms(2024, 2, 29, 9, 0),
    ms(2026, 2, 28, 23, 59),
    ms(2026, 12, 31, 23, 58),
    ms(2027, 12, 31, 22),
    ms(2028, 2, 28, 23, 59, 58),
    ms(2026, 6, 14, 11, 11, 11),
]

meters = st.sampled_from(["requests", "credits"])
gcras = st.builds(
    lambda meter, rate, period, burst: Gcra("rate", meter, rate, period, burst),
    meters,
    st.sampled_from([1, 3, 7, 10]),
    st.sampled_from([SECOND_US, 10 * SECOND_US, 60 * SECOND_US]),
    st.integers(1, 12),
)
fixed_windows = st.builds(
    lambda meter, limit, window: FixedWindow("fixed", meter, limit, window),
    meters,
    st.integers(0, 12),
    st.sampled_from([1_000, 60_000, HOUR_MS, 24 * HOUR_MS]),
)
sliding_windows = st.builds(
    lambda meter, limit, window: SlidingWindow("sliding", meter, limit, window),
    meters,
    st.integers(0, 12),
    st.sampled_from([1_000, 60_000, HOUR_MS]),
)
quotas = st.builds(
    lambda name, meter, limit, period, action: Quota(name, meter, limit, period, action),
    st.sampled_from(["quota_a", "quota_b"]),
    meters,
    st.integers(0, 40),
    st.sampled_from(list(PeriodKind)),
    st.sampled_from(list(Action)),
)
concurrencies = st.builds(
    lambda limit, lease: Concurrency("slots", limit, lease),
    st.integers(1, 6),
    st.sampled_from([1_000, 30_000]),
)
limits = st.lists(
    st.builds(
        lambda limit, enforce: replace(limit, enforce=enforce),
        st.one_of(gcras, fixed_windows, sliding_windows, quotas, concurrencies),
        st.sampled_from([True, True, True, False]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda limit: limit.name,
)
gaps_us = st.one_of(
    st.integers(0, 300_000),
    st.integers(0, 90 * SECOND_US),
    st.integers(0, 3 * 24 * 3600 * SECOND_US),
    st.integers(0, 40 * 24 * 3600 * SECOND_US),
)
steps = st.lists(st.tuples(gaps_us, st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=30)


@pytest.fixture
def scripts(any_redis_url: str) -> Scripts:
    """On Valkey and on Redis: the scripts must behave the same."""
    return Scripts(any_redis_url)


def fresh(scripts: Scripts, calendars: dict[str, tuple[PeriodKind, ...]], now_us: int) -> None:
    scripts.redis.flushdb()
    scripts.at(now_us)
    scripts.seed(
        "s", {f"q:{meter}:{kind}": "0 0 0" for meter, kinds in calendars.items() for kind in kinds}
    )


def scaled(limit: Limit, change: int) -> Limit:
    """The same limit, by name, with other numbers."""
    if isinstance(limit, Gcra):
        rate = max(1, limit.rate + change)
        return replace(limit, burst=max(1, limit.burst + change), rate=rate, period_us=7_000_000)
    return replace(limit, limit=max(1, limit.limit + change))


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    limits=limits,
    steps=steps,
    start=st.sampled_from(STARTS),
    anchor=st.sampled_from(ANCHORS),
    interval=st.sampled_from([1, 3, 12]),
    change=st.integers(-5, 5),
    change_at=st.integers(0, 30),
)
@example(
    limits=[Quota("quota_a", "requests", 3, PeriodKind.BILLING)],
    steps=[
        (0, 1, 1),
        (24 * 3600 * SECOND_US, 1, 1),
        (SECOND_US, 1, 1),
        (29 * 86400 * SECOND_US, 1, 1),
    ],
    start=ms(2024, 2, 29, 10, 29, 59),
    anchor=ms(2024, 1, 31, 10, 30),
    interval=1,
    change=0,
    change_at=99,
)
@example(  # two requests of one hour, one on each side of a period's boundary
    limits=[Quota("quota_a", "requests", 3, PeriodKind.BILLING)],
    steps=[(0, 2, 0), (2 * SECOND_US, 3, 0), (SECOND_US, 1, 0)],
    start=ms(2024, 2, 29, 10, 29, 59),
    anchor=ms(2024, 1, 31, 10, 30),
    interval=1,
    change=0,
    change_at=99,
)
@example(  # a rate is changed while its backlog is not a whole number of the new unit
    limits=[Gcra("rate", "requests", 3, SECOND_US, 5)],
    steps=[(0, 4, 0), (100_001, 1, 0), (100_000, 1, 0), (200_000, 1, 0), (900_001, 2, 0)],
    start=ms(2026, 6, 14),
    anchor=ms(2026, 3, 15),
    interval=1,
    change=1,
    change_at=2,
)
def test_scripts_agree_with_the_model(
    scripts: Scripts,
    limits: list[Limit],
    steps: list[tuple[int, int, int]],
    start: int,
    anchor: int,
    interval: int,
    change: int,
    change_at: int,
) -> None:
    now_us = start * 1000 + 123
    calendars = dict(calendar_use([plan_of(*limits)]))
    fresh(scripts, calendars, now_us)
    model = Model()
    for number, (gap, requests_cost, credits_cost) in enumerate(steps):
        if number == change_at:
            limits = [scaled(limit, change) for limit in limits]
        now_us += gap
        scripts.at(now_us)
        costs = {"requests": requests_cost, "credits": credits_cost}
        charged = {meter: cost for meter, cost in costs.items() if cost}
        program = compile_program(plan_of(*limits, interval=interval), costs, METERS, calendars)
        span = billing_period(anchor, interval, now_us // 1000)
        before = scripts.state("s")
        outcome = scripts.admit("s", program, span=span)
        admitted, full, left = model.check(list(program.limits), charged, now_us, span)
        assert outcome.status in (Verdict.ADMIT, Verdict.REJECT)
        assert outcome.admitted == admitted, (number, program.limits)
        assert [bool(answer.flags & REFUSED) for answer in outcome.limits] == full
        assert [answer.remaining for answer in outcome.limits] == left
        if not admitted:
            assert scripts.state("s") == before  # a rejected request burns nothing
    _compare_totals(scripts.state("s"), model)


def _compare_totals(state: dict[str, str], model: Model) -> None:
    for meter in METERS:
        periods, hours = model.totals(meter)
        seen_periods: dict[int, int] = {}
        seen_hours: dict[tuple[int, int], int] = {}
        for name, text in state.items():
            if name == f"m:{meter}":
                first, _, hour = map(int, state[f"p:{meter}"].split())
                total, _, hour_total, _, count = map(int, text.split())
                seen_periods[first] = total
                seen_hours[first, hour] = hour_total
                assert count == sum(1 for row in model.state.spent if row[2] == meter)
            elif name.startswith(f"cp:{meter}:"):
                seen_periods[int(name.rsplit(":", 1)[1])] = int(text.split()[1])
            elif name.startswith(f"ch:{meter}:"):
                _, _, first_text, hour_text = name.split(":")
                seen_hours[int(first_text), int(hour_text)] = int(text.split()[0])
        assert seen_periods == periods
        assert seen_hours == hours


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    limit=st.one_of(gcras, fixed_windows, sliding_windows),
    gaps=st.lists(st.integers(0, 2 * SECOND_US), min_size=1, max_size=40),
    cost=st.integers(1, 4),
    start=st.sampled_from(STARTS),
)
def test_reset_says_when_the_refused_cost_fits(
    scripts: Scripts, limit: Limit, gaps: list[int], cost: int, start: int
) -> None:
    assert not isinstance(limit, Concurrency)
    capacity = limit.burst if isinstance(limit, Gcra) else limit.limit  # type: ignore[union-attr]
    program = compile_program(plan_of(limit), {limit.meter: cost}, METERS, {})
    now_us = start * 1000
    fresh(scripts, {}, now_us)
    span = (0, 2**45)
    for gap in gaps:
        now_us += gap
        scripts.at(now_us)
        outcome = scripts.admit("s", program, span=span)
        wait_us = outcome.limits[0].reset_ms * 1000
        if outcome.admitted or cost > capacity:
            continue
        # a millisecond is the unit of the answer, so one before it the cost must not fit
        scripts.at(now_us - now_us % 1000 + wait_us - 1_000)
        if outcome.limits[0].reset_ms > 1:
            assert not scripts.admit("s", program, span=span).admitted
        scripts.at(now_us - now_us % 1000 + wait_us + 1_000)
        assert scripts.admit("s", program, span=span).admitted
        now_us = now_us - now_us % 1000 + wait_us + 1_000


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    limits=limits,
    subjects=st.lists(st.sampled_from("abc"), min_size=2, max_size=24),
    costs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3),
    start=st.sampled_from(STARTS),
)
def test_a_batch_decides_as_its_checks_one_by_one(
    scripts: Scripts,
    limits: list[Limit],
    subjects: list[str],
    costs: list[tuple[int, int]],
    start: int,
) -> None:
    plan = plan_of(*limits)
    calendars = calendar_use([plan])
    programs = [
        compile_program(plan, {"requests": a, "credits": b}, METERS, calendars) for a, b in costs
    ]
    checks = [(name, programs[at % len(programs)]) for at, name in enumerate(subjects)]
    baseline = {f"q:{m}:{kind}": "0 0 0" for m, kinds in calendars.items() for kind in kinds}

    def run(batched: bool) -> tuple[object, ...]:
        scripts.redis.flushdb()
        scripts.at(start * 1000)
        for name in "abc":
            scripts.seed(name, baseline)
        leases = [f"lease-{at}" for at in range(len(checks))]
        if batched:
            outcomes = scripts.batch(checks, leases=leases)
        else:
            outcomes = [
                scripts.admit(name, program, lease=lease)
                for (name, program), lease in zip(checks, leases, strict=True)
            ]
        return outcomes, [scripts.state(name) for name in "abc"], scripts.events()

    assert run(batched=True) == run(batched=False)
