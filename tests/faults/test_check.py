"""The check finds what it is for: each rule is broken once in a round that was right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from decimal import Decimal

import pytest

from tests.faults.check import check
from tests.faults.history import Event, Happened, Ledger, Loss, Observation, Request, Round, Total
from tests.faults.rules import Switches

PERIOD_MS = 1_700_000_000_000
HOUR_MS = 1_700_002_800_000
QUOTA = 80


def ledger(totals: dict[tuple[str, str], tuple[int, int]]) -> Ledger:
    """One period and hour of each subject and meter: total, overage."""
    found = Ledger()
    for (subject, meter), pair in totals.items():
        row = Total(*map(Decimal, pair))
        found.periods[subject, meter, PERIOD_MS] = row
        found.hours[subject, meter, PERIOD_MS, HOUR_MS] = row
    return found


def requests(subject: str, path: str, status: int, count: int, start: float = 0) -> list[Request]:
    return [
        Request(f"{subject}{path}{status}@{start + n}", subject, path, status, start + n, start + n)
        for n in range(count)
    ]


def fired(subject: str, *thresholds: int, limit: str = "monthly") -> list[Event]:
    meter = "requests" if limit == "monthly" else "credits"
    kind = {80: "warning", 90: "warning"}
    return [
        Event(subject, limit, meter, kind.get(t, "critical"), t, PERIOD_MS, Decimal(t))
        for t in thresholds
    ]


def right(**switches: bool) -> Round:
    """A quota of 80 that was reached, and 65 requests of 5 credits, 15 of which had no answer."""
    round_ = Round(1, Switches(**switches), [], wall_offset=HOUR_MS / 1000)
    round_.plans = {"q": "quota", "o": "overage"}
    lost = requests("o", "/heavy/x", 0, 15, 60)
    round_.requests = [
        *requests("q", "/api/x", 200, 50),
        *requests("q", "/api/status?code=500", 500, 30, 50),
        *requests("q", "/api/x", 429, 20, 80),
        *requests("o", "/heavy/x", 200, 60),
        *lost,
        *requests("o", "/heavy/x", 503, 10, 80),
    ]
    answered = [(r.id, r.status) for r in round_.requests if r.status in (200, 500)]
    round_.served = [*answered, *((r.id, 200) for r in lost[:5])]
    round_.faults = [Happened("worker_kill", "worker", 60, 60)]
    totals = {("q", "requests"): (80, 0), ("o", "requests"): (65, 5), ("o", "credits"): (325, 75)}
    round_.ledger, round_.redis = ledger(totals), ledger(totals)
    round_.events = [*fired("q", 80, 90, 95, 100), *fired("o", 80, 90, 95, 100)]
    round_.events += fired("o", 80, 90, 95, 100, limit="credits")
    exceeded = [("monthly", "requests"), ("credits", "credits")]
    round_.events += [
        Event("o", limit, meter, "exceeded", 100, PERIOD_MS, Decimal(1))
        for limit, meter in exceeded
    ]
    return round_


def set_total(round_: Round, subject: str, meter: str, total: int, overage: int = 0) -> None:
    """In ledger and Redis alike."""
    for rows in (round_.ledger, round_.redis):
        row = Total(Decimal(total), Decimal(overage))
        rows.periods[subject, meter, PERIOD_MS] = row
        rows.hours[subject, meter, PERIOD_MS, HOUR_MS] = row


def test_a_round_that_is_right() -> None:
    assert check(right()) == []
    assert check(right(exact_503=True)) == []


def lose_one(round_: Round) -> None:
    set_total(round_, "q", "requests", 79)


def count_twice(round_: Round) -> None:
    set_total(round_, "o", "requests", 86, 26)


def forget_a_served_one(round_: Round) -> None:
    set_total(round_, "o", "requests", 64, 4)


def one_meter_only(round_: Round) -> None:
    set_total(round_, "o", "credits", 320, 70)


def other_hours(round_: Round) -> None:
    row = Total(Decimal(79), Decimal(0))
    round_.ledger.hours["q", "requests", PERIOD_MS, HOUR_MS] = row


def another_hour(round_: Round) -> None:
    row = round_.ledger.hours.pop(("q", "requests", PERIOD_MS, HOUR_MS))
    round_.ledger.hours["q", "requests", PERIOD_MS, HOUR_MS + 3_600_000] = row


def redis_differs(round_: Round) -> None:
    round_.redis.periods["q", "requests", PERIOD_MS] = Total(Decimal(78), Decimal(0))


def wrong_overage(round_: Round) -> None:
    set_total(round_, "o", "requests", 65, 4)


def ledger_fell(round_: Round) -> None:
    higher = ledger({("o", "credits"): (330, 80)})
    round_.observations = [Observation(1, 1, higher)]


def refused_too_soon(round_: Round) -> None:
    set_total(round_, "q", "requests", 79)
    round_.requests = [r for r in round_.requests if r.id != "q/api/x200@0"]
    round_.served = [row for row in round_.served if row[0] != "q/api/x200@0"]
    round_.events = [e for e in round_.events if e.subject != "q" or e.threshold < 100]


def quota_passed(round_: Round) -> None:
    set_total(round_, "q", "requests", 81)
    round_.requests += requests("q", "/api/x", 200, 1, 200)
    round_.served += [("q/api/x200@200", 200)]


def served_though_refused(round_: Round) -> None:
    round_.served += [("o/heavy/x503@80", 200)]


def admitted_and_not_served(round_: Round) -> None:
    round_.served.remove(("q/api/x200@0", 200))


def served_twice(round_: Round) -> None:
    round_.served += [("q/api/x200@0", 200)]


def no_answer_without_cause(round_: Round) -> None:
    round_.faults = [Happened("valkey_kill", "valkey", 60, 60)]


def bad_gateway_without_cause(round_: Round) -> None:
    round_.requests += requests("o", "/heavy/x", 502, 1, 200)
    set_total(round_, "o", "requests", 66, 6)
    set_total(round_, "o", "credits", 330, 80)


def fired_twice(round_: Round) -> None:
    round_.events += fired("q", 90)


def not_fired(round_: Round) -> None:
    round_.events.remove(fired("q", 95)[0])


def too_many_slots(round_: Round) -> None:
    round_.plans["s"] = "slots"
    round_.peaks["s"] = 3


def too_fast(round_: Round) -> None:
    round_.plans["r"] = "rated"
    more = [Request(f"r{n}", "r", "/api/x", 200, 5, 6) for n in range(60)]
    round_.requests += more
    round_.served += [(r.id, 200) for r in more]
    set_total(round_, "r", "requests", 60)


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lose_one, "the ledger has 79, the answers say 80 to 80"),
        (count_twice, "the ledger has 86, the answers say 65 to 85"),
        (forget_a_served_one, "the ledger has 64"),
        (one_meter_only, "credits: the ledger has 320, the answers say 325"),
        (other_hours, "hours add up to 79"),
        (another_hour, f"in the hour {HOUR_MS + 3_600_000}, the answers say 0 to 0"),
        (redis_differs, "Redis has Total(total=Decimal('78')"),
        (wrong_overage, "of which 5 are above the quota"),
        (ledger_fell, "the ledger fell from 330 to 325"),
        (refused_too_soon, "refused with 79 counted under a quota of 80"),
        (quota_passed, "81 counted under a quota of 80"),
        (served_though_refused, "was answered 503, but the upstream served it"),
        (admitted_and_not_served, "the upstream did not serve it"),
        (served_twice, "served q/api/x200@0 2 times"),
        (no_answer_without_cause, "15 requests without an answer"),
        (bad_gateway_without_cause, "was answered 502, though the upstream lived"),
        (fired_twice, "fired 2 times"),
        (not_fired, "not fired"),
        (too_many_slots, "3 at once with 2 slots"),
        (too_fast, "60 admitted in 1.0 s at 30/s"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_found(breaks: Callable[[Round], None], words: str) -> None:
    round_ = right()
    breaks(round_)
    found = check(round_)
    assert any(words in violation for violation in found), found


def test_refused_for_want_of_redis_is_not_counted_where_that_is_exact() -> None:
    round_ = right()
    set_total(round_, "o", "requests", 80, 20)
    set_total(round_, "o", "credits", 400, 150)
    assert check(round_) == []
    # 60 were answered 200, 15 not at all, and 5 of the 503 would have been counted
    round_.switches = Switches(exact_503=True)
    assert "the ledger has 80, the answers say 65 to 75" in check(round_)[1]


def after_a_loss(total: int) -> Round:
    """The ledger had 30 when Redis was wiped; 40 of the quota's 80 requests began after that."""
    round_ = right()
    round_.losses = [Loss("flushall", 38.5, 39.5, ledger({("q", "requests"): (30, 0)}))]
    round_.requests = [r for r in round_.requests if (r.subject, r.status) != ("q", 429)]
    round_.plans = {"q": "quota"}
    round_.requests = [r for r in round_.requests if r.subject == "q"]
    kept = {r.id for r in round_.requests}
    round_.served = [row for row in round_.served if row[0] in kept]
    totals = {("q", "requests"): (total, 0)}
    round_.ledger, round_.redis = ledger(totals), ledger(totals)
    reached = [t for t in (80, 90, 95, 100) if total * 100 >= t * QUOTA]
    round_.events = fired("q", *reached)
    return round_


