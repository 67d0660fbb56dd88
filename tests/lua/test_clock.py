"""Time that does not simply go on: a clock set back, a billing anchor or interval moved."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from core.admission.program import compile_program
from core.clock import from_datetime
from core.period import DAY_MS, HOUR_MS, billing_period
from core.policy import FixedWindow, Gcra, Meter, PeriodKind, Quota, SlidingWindow
from tests.support.scripts import Scripts, plan_of

METERS = {"requests": Meter("requests")}
NOW_MS = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))


@pytest.fixture
def scripts(any_redis_url: str) -> Scripts:
    scripts = Scripts(any_redis_url)
    scripts.at(NOW_MS * 1000)
    return scripts


@pytest.mark.parametrize("back_ms", [1, 61_000, HOUR_MS, 20 * HOUR_MS])
def test_a_clock_set_back_gives_nothing_away(scripts: Scripts, back_ms: int) -> None:
    plan = plan_of(
        Gcra("rate", "requests", 1, 1_000_000, 10),
        FixedWindow("fixed", "requests", 10, 60_000),
        SlidingWindow("sliding", "requests", 10, 60_000),
        Quota("daily", "requests", 10, PeriodKind.DAY),
        Quota("monthly", "requests", 10, PeriodKind.BILLING),
    )
    program = compile_program(plan, {"requests": 1}, METERS, {"requests": (PeriodKind.DAY,)})
    span = (0, 2**42)
    scripts.seed("s", {"q:requests:day": "0 0 0"})
    for _ in range(6):
        assert scripts.admit("s", program, span=span).admitted
    before = scripts.state("s")
    scripts.at((NOW_MS - back_ms) * 1000)
    for number in range(4):
        outcome = scripts.admit("s", program, span=span)
        assert outcome.admitted
        left = [answer.remaining for answer in outcome.limits]
        assert left == [3 - number] * 5
    assert not scripts.admit("s", program, span=span).admitted
    state = scripts.state("s")
    assert state["p:requests"] == before["p:requests"]
    assert state["m:requests"] == "10 0 10 0 10"
    # and forward again: everything goes on where it was
    scripts.at((NOW_MS + HOUR_MS) * 1000)
    outcome = scripts.admit("s", program, span=span)
    assert [answer.remaining for answer in outcome.limits] == [10, 10, 10, 0, 0]
    assert not outcome.admitted
    assert outcome.limits[0].flags == outcome.limits[1].flags == 0


def totals(scripts: Scripts) -> dict[tuple[int, int], int]:
    """Total by billing period, closed ones and the current."""
    state = scripts.state("s")
    start, end, _ = map(int, state["p:requests"].split())
    found = {(start, end): int(state["m:requests"].split()[0])}
    for name, text in state.items():
        if name.startswith("cp:requests:"):
            end, total, _ = map(int, text.split())
            found[int(name.rsplit(":", 1)[1]), end] = total
    return found


def test_an_interval_that_grows_keeps_the_period_until_its_end(scripts: Scripts) -> None:
    """Monthly to yearly: the caller's period began before the one that is recorded."""
    anchor = from_datetime(datetime(2026, 1, 10, tzinfo=UTC))
    plan = plan_of(Quota("quota", "requests", 10, PeriodKind.BILLING))
    program = compile_program(plan, {"requests": 1}, METERS, {})
    month = billing_period(anchor, 1, NOW_MS)
    year = billing_period(anchor, 12, NOW_MS)
    scripts.seed("s")
    for _ in range(3):
        scripts.admit("s", program, span=month)
    outcome = scripts.admit("s", program, span=year)
    assert (outcome.limits[0].remaining, totals(scripts)) == (6, {month: 4})
    assert outcome.limits[0].reset_ms == month[1] - NOW_MS
    # once it is over, the next one goes from there to the end of the caller's
    for number in range(3):
        scripts.at((month[1] + number * 40 * DAY_MS) * 1000)
        outcome = scripts.admit("s", program, span=year)
        assert outcome.limits[0].remaining == 9 - number
        assert outcome.limits[0].reset_ms == year[1] - scripts.now_ms
    assert totals(scripts) == {month: 4, (month[1], year[1]): 3}
    # and from then on the caller's own
    scripts.at(year[1] * 1000)
    after = billing_period(anchor, 12, year[1])
    assert scripts.admit("s", program, span=after).limits[0].remaining == 9
    assert totals(scripts)[after] == 1
    assert sum(totals(scripts).values()) == 8
    hours = [int(text.split()[0]) for name, text in scripts.state("s").items() if name[:3] == "ch:"]
    assert sum(hours) == 7


def test_an_anchor_moved_forward_starts_a_new_period(scripts: Scripts) -> None:
    plan = plan_of(Quota("quota", "requests", 10, PeriodKind.BILLING))
    program = compile_program(plan, {"requests": 1}, METERS, {})
    old = billing_period(0, 1, NOW_MS)
    new = billing_period(NOW_MS - DAY_MS, 1, NOW_MS)
    scripts.seed("s")
    scripts.admit("s", program, span=old)
    assert scripts.admit("s", program, span=new).limits[0].remaining == 9
    # a gateway that still holds the old anchor counts into the new period
    assert scripts.admit("s", program, span=old).limits[0].remaining == 8
    assert totals(scripts) == {old: 1, new: 2}
