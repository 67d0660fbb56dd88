"""Problem bodies: members, headers, and sentences that say what a customer needs to know."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest

from core.policy import (
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    PeriodKind,
    Plan,
    Quota,
    Status,
)
from gateway.answers import problems
from gateway.answers.headers import PlanHeaders
from gateway.answers.problems import Problem
from gateway.answers.verdict import LimitState, policy_of

RID = "req_01KAM7"

EVERY: dict[str, tuple[Callable[[], Problem], int]] = {
    "missing-key": (lambda: problems.missing_key(request_id=RID), 401),
    "invalid-key": (lambda: problems.invalid_key(request_id=RID), 401),
    "expired-key": (lambda: problems.expired_key(request_id=RID), 401),
    "inactive-key": (lambda: problems.inactive_key(request_id=RID), 403),
    "payment-required": (
        lambda: problems.subscription(Status.PAST_DUE, 402, request_id=RID), 402),
    "subscription-canceled": (
        lambda: problems.subscription(Status.CANCELED, 403, request_id=RID), 403),
    "subscription-paused": (lambda: problems.subscription(Status.PAUSED, 403, request_id=RID), 403),
    "no-plan": (lambda: problems.forbidden("no-plan", "No plan.", request_id=RID), 403),
    "no-route": (lambda: problems.not_found(request_id=RID), 404),
    "method-not-allowed": (
        lambda: problems.method_not_allowed({"PUT", "GET"}, request_id=RID), 405),
    "content-too-large": (lambda: problems.content_too_large(1024, request_id=RID), 413),
    "header-fields-too-large": (lambda: problems.header_fields_too_large(request_id=RID), 431),
    "bad-request": (lambda: problems.bad_request("Both lengths.", request_id=RID), 400),
    "request-timeout": (lambda: problems.request_timeout(request_id=RID), 408),
    "upstream-busy": (lambda: problems.upstream_busy(1, request_id=RID), 503),
    "upstream-unavailable": (
        lambda: problems.upstream_unavailable(5, request_id=RID, code="upstream-resting"), 503),
    "bad-gateway": (lambda: problems.bad_gateway(request_id=RID), 502),
    "gateway-timeout": (lambda: problems.gateway_timeout(30_000, request_id=RID), 504),
    "internal-error": (lambda: problems.internal_error(request_id=RID), 500),
}  # fmt: skip


def check(problem: Problem, status: int) -> tuple[dict[str, str], dict[str, object]]:
    """What every problem has in common; its headers and body."""
    headers = {name.decode(): value.decode() for name, value in problem.headers}
    assert len(headers) == len(problem.headers)
    body = orjson.loads(problem.body)
    assert problem.status == body["status"] == status
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    assert "content-length" not in headers, "the exchange writes it"
    assert body["request_id"] == RID
    assert body["title"]
    assert body["detail"].endswith(".")
    return headers, body


@pytest.mark.parametrize("slug", EVERY)
def test_every_problem_is_complete(slug: str) -> None:
    make, status = EVERY[slug]
    headers, body = check(make(), status)
    assert body["type"] == f"urn:tallygate:problem:{slug}"
    assert ("www-authenticate" in headers) == (status == 401)
    if status == 401:
        assert headers["www-authenticate"].startswith('Bearer realm="api"')


def test_405_names_the_methods_in_allow() -> None:
    headers, body = check(EVERY["method-not-allowed"][0](), 405)
    assert headers["allow"] == "GET, PUT"
    assert body["detail"] == "This path answers to GET, PUT only."


def test_temporary_reduced_capacity_says_when_to_return() -> None:
    problem = problems.temporary_reduced_capacity(0, request_id=RID, policies=["daily"])
    headers, body = check(problem, 503)
    assert headers["retry-after"] == "1"
    assert body["type"] == (
        "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
    )
    assert body["violated-policies"] == ["daily"]
    # Whether it was counted cannot be known: an answer may have been lost on its way.
    assert body["detail"] == (
        "Quota cannot be checked at the moment, so the request was not served. "
        "Try again in 1 second."
    )


def test_a_busy_upstream_says_nothing_about_quotas() -> None:
    headers, body = check(problems.upstream_busy(2, request_id=RID), 503)
    assert headers["retry-after"] == "2"
    assert body["detail"] == "The API behind this gateway is busy. Try again in 2 seconds."


def test_quota_exceeded_says_which_limit_how_much_is_left_and_when_it_resets() -> None:
    plan = Plan(
        "p",
        (
            Gcra("per_second", "requests", 10, 1_000_000, 20),
            Quota("monthly", "requests", 10_000, PeriodKind.MONTH),
            FixedWindow("hourly", "requests", 100, 3_600_000),
        ),
    )
    compiled = PlanHeaders(plan, {})
    per_second, monthly, hourly = compiled.policies
    states = [
        LimitState(*per_second.static, 0, 70, allowed=False),
        LimitState(*monthly.static, 3, 266_399_100, allowed=False),
        LimitState(*hourly.static, 0, 60_000),
    ]
    problem = problems.quota_exceeded(
        states, request_id=RID, decision_id="dec_01", limit_headers=compiled.of(states)
    )
    headers, body = check(problem, 429)
    assert body["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert body["violated-policies"] == ["per_second", "monthly"]
    assert body["decision_id"] == "dec_01"
    assert (body["limit"], body["remaining"], body["reset"]) == (10_000, 3, 266_400)
    assert body["detail"] == (
        'Limit "monthly" allows 10000 requests a period; 3 are left, fewer than this request '
        "costs. It resets in 3 days 2 hours."
    )
    assert headers["retry-after"] == "266400"
    assert headers["ratelimit"] == '"monthly";r=3;t=266400'


def test_quota_exceeded_has_retry_after_even_without_limit_headers() -> None:
    policy = policy_of(FixedWindow("w", "requests", 1, 1_000), {})
    state = LimitState(*policy.static, 0, 1_001, allowed=False)
    headers, _ = check(problems.quota_exceeded([state], request_id=RID, decision_id="d"), 429)
    assert headers["retry-after"] == "2"


@pytest.mark.parametrize(
    ("limit", "remaining", "reset_ms", "detail"),
    [
        (Gcra("r", "requests", 10, 1_000_000, 20), 0, 50,
         'Limit "r" allows 20 requests at once; 0 are left. More is free in 1 second.'),
        (FixedWindow("w", "requests", 1, 60_000), 0, 59_999,
         'Limit "w" allows 1 request in 1 minute; 0 are left. It resets in 1 minute.'),
        (FixedWindow("w", "requests", 5, 5_400_000), 1, 3_601_000,
         ('Limit "w" allows 5 requests in 1 hour 30 minutes; 1 is left, fewer than this request '
         "costs. It resets in 1 hour 1 minute.")),
        (Quota("q", "tokens", 500, PeriodKind.DAY), 0, 86_399_000,
         'Limit "q" allows 500 tokens a day; 0 are left. It resets in 1 day.'),
        (Quota("q", "gb", 5, PeriodKind.WEEK), 0, 3_600_000,
         'Limit "q" allows 5 GB a week; 0 are left. It resets in 1 hour.'),
        (Concurrency("c", 50), 0, 0,
         ('Limit "c" allows 50 requests at the same time and all of its slots are taken. One is '
         "free as soon as an earlier request ends.")),
    ],
)  # fmt: skip
def test_the_sentence_for_each_kind_of_limit(
    limit: Limit, remaining: int, reset_ms: int, detail: str
) -> None:
    meters = {"tokens": Meter("tokens", unit="token"), "gb": Meter("gb", unit="GB")}
    state = LimitState(*policy_of(limit, meters).static, remaining, reset_ms, allowed=False)
    _, body = check(problems.quota_exceeded([state], request_id=RID, decision_id="d"), 429)
    assert body["detail"] == detail
