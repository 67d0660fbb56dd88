"""Headers of a decision: their syntax, which limit they describe, and how numbers are rounded."""

from __future__ import annotations

import random
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.policy import (
    Action,
    Concurrency,
    FixedWindow,
    Gcra,
    Meter,
    PeriodKind,
    Plan,
    Quota,
    SlidingWindow,
)
from gateway.answers.headers import Headers, PlanHeaders, headline, retry_after_s, sf_string
from gateway.answers.verdict import LimitState, policy_of
from tests.unit.answers.structured import Token, parse_list

PLAN = Plan(
    "pro",
    (
        Gcra("per_second", "requests", 10, 1_000_000, 20),
        SlidingWindow("per_day", "requests", 1_000, 86_400_000),
        Quota("monthly", "requests", 10_000, PeriodKind.BILLING, Action.OVERAGE),
        Concurrency("in_flight", 50),
    ),
)


def states(headers: PlanHeaders, *values: dict[str, object]) -> list[LimitState]:
    defaults = {"remaining": 10**9, "reset_ms": 0}
    return [
        LimitState(*policy.static, **{**defaults, **value})  # type: ignore[arg-type]
        for policy, value in zip(headers.policies, values, strict=True)
    ]


def as_dict(headers: Headers) -> dict[str, bytes]:
    found = {name.decode(): value for name, value in headers}
    assert len(found) == len(headers), "a header twice"
    assert all(name == name.lower() for name in found)
    return found


def test_policy_lists_every_limit_with_quota_unit_and_window() -> None:
    headers = as_dict(PlanHeaders(PLAN, {}).of([]))
    assert parse_list(headers["ratelimit-policy"]) == [
        ("per_second", {"q": 20, "w": 2}),
        ("per_day", {"q": 1000, "w": 86400}),
        ("monthly", {"q": 10000}),
        ("in_flight", {"q": 50, "qu": "concurrent-requests"}),
    ]
    assert list(headers) == ["ratelimit-policy"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (Gcra("r", "requests", 1, 60_000_000, 1), {"q": 1, "w": 60}),
        (Gcra("r", "requests", 3, 1_000_000, 10), {"q": 10, "w": 4}),  # 3.33 s, rounded up
        (Gcra("r", "requests", 1000, 1_000_000, 1), {"q": 1, "w": 1}),  # never w=0
        (FixedWindow("r", "requests", 5, 1_500), {"q": 5, "w": 2}),
        (FixedWindow("r", "requests", 0, 1_000), {"q": 0, "w": 1}),
        (Quota("r", "requests", 7, PeriodKind.DAY), {"q": 7, "w": 86_400}),
        (Quota("r", "requests", 7, PeriodKind.WEEK), {"q": 7, "w": 604_800}),
        (Quota("r", "requests", 7, PeriodKind.MONTH), {"q": 7}),
        (Quota("r", "requests", 7, PeriodKind.YEAR), {"q": 7}),
        (Quota("r", "tokens", 1_050, PeriodKind.MONTH), {"q": 10, "tallygate-unit": "token"}),
    ],
)
def test_each_kind_of_limit_as_a_policy_item(limit: object, expected: dict[str, object]) -> None:
    meters = {"tokens": Meter("tokens", unit="token", decimals=2)}
    plan = Plan("p", (limit,))  # type: ignore[arg-type]
    headers = as_dict(PlanHeaders(plan, meters).of([]))
    assert parse_list(headers["ratelimit-policy"]) == [("r", expected)]


def test_the_limit_nearest_exhaustion_is_described() -> None:
    compiled = PlanHeaders(PLAN, {})
    given_states = states(
        compiled,
        {"remaining": 19, "reset_ms": 100},
        {"remaining": 400, "reset_ms": 36_000_001},
        {"remaining": 9_000, "reset_ms": 1},
        {"remaining": 49},
    )
    headers = as_dict(compiled.of(given_states))
    assert parse_list(headers["ratelimit"]) == [("per_day", {"r": 400, "t": 36_001})]
    assert headers["x-ratelimit-limit"] == b"1000"
    assert headers["x-ratelimit-remaining"] == b"400"
    assert headers["x-ratelimit-reset"] == b"36001"
    assert "retry-after" not in headers


def test_a_concurrency_limit_has_no_reset_time() -> None:
    compiled = PlanHeaders(Plan("slots", (Concurrency("in_flight", 50),)), {})
    headers = as_dict(compiled.of(states(compiled, {"remaining": 1})))
    assert parse_list(headers["ratelimit"]) == [("in_flight", {"r": 1})]


