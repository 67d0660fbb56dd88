"""What is tried again, how often and after how long."""

from __future__ import annotations

from typing import Any

import pytest

from core.upstream import Retries
from gateway.http.errors import BadRequest, ClientDisconnected, ExchangeError
from gateway.proxy.errors import (
    BadUpstreamResponse,
    BreakerOpen,
    ConnectError,
    ConnectTimeout,
    PoolExhausted,
    ResponseTimeout,
    TlsFailed,
    UpstreamClosed,
)
from gateway.proxy.retry import RetryBudget, RetryPolicy


class World:
    def __init__(self, **rule: Any) -> None:
        self.now = 0.0
        self.causes: list[str] = []
        self.asked: list[tuple[float, float]] = []
        self.policy = RetryPolicy(
            Retries(**{"attempts": 3, "floor": 100, **rule}),
            on_retry=self.causes.append,
            now=lambda: self.now,
            uniform=self._longest,
        )

    def _longest(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return high

    def error(self, error: ExchangeError, *, safe: bool, sent: bool, attempt: int = 1) -> bool:
        return self.policy.after_error(error, attempt, safe=safe, sent=sent) >= 0


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConnectError("x"), "connect"),
        (ConnectTimeout("x"), "connect"),
        (TlsFailed("x"), "connect"),
        (UpstreamClosed("x"), "reset"),
        (ResponseTimeout("x"), "timeout"),
    ],
)
def test_what_failed_is_tried_again_where_that_is_safe(error: ExchangeError, cause: str) -> None:
    world = World(per_try_ms=100)
    assert world.error(error, safe=True, sent=True)
    assert world.error(error, safe=False, sent=False), "the upstream saw no byte"
    assert not world.error(error, safe=False, sent=True)
    assert world.causes == [cause, cause]


@pytest.mark.parametrize(
    "error",
    [
        PoolExhausted("x"),
        BreakerOpen("x", 1.0),
        BadUpstreamResponse("x"),
        ClientDisconnected("x"),
        BadRequest("x"),
    ],
)
def test_what_would_make_it_worse_or_does_not_help_is_not(error: ExchangeError) -> None:
    assert not World().error(error, safe=True, sent=False)


def test_a_time_out_is_only_tried_again_when_a_try_has_its_own() -> None:
    assert not World().error(ResponseTimeout("x"), safe=True, sent=True)


def test_only_the_causes_and_statuses_named() -> None:
    world = World(causes=frozenset({"reset"}), statuses=frozenset({503}))
    assert not world.error(ConnectError("x"), safe=True, sent=False)
    assert world.error(UpstreamClosed("x"), safe=True, sent=True)
    assert world.policy.after_status(503, 1, safe=True) >= 0
    assert world.policy.after_status(502, 1, safe=True) < 0
    assert world.policy.after_status(503, 1, safe=False) < 0


def test_attempts_count_the_first() -> None:
    world = World(attempts=2)
    assert world.error(ConnectError("x"), safe=True, sent=False, attempt=1)
    assert not world.error(ConnectError("x"), safe=True, sent=False, attempt=2)


def test_the_wait_doubles_at_random_and_has_an_end() -> None:
    world = World(attempts=10, backoff_ms=100)
    waits = [
        world.policy.after_error(ConnectError("x"), n, safe=True, sent=False) for n in range(1, 9)
    ]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0])
    assert {low for low, _ in world.asked} == {0.0}


def test_the_budget_is_a_share_of_the_requests_and_a_floor() -> None:
    now = 0.0
    budget = RetryBudget(20, 2, now=lambda: now)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(10):
        budget.request()
    assert [budget.take() for _ in range(3)] == [True, True, False]
    now = 1.5
    assert [budget.take() for _ in range(4)] == [True, True, True, False]


def test_the_budget_saves_up_only_so_much() -> None:
    now = 0.0
    budget = RetryBudget(50, 1, now=lambda: now)
    for _ in range(10_000):
        budget.request()
    now = 10_000.0
    taken = 0
    while budget.take():
        taken += 1
    assert taken == 60


def test_a_refused_retry_is_said_and_costs_nothing() -> None:
    world = World(floor=0, percent=100)
    assert not world.error(ConnectError("x"), safe=True, sent=False)
    world.policy.request()
    assert world.error(ConnectError("x"), safe=True, sent=False)
    assert world.causes == ["budget", "connect"]
