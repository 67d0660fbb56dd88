"""A repeated refusal says what the first one said, as long as that is true."""

from __future__ import annotations

import pytest

from core.policy import FixedWindow, Gcra, Plan
from gateway.answers import problems
from gateway.answers.headers import SERVER, PlanHeaders
from gateway.answers.repeat import RepeatedRefusal, holds_s
from gateway.answers.verdict import LimitState, policy_of

PLAN = Plan(
    "p",
    (FixedWindow("w", "requests", 5, 60_000), Gcra("r", "requests", 1, 1_000_000, 1)),
)


def states(reset_ms: int, other_ms: int = 0) -> list[LimitState]:
    first, second = (policy_of(limit, {}) for limit in PLAN.limits)
    return [
        LimitState(*first.static, 0, reset_ms, allowed=False),
        LimitState(*second.static, 1, other_ms),
    ]


@pytest.mark.parametrize("request_id", ["req_1", 'a "quoted\\ one', "@decision@"])
def test_the_same_answer_with_other_ids(request_id: str) -> None:
    refused = states(42_300)
    limit_headers = PlanHeaders(PLAN, {}).of(refused)
    answer = RepeatedRefusal(refused, limit_headers)
    expected = problems.quota_exceeded(
        refused, request_id=request_id, decision_id="dec_1", limit_headers=limit_headers
    )
    assert answer.body(request_id, "dec_1") == expected.body
    assert answer.headers == [*expected.headers, SERVER]
    assert (answer.names, answer.reasons) == ("w", 1)


@pytest.mark.parametrize(
    ("reset_ms", "other_ms", "seconds"),
    [(42_300, 0, 0.3), (42_000, 0, 1.0), (42_001, 0, 0.001), (500, 0, 0.5), (42_300, 10, 0.01)],
)
def test_it_holds_until_a_whole_second_has_passed(
    reset_ms: int, other_ms: int, seconds: float
) -> None:
    assert holds_s(states(reset_ms, other_ms)) == pytest.approx(seconds)