def test_free_slots_are_not_told_where_something_is_used_up() -> None:
    compiled = PlanHeaders(PLAN, {})
    given_states = states(
        compiled, {"remaining": 20}, {"remaining": 900}, {"remaining": 9_999}, {"remaining": 1}
    )
    headers = as_dict(compiled.of(given_states))
    assert parse_list(headers["ratelimit"]) == [("per_day", {"r": 900, "t": 0})]


def test_a_refusal_names_the_limit_that_refuses_longest_and_retry_after_covers_all() -> None:
    compiled = PlanHeaders(PLAN, {})
    given_states = states(
        compiled,
        {"remaining": 0, "reset_ms": 40, "allowed": False},
        {"remaining": 2, "reset_ms": 5_400_500, "allowed": False},
        {"remaining": 0, "reset_ms": 9_999_999},  # exhausted by this very cost, but not refusing
        {"remaining": 50},
    )
    headers = as_dict(compiled.of(given_states))
    [(name, parameters)] = parse_list(headers["ratelimit"])
    assert (name, parameters) == ("per_day", {"r": 2, "t": 5401})
    assert headers["retry-after"] == b"5401"
    assert retry_after_s(given_states) == 5401
    assert headline(given_states).name == "per_day"


def test_retry_after_is_at_least_a_second() -> None:
    compiled = PlanHeaders(PLAN, {})
    given_states = states(compiled, {}, {}, {}, {"remaining": 0, "allowed": False})
    headers = as_dict(compiled.of(given_states))
    assert headers["retry-after"] == b"1"
    assert headers["x-ratelimit-reset"] == b"1"


def test_overage_warning_and_shadow_are_told() -> None:
    plan = Plan(
        "p",
        (
            Quota("monthly", "requests", 10_000, PeriodKind.MONTH, Action.WARN),
            Quota("daily", "requests", 500, PeriodKind.DAY, Action.OVERAGE),
            FixedWindow("per_day", "requests", 5, 86_400_000, enforce=False),
            FixedWindow("2nd hour", "requests", 5, 3_600_000, enforce=False),
        ),
    )
    compiled = PlanHeaders(plan, {})
    given_states = states(
        compiled,
        {"remaining": -1, "warned": True},
        {"remaining": -30, "overage": True},
        {"remaining": 0, "shadow_refused": True},
        {"remaining": 0, "shadow_refused": True},
    )
    headers = as_dict(compiled.of(given_states))
    [(warned, parameters)] = parse_list(headers["x-tallygate-warning"])
    assert (warned, parameters) == (Token("monthly"), {"used": 10_001, "limit": 10_000})
    assert isinstance(warned, Token)
    assert headers["x-tallygate-warning"] == b"monthly;used=10001;limit=10000"
    assert headers["x-tallygate-overage"] == b"daily"
    assert parse_list(headers["x-tallygate-shadow"]) == [("per_day", {}), ("2nd hour", {})]
    # A quota that is passed has nothing left, never less; shadow limits are not mentioned.
    assert parse_list(headers["ratelimit"]) == [("daily", {"r": 0, "t": 0})]
    assert [item[0] for item in parse_list(headers["ratelimit-policy"])] == ["monthly", "daily"]


def test_a_plan_of_shadow_limits_only_advertises_nothing() -> None:
    plan = Plan("p", (FixedWindow("d", "requests", 5, 1_000, enforce=False),))
    compiled = PlanHeaders(plan, {})
    given_states = states(compiled, {"remaining": 0, "shadow_refused": True})
    assert compiled.of(given_states) == [(b"x-tallygate-shadow", b"d")]


@pytest.mark.parametrize(
    ("ratelimit", "legacy", "expected"),
    [
        (True, True, {"ratelimit-policy", "ratelimit", "retry-after", "x-ratelimit-limit",
                      "x-ratelimit-remaining", "x-ratelimit-reset"}),
        (True, False, {"ratelimit-policy", "ratelimit", "retry-after"}),
        (False, True, {"retry-after", "x-ratelimit-limit", "x-ratelimit-remaining",
                       "x-ratelimit-reset"}),
        (False, False, {"retry-after"}),
    ],
)  # fmt: skip
def test_both_families_can_be_switched_off(
    ratelimit: bool, legacy: bool, expected: set[str]
) -> None:
    compiled = PlanHeaders(PLAN, {}, ratelimit=ratelimit, legacy=legacy)
    given_states = states(compiled, {"remaining": 0, "reset_ms": 1, "allowed": False}, {}, {}, {})
    assert set(as_dict(compiled.of(given_states))) == expected


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "per cent %d", "comma, semi;colon"])
def test_awkward_names_survive_quoting(name: str) -> None:
    plan = Plan("p", (FixedWindow(name, "requests", 5, 1_000),))
    compiled = PlanHeaders(plan, {})
    headers = as_dict(compiled.of(states(compiled, {"remaining": 3, "overage": True})))
    assert parse_list(headers["ratelimit-policy"])[0][0] == name
    assert parse_list(headers["ratelimit"]) == [(name, {"r": 3, "t": 0})]
    assert parse_list(headers["x-tallygate-overage"]) == [(name, {})]


