"""A cost that Redis does not take at once is not lost while its worker lives."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from core.admission.program import compile_program
from core.admission.settlement import Kind, Operation
from core.cost import ActualCost, OnAbort
from core.errors import StoreUnavailableError
from core.period import HOUR_MS
from core.policy import PeriodKind, Quota, Route
from gateway.admission.charge import Charge
from gateway.cost.charge import CostOnRoute, kept_at_head
from gateway.outage.entries import Lost, read, settled
from gateway.outage.memory import MemoryJournal
from tests.integration.admission.stack import METERS, Stack, Subscription, stack
from tests.support.scripts import plan_of
from tests.support.wait import wait_until_async

PLAN = plan_of(Quota("monthly", "credits", 10**9, PeriodKind.BILLING))
RULE = ActualCost("credits", 2, 5_000, header="x-usage-cost", on_abort=OnAbort.STREAMED)
ROUTE = Route("r", "/r", "api", costs={"requests": 1, "credits": 5_000}, actual=(RULE,))


async def admit(s: Stack, subject: str, route: Route = ROUTE) -> Charge:
    program = compile_program(
        PLAN,
        route.costs,
        METERS,
        s.calendars,
        reserve_ms=60_000,
        keep=None if route.reserve else kept_at_head(route),
        corrected=["credits"],
    )
    cost = CostOnRoute(route, program.watch)
    admission = replace(s.admission(PLAN), program=program, cost=cost, charged=route.charged)
    decision = await s.limiter.admit(admission, Subscription(subject), f"id-{subject}")
    assert decision.charge is not None
    return decision.charge


async def total(s: Stack, subject: str) -> int:
    state = (await s.store.hgetall_many([s.keyspace.state(subject)]))[0]
    return int(state["m:credits"].split(" ")[0])


async def answer(charge: Charge, cost: bytes) -> None:
    tap = charge.tap("req")
    assert tap is not None
    await charge.answered(200)
    tap.head(200, [(b"x-usage-cost", cost)])
    tap.end()
    charge.give_back()


def test_it_is_sent_again_until_redis_is_back(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charge = await admit(s, "s")
            run, s.settler._run = s.settler._run, lambda: None
            await answer(charge, b"12.34")
            await wait_until_async(lambda: len(s.settler._again) == 1)
            assert await total(s, "s") == 5_000
            s.settler._run = run
            await wait_until_async(lambda: _is(total(s, "s"), 1_234))

    asyncio.run(main())


def test_how_far_an_answer_has_come_is_told_again_although_it_pauses(
    valkey: str, database: str
) -> None:
    rule = ActualCost("credits", 2, 500, bytes_per=1, on_abort=OnAbort.STREAMED)
    route = Route("r", "/r", "api", costs={"credits": 500}, actual=(rule,))

    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charge = await admit(s, "s", route)
            tap = charge.tap("req")
            assert tap is not None
            await charge.answered(200)
            run, s.settler._run = s.settler._run, lambda: None
            tap.head(200, [])
            tap.piece(b"x" * 70)  # and nothing more
            (held,) = s.settler._held
            asked = 0

            def progress() -> Operation:
                nonlocal asked
                asked += 1
                return told()

            assert held.progress is not None
            told, held.progress = held.progress, progress
            await wait_until_async(lambda: asked >= 2, what="a report that Redis did not take")
            assert await total(s, "s") == 500
            s.settler._run = run
            await wait_until_async(lambda: _is(total(s, "s"), 7_000))
            charge.give_back()

    asyncio.run(main())


def test_it_waits_for_a_ledger_that_has_its_hour(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charge = await admit(s, "s")
            key = s.keyspace.state("s")
            # an hour later, when the hour of the admission is in the ledger and nowhere else
            (state,) = await s.store.hgetall_many([key])
            start, end, hour = state["p:credits"].split(" ")
            later = f"{start} {end} {int(hour) + HOUR_MS}"
            await s.store._client.hset(key, "p:credits", later)
            restore, tried = s.seeder.restore, 0

            async def away(*arguments: Any) -> None:
                nonlocal tried
                tried += 1
                if tried < 3:
                    raise StoreUnavailableError("Postgres does not answer")
                await restore(*arguments)

            s.seeder.restore = away  # type: ignore[method-assign]
            await answer(charge, b"0")
            await wait_until_async(lambda: _is(total(s, "s"), 0))
            assert tried == 3

    asyncio.run(main())


async def _is(found: Any, expected: int) -> bool:
    return bool(await found == expected)


@pytest.mark.parametrize(("status", "credit"), [(200, 700), (500, 0)])
def test_a_route_that_charges_for_answers(
    valkey: str, database: str, status: int, credit: int
) -> None:
    route = replace(ROUTE, reserve=True, charged=frozenset(range(200, 300)))

    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charge = await admit(s, "s", route)
            tap = charge.tap("req")
            assert tap is not None
            await charge.answered(status)
            tap.head(status, [(b"x-usage-cost", b"7")])
            charge.give_back()  # its client is gone
            await wait_until_async(lambda: _is(total(s, "s"), credit))
            assert [cost.units for cost in charge.costs] == [credit]

    asyncio.run(main())


def test_what_is_not_served_is_not_charged(valkey: str, database: str) -> None:
    """The head's charge cannot be made durable, neither in Redis nor on a disk."""
    route = replace(ROUTE, reserve=True)

    async def main() -> None:
        async with stack(valkey, database, PLAN, journal=MemoryJournal()) as s:
            charge = await admit(s, "s", route)
            charge.tap("req")
            run, s.settler._run = s.settler._run, lambda: None
            with pytest.raises(StoreUnavailableError):
                await charge.answered(200)
            charge.give_back()
            s.settler._run = run
            await wait_until_async(lambda: _is(total(s, "s"), 0))

    asyncio.run(main())


def test_what_is_written_down_of_a_settlement_is_read_as_it_was() -> None:
    charge = CostOnRoute(ROUTE)
    assert charge.kept == {"requests": 1, "credits": 0}
    for kind, ms in ((Kind.COST, 0), (Kind.PROGRESS, 60_000)):
        operation = Operation(kind, "s", "id", ms=ms)
        found = read(settled(operation))
        assert not isinstance(found, Lost)
        assert found == operation
