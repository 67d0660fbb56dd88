"""`outage: local` against the plain-Python model of the Lua scripts, and its bounds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.admission.program import REFUSED, Verdict
from core.clock import from_datetime
from core.period import DAY_MS, HOUR_MS, billing_period, calendar_period
from core.policy import (
    Action,
    Aggregation,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    PeriodKind,
    Quota,
    SlidingWindow,
)
from gateway.outage.local import LocalDecision, LocalFull, LocalLimiter, compile_local
from tests.property.model import Model

METERS = {
    "requests": Meter("requests"),
    "credits": Meter("credits"),
    "seats": Meter("seats", aggregation=Aggregation.MAX),
}
ANCHOR = from_datetime(datetime(2024, 1, 31, 10, 30, tzinfo=UTC))
NOW = from_datetime(datetime(2026, 2, 27, 23, 59, 30, tzinfo=UTC))

meters = st.sampled_from(["requests", "credits"])
enforce = st.sampled_from([True, True, True, False])
units = st.integers(0, 40)
limit_lists = st.lists(
    st.one_of(
        st.builds(
            lambda meter, rate, period, burst, on: Gcra("rate", meter, rate, period, burst, on),
            meters,
            st.sampled_from([1, 3, 7]),
            st.sampled_from([1_000, 1_000_000, 7_000_000]),
            st.integers(1, 40),
            enforce,
        ),
        st.builds(
            lambda meter, limit, window, on: FixedWindow("fixed", meter, limit, window, on),
            meters,
            units,
            st.sampled_from([1_000, 60_000, DAY_MS]),
            enforce,
        ),
        st.builds(
            lambda meter, limit, window, on: SlidingWindow("sliding", meter, limit, window, on),
            meters,
            units,
            st.sampled_from([1_000, 60_000, HOUR_MS]),
            enforce,
        ),
        st.builds(
            lambda meter, limit, kind, action, on: Quota(
                f"{meter}_{kind}", meter, limit, kind, action, (), on
            ),
            meters,
            units,
            st.sampled_from(list(PeriodKind)),
            st.sampled_from([Action.BLOCK, Action.BLOCK, Action.WARN, Action.OVERAGE]),
            enforce,
        ),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda limit: limit.name,
)
steps = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(0, 3_000), st.integers(0, DAY_MS)),
        st.integers(1, 4),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=60,
)


def shared(limit: Limit, share: int) -> Limit:
    """The limit of a model that has one process's part of it."""
    if isinstance(limit, Gcra):
        return replace(limit, period_us=limit.period_us * share, burst=limit.burst // share)
    return replace(limit, limit=limit.limit // share)


def flags(decision: LocalDecision) -> list[bool]:
    return [flag == REFUSED for flag in decision.numbers[2::3]]


@settings(max_examples=150, deadline=None)
@given(limits=limit_lists, share=st.integers(1, 5), steps=steps)
def test_a_process_decides_as_the_scripts_would_with_its_share(
    limits: list[Limit], share: int, steps: list[tuple[int, int, int]]
) -> None:
    limiter, model, now_ms = LocalLimiter(), Model(), NOW
    parts = [shared(limit, share) for limit in limits]
    for gap, cost, weighted in steps:
        now_ms += gap
        costs = {"requests": cost, "credits": weighted}
        span = billing_period(ANCHOR, 1, now_ms)
        program = compile_local(limits, costs, METERS, share)

        decision = limiter.admit(program, "sub", span, now_ms)

        admitted, full, left = model.check(parts, costs, now_ms * 1000, span)
        assert decision.admitted == admitted
        assert decision.numbers[:2] == [now_ms, Verdict.ADMIT if admitted else Verdict.REJECT]
        assert flags(decision) == full
        assert decision.numbers[3::3] == [max(0, units) for units in left]
        assert all(reset >= 0 for reset in decision.numbers[4::3])


@settings(max_examples=150, deadline=None)
@given(limits=limit_lists, share=st.integers(1, 5), steps=steps)
def test_all_processes_together_stay_within_each_limit(
    limits: list[Limit], share: int, steps: list[tuple[int, int, int]]
) -> None:
    limits = [limit for limit in limits if limit.enforce]
    limiters = [LocalLimiter() for _ in range(share)]
    spent: list[tuple[int, dict[str, int]]] = []
    now_ms = NOW
    for gap, cost, weighted in steps:
        now_ms += gap
        costs = {"requests": cost, "credits": weighted}
        program = compile_local(limits, costs, METERS, share)
        span = billing_period(ANCHOR, 1, now_ms)
        spent += [
            (now_ms, costs)
            for limiter in limiters
            if limiter.admit(program, "sub", span, now_ms).admitted
        ]
    for limit in limits:
        totals: dict[int, int] = {}
        for at, costs in spent:
            if isinstance(limit, FixedWindow):
                start = at - at % limit.window_ms
            elif isinstance(limit, Quota) and limit.action is Action.BLOCK:
                billing = limit.period is PeriodKind.BILLING
                start = (
                    billing_period(ANCHOR, 1, at) if billing else calendar_period(limit.period, at)
                )[0]
            else:
                continue
            totals[start] = totals.get(start, 0) + costs[limit.meter]
            assert totals[start] <= limit.limit // share * share
        if isinstance(limit, Gcra):
            for at, (first, _) in enumerate(spent):
                used = 0
                for when, costs in spent[at:]:
                    used += costs[limit.meter]
                    drained = (when - first) * 1000 * limit.rate
                    assert used * limit.period_us <= limit.burst * limit.period_us + drained


@settings(max_examples=80, deadline=None)
@given(limits=limit_lists, share=st.integers(1, 3), steps=steps)
def test_a_refusal_says_when_the_request_would_fit(
    limits: list[Limit], share: int, steps: list[tuple[int, int, int]]
) -> None:
    limit = replace(limits[0], enforce=True)
    assert not isinstance(limit, Concurrency)
    capacity = limit.burst if isinstance(limit, Gcra) else limit.limit
    limiter, now_ms = LocalLimiter(), NOW
    for gap, cost, _ in steps:
        now_ms += gap % 3_000
        program = compile_local([limit], {limit.meter: cost}, METERS, share)
        decision = limiter.admit(program, "sub", billing_period(ANCHOR, 1, now_ms), now_ms)
        if decision.admitted or cost > capacity // share:
            continue
        wait = decision.numbers[4]
        early, late = now_ms + wait - 1, now_ms + wait
        if wait > 1:
            span = billing_period(ANCHOR, 1, early)
            assert not limiter.admit(program, "sub", span, early).admitted
        assert limiter.admit(program, "sub", billing_period(ANCHOR, 1, late), late).admitted
        now_ms = late


def test_a_share_of_nothing_gives_out_nothing() -> None:
    limiter = LocalLimiter()
    program = compile_local([FixedWindow("w", "requests", 3, 1_000)], {"requests": 1}, METERS, 4)

    assert not limiter.admit(program, "sub", (0, 0), NOW).admitted
    assert len(limiter) == 0


def test_a_share_below_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        compile_local([], {}, METERS, 0)


def test_a_quota_keeps_its_count_over_outages_and_a_clock_that_goes_back() -> None:
    limiter = LocalLimiter()
    quota = Quota("monthly", "requests", 4, PeriodKind.BILLING)
    program = compile_local([quota], {"requests": 1}, METERS, 2)
    span = billing_period(ANCHOR, 1, NOW)

    admitted = [
        limiter.admit(program, "sub", span, at).admitted
        for at in (NOW, NOW + DAY_MS // 4, NOW + 10, NOW + DAY_MS // 4)
    ]

    assert admitted == [True, True, False, False]
    later = billing_period(ANCHOR, 1, span[1])
    assert limiter.admit(program, "sub", later, span[1]).admitted
    before = span
    assert limiter.admit(program, "sub", before, span[1] - 1).admitted  # the new period's second
    assert not limiter.admit(program, "sub", before, span[1] - 1).admitted


def test_a_billing_period_that_is_over_is_not_counted_in() -> None:
    program = compile_local(
        [Quota("monthly", "requests", 4, PeriodKind.BILLING)], {"requests": 1}, METERS, 2
    )
    start, end = billing_period(ANCHOR, 1, NOW)

    with pytest.raises(ValueError, match="does not hold"):
        LocalLimiter().admit(program, "sub", (start, end), end)


def test_the_maximum_of_a_meter_is_not_divided() -> None:
    limiter = LocalLimiter()
    quota = Quota("seats", "seats", 10, PeriodKind.MONTH)

    def admit(cost: int) -> bool:
        program = compile_local([quota], {"seats": cost}, METERS, 4)
        return limiter.admit(program, "sub", (0, 0), NOW).admitted

    assert [admit(cost) for cost in (10, 9, 11, 10)] == [True, True, False, True]


def test_a_refused_request_burns_nothing() -> None:
    limiter = LocalLimiter()
    limits = [
        FixedWindow("window", "requests", 100, DAY_MS),
        Concurrency("in_flight", 1),
        Quota("monthly", "credits", 1, PeriodKind.MONTH),
    ]
    program = compile_local(limits, {"requests": 1, "credits": 1}, METERS, 1)
    first = limiter.admit(program, "sub", (0, 0), NOW)
    assert first.slots is not None
    limiter.release(first.slots)

    refused = limiter.admit(program, "sub", (0, 0), NOW)

    assert not refused.admitted
    assert flags(refused) == [False, False, True]
    assert refused.numbers[3::3] == [99, 1, 0]
    assert limiter.admit(program, "sub", (0, 0), NOW).numbers[3::3] == [99, 1, 0]


def test_slots_are_given_back_once() -> None:
    limiter = LocalLimiter()
    program = compile_local([Concurrency("in_flight", 5)], {"requests": 1}, METERS, 2)
    first = limiter.admit(program, "sub", (0, 0), NOW)
    second = limiter.admit(program, "sub", (0, 0), NOW)
    assert first.slots is not None
    assert second.slots is not None
    assert not limiter.admit(program, "sub", (0, 0), NOW + HOUR_MS).admitted

    limiter.release(first.slots)
    limiter.release(first.slots)

    assert limiter.admit(program, "sub", (0, 0), NOW).admitted
    assert not limiter.admit(program, "sub", (0, 0), NOW).admitted


def test_a_full_table_turns_new_subjects_away_and_forgets_none_that_counts() -> None:
    limiter = LocalLimiter(max_subjects=2)
    window = compile_local([FixedWindow("w", "requests", 1, 60_000)], {"requests": 1}, METERS, 1)
    flight = compile_local([Concurrency("c", 1)], {"requests": 1}, METERS, 1)
    shadow = compile_local(
        [
            FixedWindow("w", "requests", 1, 60_000, enforce=False),
            Concurrency("c", 1, enforce=False),
        ],
        {"requests": 1},
        METERS,
        1,
    )
    held = limiter.admit(flight, "flying", (0, 0), NOW).slots
    assert limiter.admit(window, "a", (0, 0), NOW).admitted

    with pytest.raises(LocalFull):
        limiter.admit(window, "b", (0, 0), NOW)
    assert limiter.turned_away == 1
    assert not limiter.admit(window, "a", (0, 0), NOW).admitted
    unremembered = limiter.admit(shadow, "b", (0, 0), NOW)
    assert unremembered.admitted
    assert unremembered.slots is None

    # a's window has ended, so it can go; what is in flight cannot
    assert limiter.admit(window, "b", (0, 0), NOW + 60_000).admitted
    assert not limiter.admit(flight, "flying", (0, 0), NOW + 60_000).admitted
    with pytest.raises(LocalFull):
        limiter.admit(window, "a", (0, 0), NOW + 60_000)
    assert held is not None
    limiter.release(held)
    assert limiter.admit(window, "a", (0, 0), NOW + 60_000).admitted
    assert len(limiter) == 2
