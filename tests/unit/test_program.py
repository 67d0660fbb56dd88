"""The program of a plan: which fields and counters it reads, in the script's own numbering."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from core.admission.program import (
    EXCEEDED,
    Program,
    calendar_use,
    compile_program,
    thresholds,
)
from core.period import DAY_MS
from core.policy import (
    Action,
    Aggregation,
    Concurrency,
    FixedWindow,
    Gcra,
    Meter,
    PeriodKind,
    Plan,
    Quota,
    SlidingWindow,
)

METERS = {
    "requests": Meter("requests"),
    "peak": Meter("peak", aggregation=Aggregation.MAX),
    "seats": Meter("seats", aggregation=Aggregation.LAST),
}
PLAN = Plan(
    "pro",
    (
        Gcra("rate", "requests", 10, 1_000_000, 20),
        FixedWindow("fixed", "peak", 7, DAY_MS, enforce=False),
        SlidingWindow("sliding", "requests", 5, 60_000),
        Quota("monthly", "requests", 100, PeriodKind.BILLING, Action.OVERAGE, (50,)),
        Quota("daily", "requests", 10, PeriodKind.DAY, Action.WARN, ()),
        Quota("seats", "seats", 3, PeriodKind.YEAR),
        Concurrency("slots", 4, 9_000),
    ),
)


def text_of(program: Program) -> dict[str, Any]:
    found = orjson.loads(program.text)
    assert isinstance(found, dict)
    return found


def test_limits_that_the_costs_do_not_touch_are_left_out() -> None:
    program = compile_program(PLAN, {"requests": 2, "seats": 0}, METERS, calendar_use([PLAN]))
    names = [limit.name for limit in program.limits]
    assert names == ["rate", "sliding", "monthly", "daily", "slots"]
    assert program.plan_limits == PLAN.limits
    assert (program.lease_limits, program.answer_size, program.durable) == (("slots",), 16, True)
    text = text_of(program)
    assert text["fields"] == [
        "ver", "run", "p:requests", "m:requests", "q:requests:day", "r:rate", "s:sliding",
    ]  # fmt: skip
    assert text["meters"] == [["requests", 2, 1, 3]]
    assert text["calendars"] == [["q:requests:day", 1, 1, 2, 1, 5]]
    assert text["limits"] == [
        [1, "r:rate", 1, 2, 10, 1_000_000, 20, 6],
        [3, "s:sliding", 1, 2, 5, 60_000, 7],
        [4, "t:monthly", 1, 100, 1, 2, 1, "monthly", "requests",
         [[50, 50, "warning"], [101, 101, "exceeded"]]],
        [4, "t:daily", 1, 10, -1, 1, 1, "daily", "requests", [[101, 11, "exceeded"]]],
        [5, "slots", 1, 4, 9_000],
    ]  # fmt: skip
    assert (text["leases"], text["ttl"]) == (1, 0)


def test_positions_point_at_their_fields() -> None:
    costs = {"requests": 1, "peak": 5, "seats": 2}
    text = text_of(compile_program(PLAN, costs, METERS, calendar_use([PLAN])))
    fields = text["fields"]
    for name, cost, _, position in text["meters"]:
        assert fields[position - 1 : position + 1] == [f"p:{name}", f"m:{name}"]
        assert cost == costs[name]
    assert [row[2] for row in text["meters"]] == [1, 2, 3]
    for field, meter, _, _, _, position in text["calendars"]:
        assert fields[position - 1] == field
        assert text["meters"][meter - 1][0] == field.split(":")[1]
    for row in text["limits"]:
        if row[0] in (1, 2, 3):
            assert fields[row[-1] - 1] == row[1]
    assert len(set(fields)) == len(fields)
    assert text["limits"][1][:3] == [2, "w:fixed", 0]


def test_every_plans_calendar_is_counted() -> None:
    other = Plan("other", (Quota("weekly", "requests", 9, PeriodKind.WEEK),))
    found = calendar_use([PLAN, other])
    assert found == {"requests": (PeriodKind.DAY, PeriodKind.WEEK), "seats": (PeriodKind.YEAR,)}
    program = compile_program(other, {"requests": 1}, METERS, found)
    fields = text_of(program)["fields"]
    assert [name for name in fields if name.startswith("q:")] == [
        "q:requests:day", "q:requests:week",
    ]  # fmt: skip


def test_a_keyless_subject_has_no_meters_and_an_end() -> None:
    program = compile_program(PLAN, {"peak": 1}, METERS, {}, durable=False)
    text = text_of(program)
    assert (text["meters"], text["calendars"], program.durable) == ([], [], False)
    assert text["ttl"] == 366 * DAY_MS  # of the whole plan, not of what this route costs
    short = Plan("short", (Gcra("rate", "requests", 1, 1_000_000, 1), Concurrency("slots", 1, 9)))
    ttl = text_of(compile_program(short, {"requests": 1}, METERS, {}, durable=False))["ttl"]
    assert ttl == 60_009


@pytest.mark.parametrize(
    ("limit", "percents", "expected"),
    [
        (100, (80, 95, 100), [(80, 80), (95, 95), (100, 100), (EXCEEDED, 101)]),
        (3, (50, 80), [(50, 2), (80, 3), (EXCEEDED, 4)]),  # reached, not rounded down
        (1, (1, 100), [(1, 1), (100, 1), (EXCEEDED, 2)]),
        (0, (80,), [(EXCEEDED, 1)]),
    ],
)
def test_thresholds(limit: int, percents: tuple[int, ...], expected: list[Any]) -> None:
    quota = Quota("q", "requests", limit, PeriodKind.BILLING, thresholds=percents)
    found = thresholds(quota)
    assert [(percent, units) for percent, units, _ in found] == expected
    for percent, _, kind in found:
        assert kind == (
            "exceeded" if percent == EXCEEDED else "critical" if percent >= 95 else "warning"
        )


@pytest.mark.parametrize(("months", "kind"), [(1, "month"), (3, "month"), (12, "year")])
def test_a_keyless_subject_has_no_billing_anchor(months: int, kind: str) -> None:
    plan = Plan("p", (Quota("q", "requests", 9, PeriodKind.BILLING),), months)
    program = compile_program(plan, {"requests": 1}, METERS, {}, durable=False)
    text = text_of(program)
    assert [row[0] for row in text["calendars"]] == [f"q:requests:{kind}"]
    assert text["limits"][0][4] == -1


def test_an_unknown_meter() -> None:
    with pytest.raises(KeyError):
        compile_program(PLAN, {"cats": 1}, METERS, {})
