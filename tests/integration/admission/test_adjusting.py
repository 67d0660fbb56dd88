"""Numbered batches of corrections: each operation once, whatever is wrong with another."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from core.admission.program import compile_program
from core.admission.settlement import Change, Kind, Operation
from core.clock import from_datetime
from core.errors import StoreUnavailableError
from core.period import HOUR_MS, billing_period
from core.policy import PeriodKind, Quota
from tests.integration.admission.stack import METERS, stack
from tests.support.scripts import RUN, Scripts, plan_of

NOW_MS = from_datetime(datetime(2026, 6, 17, 11, 20, tzinfo=UTC))
SPAN = billing_period(0, 1, NOW_MS)
PLAN = plan_of(Quota("monthly", "requests", 100, PeriodKind.BILLING))
PROGRAM = compile_program(PLAN, {"requests": 1}, METERS, {})


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(NOW_MS * 1000)
    for subject in ("a", "b"):
        scripts.seed(subject)
        assert scripts.admit(subject, PROGRAM, span=SPAN).admitted
    return scripts


def adjust(subject: str, at_ms: int, span: tuple[int, int] = SPAN) -> Operation:
    return Operation(Kind.ADJUST, subject, changes=(Change("requests", 1, *span, at_ms),))


def total(scripts: Scripts, subject: str) -> str:
    return scripts.state(subject)["m:requests"].split()[0]


def test_a_state_that_cannot_be_read_counts_nothing_of_its_batch(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """An error in the middle would leave the rest counted, and count it again at each attempt."""

    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            scripts.redis.hset(s.keyspace.state("b"), "m:requests", "1 what")
            batch = [adjust("a", NOW_MS), adjust("b", NOW_MS)]
            for _ in range(3):
                with pytest.raises(StoreUnavailableError):
                    await s.settlement.adjust(batch, RUN, "spool", 1)
            assert total(scripts, "a") == "1"
            scripts.redis.hset(s.keyspace.state("b"), "m:requests", "1 0 1 0 1")
            assert await s.settlement.adjust(batch, RUN, "spool", 1)
            assert (total(scripts, "a"), total(scripts, "b")) == ("2", "2")

    asyncio.run(main())


def test_usage_of_two_anchors_is_counted_in_the_order_of_their_periods(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """A worker that learnt the new anchor late goes on in the old period for a while."""

    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            later = NOW_MS, NOW_MS + 30 * 24 * HOUR_MS
            batch = [adjust("a", NOW_MS + 1, later), adjust("a", NOW_MS + HOUR_MS)]
            assert await s.settlement.adjust(batch, RUN, "spool", 1)
            state = scripts.state("a")
            assert state[f"cp:requests:{SPAN[0]}"].split()[1] == "2"
            assert state["m:requests"].split()[0] == "1"

    asyncio.run(main())


def test_one_unreadable_state_keeps_no_other_reservation(scripts: Scripts) -> None:
    reserving = compile_program(PLAN, {"requests": 1}, METERS, {}, reserve_ms=1_000)
    for subject in ("a", "b"):
        assert scripts.admit(subject, reserving, span=SPAN, lease=f"r{subject}").admitted
    scripts.redis.hset(scripts.keyspace.state("a"), "p:requests", "never")
    scripts.at((NOW_MS + 2_000) * 1000)
    assert scripts.settle(("expire", "a", "ra"), ("expire", "b", "rb")) == [5, 1]
    assert total(scripts, "b") == "1"
    # for as long as a spool may be kept that says it was served
    scripts.at((NOW_MS + 29 * 24 * HOUR_MS) * 1000)
    assert scripts.redis.zcount(scripts.keyspace.due(0), "-inf", scripts.now_ms) == 1
    assert scripts.settle(("confirm", "b", "rb")) == [1]
    assert total(scripts, "b") == "2"