@pytest.mark.parametrize("name", ["tagesübersicht", "line\nbreak", "tab\t", "\x7f"])
def test_a_name_a_header_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        sf_string(name)


def test_quantities_of_a_scaled_meter_are_whole_units_rounded_down() -> None:
    meter = Meter("gb", unit="GB", decimals=3)
    policy = policy_of(Quota("q", "gb", meter.to_units(Decimal("2.5")), PeriodKind.MONTH),
                       {"gb": meter})  # fmt: skip
    assert policy.static[2] == 2
    assert 1_999 // policy.divisor == 1


@given(seed=st.integers(0, 2**32), switches=st.tuples(st.booleans(), st.booleans()))
def test_any_decision_gives_parseable_headers_that_agree(
    seed: int, switches: tuple[bool, bool]
) -> None:
    rng = random.Random(seed)
    compiled = PlanHeaders(PLAN, {}, ratelimit=switches[0], legacy=switches[1])
    given_states = [
        LimitState(
            *policy.static,
            remaining=rng.choice([-5, 0, 1, policy.static[2] // 2, policy.static[2]]),
            reset_ms=rng.choice([0, 1, 999, 1000, 1001, 10**9]),
            allowed=rng.random() < 0.7,
            overage=rng.random() < 0.2,
            warned=rng.random() < 0.2,
            shadow_refused=rng.random() < 0.2,
        )
        for policy in compiled.policies
    ]
    headers = as_dict(compiled.of(given_states))
    refused = [state for state in given_states if not state.allowed]
    for name, value in headers.items():
        if name.startswith(("ratelimit", "x-tallygate")):
            assert parse_list(value)
        else:
            assert value.isdigit()
    assert ("retry-after" in headers) == bool(refused)
    if refused:
        wait_s = int(headers["retry-after"])
        assert wait_s * 1000 >= max(state.reset_ms for state in refused)
        assert wait_s >= 1
    if "ratelimit" in headers:
        [(name, parameters)] = parse_list(headers["ratelimit"])
        by_name = {state.name: state for state in given_states}
        described = by_name[str(name)]
        r = parameters["r"]
        assert isinstance(r, int)
        assert r == max(0, described.remaining)
        if refused:
            assert not described.allowed
            assert int(headers["retry-after"]) >= int(parameters.get("t", 0))
        else:
            assert described.kind != "concurrency"
            ratios = [s.remaining / s.limit for s in given_states if s.kind != "concurrency"]
            assert described.remaining / described.limit == min(ratios)


@given(
    st.lists(
        st.tuples(st.integers(-5, 10**6), st.integers(0, 10**8), st.booleans()),
        min_size=5,
        max_size=5,
    ),
    st.booleans(),
    st.booleans(),
    st.sets(st.integers(0, 4)),
)
def test_the_short_way_says_what_the_long_way_says(
    rows: list[tuple[int, int, bool]], ratelimit: bool, legacy: bool, chosen: set[int]
) -> None:
    meters = {"credits": Meter("credits", unit="credit", decimals=2)}
    limits = (*PLAN.limits, Quota("credits", "credits", 50_000, PeriodKind.DAY))
    enforced = tuple(
        replace(limit, enforce=row[2]) for limit, row in zip(limits, rows, strict=True)
    )
    headers = PlanHeaders(Plan("pro", enforced), meters, ratelimit=ratelimit, legacy=legacy)
    asked = sorted(chosen)  # a route asks those limits whose meters it costs
    policies = [headers.policies[n] for n in asked]
    numbers: list[int] = [1_700_000_000_000, 0]
    for n in asked:
        numbers += (0, rows[n][0], rows[n][1])
    expected = headers.of(
        [
            LimitState(*p.static, rows[n][0] // p.divisor, rows[n][1])
            for n, p in zip(asked, policies, strict=True)
        ]
    )
    assert headers.plain(policies)(numbers) == expected