def test_a_wiped_redis_loses_only_what_the_ledger_had_not() -> None:
    assert check(after_a_loss(70)) == []
    assert check(after_a_loss(80)) == []
    assert "the ledger has 69, the answers say 70 to 80" in check(after_a_loss(69))[0]
    assert "the answers say 70 to 80" in check(after_a_loss(81))[0]


def test_charges_that_wait_for_their_answer() -> None:
    round_ = Round(1, Switches(), [], wall_offset=HOUR_MS / 1000)
    round_.plans = {"w": "wide"}
    lost = requests("w", "/paid/x", 0, 4, 100)
    round_.requests = [
        *requests("w", "/paid/x", 200, 10),
        *requests("w", "/paid/status?code=500", 500, 5, 20),
        *requests("w", "/answered/status?code=500", 500, 3, 30),
        *requests("w", "/answered/x", 502, 2, 40),
        *lost,
    ]
    round_.faults = [Happened("worker_kill", "", 0, 0), Happened("upstream_kill", "", 0, 0)]
    answered = [(r.id, r.status) for r in round_.requests if r.status in (200, 500)]
    round_.served = [*answered, *((r.id, 200) for r in lost[:1])]
    first = copy.deepcopy(round_)
    set_total(first, "w", "requests", 21)
    set_total(first, "w", "credits", 48)
    assert check(first) == []
    round_.switches = Switches(reservations=True)
    set_total(round_, "w", "requests", 14)
    set_total(round_, "w", "credits", 33)
    assert check(round_) == []
    set_total(round_, "w", "requests", 15)
    set_total(round_, "w", "credits", 36)
    assert "the answers say 13 to 14" in check(round_)[1]
