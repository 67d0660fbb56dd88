"""The circuit breaker, on a clock of the test's own."""

from __future__ import annotations

import pytest

from core.upstream import Breaker
from gateway.proxy.breaker import CircuitBreaker, State
from gateway.proxy.errors import BreakerOpen


class World:
    def __init__(self, **rule: int) -> None:
        self.now = 100.0
        self.changes: list[State] = []
        defaults = {"errors": 50, "window_ms": 10_000, "minimum": 4, "open_ms": 5_000, "probes": 2}
        self.breaker = CircuitBreaker(
            "api",
            Breaker(**{**defaults, **rule}),
            now=lambda: self.now,
            on_change=self.changes.append,
        )

    def tries(self, *verdicts: bool | None) -> None:
        for ok in verdicts:
            self.breaker.settle(self.breaker.admit(), ok)

    def broken(self) -> World:
        self.tries(False, False, False, False)
        assert self.breaker.state is State.OPEN
        return self


def test_it_opens_at_its_share_of_failures_and_not_below_its_minimum() -> None:
    few = World()
    few.tries(False, False, False)
    assert few.breaker.state is State.CLOSED
    below = World()
    below.tries(True, True, True, False, False)
    assert below.breaker.state is State.CLOSED
    below.tries(False)
    assert below.breaker.state is State.OPEN
    assert below.changes == [State.OPEN]


def test_what_says_nothing_does_not_count() -> None:
    world = World()
    world.tries(None, None, None, False, False, False)
    assert world.breaker.state is State.CLOSED


def test_old_failures_leave_the_window() -> None:
    world = World()
    world.tries(False, False, False)
    world.now += 10.5
    world.tries(False)
    assert world.breaker.state is State.CLOSED
    world.tries(False, False, False)
    assert world.breaker.state is State.OPEN


def test_an_open_one_says_how_long_it_refuses() -> None:
    world = World().broken()
    world.now += 2
    with pytest.raises(BreakerOpen) as caught:
        world.breaker.admit()
    assert caught.value.retry_after_s == pytest.approx(3)
    with pytest.raises(BreakerOpen):
        world.breaker.check()


def test_it_lets_so_many_probes_through_and_closes_when_all_succeed() -> None:
    world = World().broken()
    world.now += 5
    world.breaker.check()
    assert world.breaker.state is State.OPEN, "asking takes no probe's place"
    first, second = world.breaker.admit(), world.breaker.admit()
    with pytest.raises(BreakerOpen):
        world.breaker.admit()
    world.breaker.settle(first, True)
    with pytest.raises(BreakerOpen):
        world.breaker.admit()
    world.breaker.settle(second, True)
    assert world.changes == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    world.tries(True, False)
    assert world.breaker.state is State.CLOSED, "counted anew"


def test_one_failed_probe_opens_it_again() -> None:
    world = World().broken()
    world.now += 5
    world.tries(True, False)
    assert world.changes == [State.OPEN, State.HALF_OPEN, State.OPEN]
    with pytest.raises(BreakerOpen) as caught:
        world.breaker.admit()
    assert caught.value.retry_after_s == pytest.approx(5)


def test_a_probe_whose_client_left_gives_its_place_back() -> None:
    world = World(probes=1).broken()
    world.now += 5
    world.tries(None)
    world.tries(True)
    assert world.breaker.state is State.CLOSED


def test_a_try_from_before_says_nothing_about_now() -> None:
    world = World()
    early = world.breaker.admit()
    world.broken()
    world.now += 5
    probe = world.breaker.admit()
    world.breaker.settle(early, False)
    assert world.breaker.state is State.HALF_OPEN
    world.breaker.settle(probe, True)
    world.tries(True)
    assert world.breaker.state is State.CLOSED
