"""Passive ejection, on a clock and a timer of the test's own."""

from __future__ import annotations

from collections.abc import Callable

from core.upstream import Ejection
from gateway.proxy.eject import Ejector
from gateway.proxy.target import Endpoint, parse_target


class Timer:
    def __init__(self, at: float, call: Callable[[], object]) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class World:
    def __init__(self, failures: int = 3) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.said: list[str] = []
        self.panicking = False
        self.endpoint = Endpoint("http://h", parse_target("http://h"))
        self.ejector = Ejector(
            Ejection(failures=failures, for_ms=10_000, max_ms=30_000),
            call_later=self._later,
            ejected=lambda endpoint, seconds, why: self.said.append(f"out {seconds:g} {why}"),
            returned=lambda endpoint: self.said.append("back"),
            recovered=lambda endpoint: self.said.append("recovered"),
            panicking=lambda: self.panicking,
            now=lambda: self.now,
        )

    def _later(self, seconds: float, call: Callable[[], object]) -> Timer:
        timer = Timer(self.now + seconds, call)
        self.timers.append(timer)
        return timer

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for timer in [t for t in self.timers if t.at <= self.now and not t.cancelled]:
            self.timers.remove(timer)
            timer.call()

    def fail(self, times: int) -> None:
        for _ in range(times):
            self.ejector.failed(self.endpoint, "502")

    def succeed(self) -> None:
        self.ejector.succeeded(self.endpoint)


def test_failures_in_a_row_put_a_target_out_and_a_success_between_them_does_not() -> None:
    world = World()
    world.fail(2)
    world.succeed()
    world.fail(2)
    assert not world.endpoint.ejected
    world.fail(1)
    assert world.endpoint.ejected
    world.fail(5)  # of requests that were under way
    assert world.said == ["out 10 502"]


def test_it_comes_back_on_probation_and_recovers_with_a_success() -> None:
    world = World()
    world.fail(3)
    world.wait(10)
    assert not world.endpoint.ejected
    world.succeed()
    world.succeed()
    assert world.said == ["out 10 502", "back", "recovered"]
    world.fail(2)
    assert not world.endpoint.ejected, "a target like the others"


def test_each_time_again_is_twice_as_long_up_to_the_longest() -> None:
    world = World()
    world.fail(3)
    for seconds in (10, 20, 30):
        world.wait(seconds)
        world.fail(1)
    outs = [text for text in world.said if text.startswith("out")]
    assert outs == ["out 10 502", "out 20 502", "out 30 502", "out 30 502"]


def test_a_good_time_makes_the_past_forgotten() -> None:
    world = World()
    world.fail(3)
    world.wait(10)
    world.fail(1)
    world.wait(20)
    world.succeed()
    world.wait(21)
    world.succeed()
    world.fail(3)
    assert world.said[-1] == "out 10 502"


def test_a_late_answer_does_not_bring_it_back_unless_all_are_out() -> None:
    world = World()
    world.fail(3)
    world.succeed()
    assert world.endpoint.ejected
    world.panicking = True
    world.succeed()
    assert not world.endpoint.ejected
    assert world.said[1:] == ["back", "recovered"]
    assert world.timers[0].cancelled


def test_nothing_is_left_when_it_is_closed() -> None:
    world = World()
    world.fail(3)
    world.ejector.close()
    assert all(timer.cancelled for timer in world.timers)
