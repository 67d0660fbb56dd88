"""Thresholds and exceeded limits reach the table of limit events, once a period and limit."""

from __future__ import annotations

import signal

from tests.support import wait_until
from tests.support.load import Load, get
from tests.support.stack import Stack, Subscriber

WARNINGS = [("monthly", "warning", 80), ("monthly", "warning", 90)]
CRITICAL = [("monthly", "critical", 95), ("monthly", "critical", 100)]
EXCEEDED = [("monthly", "exceeded", 100)]


def _use(stack: Stack, load: Load, who: Subscriber, requests: int) -> None:
    load.run(stack.ports, [get("/api/x", who.key)], connections=8, total=requests)


def test_each_threshold_fires_once_and_a_block_never_exceeds(stack: Stack, load: Load) -> None:
    who = stack.subscribe("quota")
    _use(stack, load, who, 799)
    stack.quiet()
    assert stack.events(who) == []
    _use(stack, load, who, 1)
    stack.quiet()
    assert stack.events(who) == WARNINGS[:1]
    _use(stack, load, who, 500)
    stack.quiet()
    assert stack.events(who) == WARNINGS + CRITICAL


def test_overage_is_reported_once_as_exceeded(stack: Stack, load: Load) -> None:
    assert stack.reconciler is not None
    who = stack.subscribe("over")
    stack.quiet()
    stack.reconciler.signal(signal.SIGSTOP)
    try:
        _use(stack, load, who, 60)
        in_stream = stack.stream(who)
    finally:
        stack.reconciler.signal(signal.SIGCONT)
    # Once in the stream already: the table's uniqueness is not what makes it once.
    assert in_stream == [*WARNINGS, *CRITICAL, ("monthly", "exceeded", 101)]
    stack.quiet()
    assert stack.events(who) == WARNINGS + CRITICAL + EXCEEDED


def test_a_plan_names_its_own_thresholds(stack: Stack, load: Load) -> None:
    who = stack.subscribe("warned")
    _use(stack, load, who, 19)
    stack.quiet()
    assert stack.events(who) == [("monthly", "warning", 50)]
    _use(stack, load, who, 19)
    stack.quiet()
    assert stack.events(who) == [("monthly", "warning", 50), *EXCEEDED]
    assert stack.state(who)["requests"].overage == 0  # only warned of, never billed


def test_a_larger_plan_says_nothing_until_its_own_thresholds(stack: Stack, load: Load) -> None:
    who = stack.subscribe("small")
    _use(stack, load, who, 25)
    stack.quiet()
    assert stack.events(who) == WARNINGS + CRITICAL
    stack.directory("set_plan", who.id, "doubled")
    # 20 of 40 are used: below the larger limit's thresholds, which fire when they are reached.
    for gateway in range(len(stack.ports)):
        wait_until(
            lambda: stack.get("/api/x", who.key, gateway=gateway).status_code == 200,  # noqa: B023
            what="the larger plan",
        )
    stack.quiet()
    assert stack.events(who) == WARNINGS + CRITICAL
    _use(stack, load, who, 60)
    stack.quiet()
    assert stack.events(who) == (WARNINGS + CRITICAL) * 2
