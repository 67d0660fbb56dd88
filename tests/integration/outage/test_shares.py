"""`outage: local` in several processes at once: together they never pass a limit."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier

import pytest

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
from gateway.outage.local import LocalLimiter, compile_local

PROCESSES = 3
NOW = 1_790_000_000_000
SPAN = (NOW - 1_000_000, NOW + 1_000_000)
METERS = {"requests": Meter("requests"), "credits": Meter("credits")}
LIMITS: list[tuple[Limit, int]] = [
    (Gcra("rate", "requests", 5, 1_000_000, 100), 100),
    (FixedWindow("window", "requests", 50, 60_000), 50),
    (SlidingWindow("sliding", "requests", 20, 60_000), 20),
    (Quota("monthly", "credits", 1_000, PeriodKind.BILLING), 1_000 // 7),
    (Quota("daily", "requests", 2, PeriodKind.DAY), 2),
    (Concurrency("in_flight", 10), 10),
]


start: Barrier


def together(barrier: Barrier) -> None:
    global start
    start = barrier


def hammer(limits: tuple[Limit, ...]) -> list[int]:
    """Admitted requests of each subject, three times as many being asked for as a limit has."""
    limiter = LocalLimiter()
    program = compile_local(limits, {"requests": 1, "credits": 7}, METERS, PROCESSES)
    admitted = [0] * 4
    start.wait(60)
    for at in range(1_200):
        subject = at % len(admitted)
        decision = limiter.admit(program, f"sub-{subject}", SPAN, NOW)
        admitted[subject] += decision.admitted
    return admitted


@pytest.fixture(scope="module")
def totals() -> list[list[int]]:
    """For each limit alone, then all together, the admitted requests of each subject."""
    sets = [(limit,) for limit, _ in LIMITS] + [tuple(limit for limit, _ in LIMITS)]
    context = multiprocessing.get_context("spawn")
    found = []
    with context.Pool(PROCESSES, together, (context.Barrier(PROCESSES),)) as pool:
        for limits in sets:
            work = [pool.apply_async(hammer, (limits,)) for _ in range(PROCESSES)]
            parts = [part.get(120) for part in work]
            found.append([sum(column) for column in zip(*parts, strict=True)])
    return found


@pytest.mark.parametrize("at", range(len(LIMITS)), ids=[limit.name for limit, _ in LIMITS])
def test_processes_give_out_their_shares_and_no_more(totals: list[list[int]], at: int) -> None:
    limit, most = LIMITS[at]
    capacity = limit.burst if isinstance(limit, Gcra) else limit.limit
    cost = 7 if limit.name == "monthly" else 1
    share = capacity // PROCESSES // cost

    assert totals[at] == [share * PROCESSES] * 4
    assert share * PROCESSES <= most


def test_all_limits_together_give_out_what_the_smallest_does(totals: list[list[int]]) -> None:
    assert totals[-1] == [0] * 4  # two a day in three processes: nobody may give one out


def test_actions_that_do_not_refuse_admit_everything() -> None:
    limits = [
        Quota("warned", "requests", 0, PeriodKind.DAY, Action.WARN),
        Quota("billed", "requests", 0, PeriodKind.BILLING, Action.OVERAGE),
        FixedWindow("shadow", "requests", 0, 1_000, enforce=False),
        Concurrency("shadowed", 0, enforce=False),
    ]
    limiter = LocalLimiter()
    program = compile_local(limits, {"requests": 1}, METERS, PROCESSES)

    decisions = [limiter.admit(program, "sub", SPAN, NOW) for _ in range(10)]

    assert all(decision.admitted for decision in decisions)
    assert decisions[-1].numbers[2::3] == [0, 0, 1, 1]  # flags: the shadows would have refused
    assert decisions[-1].slots is None
