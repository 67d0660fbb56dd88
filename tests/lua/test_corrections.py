"""A cost that is corrected may pass a quota when no request would be admitted to tell of it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from core.admission.program import Program, compile_program
from core.clock import from_datetime
from core.period import billing_period, calendar_bounds
from core.policy import Action, Meter, PeriodKind, Quota
from tests.support.scripts import Scripts, plan_of

METERS = {"requests": Meter("requests"), "tokens": Meter("tokens")}
NOW_MS = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
SPAN = billing_period(0, 1, NOW_MS)
DAY = PeriodKind.DAY
PLAN = plan_of(
    Quota("monthly", "tokens", 100, PeriodKind.BILLING, thresholds=(50, 100)),
    Quota("daily", "tokens", 90, DAY, Action.WARN, thresholds=(50,)),
    Quota("shadow", "tokens", 1, PeriodKind.BILLING, enforce=False),
    Quota("requests", "requests", 1_000, PeriodKind.BILLING),
)


def program(kept: int = 0) -> Program:
    return compile_program(
        PLAN,
        {"requests": 1, "tokens": 10},
        METERS,
        {"tokens": (DAY,)},
        reserve_ms=1_000,
        keep={"requests": 1, "tokens": kept},
        corrected=["tokens"],
    )


@pytest.fixture
def scripts(any_redis_url: str) -> Scripts:
    scripts = Scripts(any_redis_url)
    scripts.at(NOW_MS * 1000)
    scripts.seed("s", {"q:tokens:day": "0 0 0"})
    return scripts


def told(scripts: Scripts) -> list[tuple[str, str, str, str]]:
    return [
        (event["limit"], event["kind"], event["threshold"], event["used"])
        for event in scripts.events()
    ]


def calendar(scripts: Scripts) -> str:
    return " ".join(map(str, calendar_bounds(scripts.now_ms)))


def test_thresholds_fire_once_when_a_correction_passes_them(scripts: Scripts) -> None:
    watch = program().watch
    assert scripts.admit("s", program(), lease="a").admitted
    cost = ("cost", "s", "a", watch, calendar(scripts), "tokens", 47)
    assert scripts.settle(cost) == [1]
    assert told(scripts) == [("daily", "warning", "50", "47")]
    assert scripts.settle(cost) == [0]
    assert scripts.admit("s", program(), lease="b").admitted
    assert told(scripts)[1:] == [("monthly", "warning", "50", "57")]
    assert scripts.settle(("cost", "s", "b", watch, calendar(scripts), "tokens", 60)) == [1]
    assert told(scripts)[2:] == [
        ("monthly", "critical", "100", "107"),
        ("monthly", "exceeded", "101", "107"),
        ("daily", "exceeded", "101", "107"),
    ]
    assert not scripts.admit("s", program(), lease="c").admitted
    assert len(told(scripts)) == 5
    bounds = {
        event["limit"]: (int(event["start"]), int(event["end"])) for event in scripts.events()
    }
    assert bounds == {"monthly": SPAN, "daily": calendar_bounds(NOW_MS)[:2]}


def test_a_correction_downwards_or_of_another_period_tells_nothing(scripts: Scripts) -> None:
    watch = program().watch
    for lease in ("a", "b", "c", "d"):
        assert scripts.admit("s", program(), lease=lease).admitted
    assert scripts.settle(("cost", "s", "a", watch, calendar(scripts), "tokens", 1)) == [1]
    assert told(scripts) == []
    # both the day and the billing period have ended when it is known
    scripts.at(SPAN[1] * 1000)
    later = billing_period(0, 1, scripts.now_ms)
    assert scripts.admit("s", program(), span=later, lease="e").admitted
    scripts.redis.xtrim(scripts.keyspace.events(0), maxlen=0)
    assert scripts.settle(("cost", "s", "b", watch, calendar(scripts), "tokens", 5_000)) == [1]
    assert told(scripts) == []


def test_progress_raises_what_is_charged_and_what_is_kept(scripts: Scripts) -> None:
    watch = program().watch
    assert scripts.admit("s", program(), lease="a").admitted
    for kept, total in ((4, 10), (60, 60), (50, 60)):
        moved = ("progress", "s", "a", 1_000, 0, watch, calendar(scripts), "tokens", kept)
        assert scripts.settle(moved) == [1]
        assert int(scripts.state("s")["m:tokens"].split()[0]) == total
    assert [event[:3] for event in told(scripts)] == [
        ("monthly", "warning", "50"),
        ("daily", "warning", "50"),
    ]
    assert scripts.settle(("expire", "s", "a")) == [1]  # not due yet
    scripts.at((NOW_MS + 1_000) * 1000)
    assert scripts.settle(("expire", "s", "a")) == [1]
    state = scripts.state("s")
    assert state["m:tokens"].split()[0] == "60"
    assert state["m:requests"].split()[0] == "1"
    assert "v:a" not in state
    assert scripts.settle(("cost", "s", "a", "", "", "tokens", 7)) == [1]
    assert scripts.state("s")["m:tokens"].split()[0] == "7"


def test_progress_that_nobody_waits_for_any_more_changes_nothing(scripts: Scripts) -> None:
    assert scripts.admit("s", program(), lease="a").admitted
    before = scripts.state("s")
    late = ("progress", "s", "a", 1_000, NOW_MS - 1, "", "", "tokens", 60)
    assert scripts.settle(late) == [4]
    assert scripts.state("s") == before


def test_a_reservation_as_it_was_written_before_is_taken_back(scripts: Scripts) -> None:
    """By a gateway of an earlier version: without what is kept."""
    assert scripts.admit("s", program(), lease="a").admitted
    key = scripts.keyspace.state("s")
    expiry, made, *_ = scripts.state("s")["v:a"].split()
    hour = NOW_MS - NOW_MS % 3_600_000
    rows = f"requests 1 {SPAN[0]} {hour} -1 tokens 10 {SPAN[0]} {hour} 100"
    scripts.redis.hset(key, "v:a", f"{expiry} {made} {rows}")
    scripts.at((NOW_MS + 1_000) * 1000)
    assert scripts.settle(("expire", "s", "a")) == [1]
    assert scripts.state("s")["m:tokens"].split()[0] == "0"
    assert scripts.state("s")["m:requests"].split()[0] == "0"


def test_what_expired_twice_is_still_counted_when_its_answer_was_served(scripts: Scripts) -> None:
    assert scripts.admit("s", program(), lease="a").admitted
    scripts.at((NOW_MS + 1_000) * 1000)
    for _ in range(2):  # a call whose answer was lost is sent again
        assert scripts.settle(("expire", "s", "a")) == [1]
        assert scripts.state("s")["m:tokens"].split()[0] == "0"
    assert scripts.settle(("cost", "s", "a", "", "", "tokens", 10)) == [1]
    assert scripts.state("s")["m:tokens"].split()[0] == "10"
