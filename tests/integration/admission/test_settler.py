"""What is served is charged, and what is charged is served, on routes that charge for answers."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cli.embedded import EmbeddedValkey
from core.errors import StoreUnavailableError
from core.policy import PeriodKind, Quota
from gateway.admission.charge import Charge
from gateway.admission.settler import ReservationLost
from tests.integration.admission.stack import Stack, Subscription, stack
from tests.support import free_port, wait_until_async
from tests.support.scripts import plan_of

PLAN = plan_of(Quota("monthly", "requests", 10**6, PeriodKind.BILLING))


async def admit(s: Stack, subject: str) -> Charge:
    admission = s.admission(PLAN, reserve_ms=60_000)
    decision = await s.limiter.admit(admission, Subscription(subject), f"id-{subject}")
    assert decision.charge is not None
    return decision.charge


async def state(s: Stack, subject: str) -> dict[str, str]:
    return (await s.store.hgetall_many([s.keyspace.state(subject)]))[0]


def test_what_redis_does_not_know_any_more_is_not_served(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charge = await admit(s, "s")
            await s.store._client.delete(s.keyspace.state("s"))
            with pytest.raises(ReservationLost):
                await charge.answered(200)

    asyncio.run(main())


def test_a_refund_that_waits_for_the_ledger_holds_no_answer_up(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            refunded, charged = await admit(s, "a"), await admit(s, "b")
            # of a server that restarted: to be compared with a ledger that does not answer
            await s.store._client.hset(s.keyspace.state("a"), "run", "before")
            answers = asyncio.Event()

            async def restore(*_: Any) -> None:
                await answers.wait()

            s.seeder.restore = restore  # type: ignore[method-assign]
            refunded.give_back()
            await charged.answered(200)
            assert "v:id-b" not in await state(s, "b")
            assert "v:id-a" in await state(s, "a")
            await s.store._client.hset(s.keyspace.state("a"), "run", s.batcher.run)
            answers.set()

    asyncio.run(main())


def test_a_stalled_server_charges_nothing_later(database: str, server_dir: Path) -> None:
    async def main(server: EmbeddedValkey) -> None:
        async with stack(server.url, database, PLAN, timeout_s=0.5) as s:
            s.settler._timeout_s = 0.05
            charge = await admit(s, "s")
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(StoreUnavailableError):
                    await charge.answered(200)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            sending = s.settler._confirms.sending
            assert sending is not None
            await sending
            found = await state(s, "s")  # not confirmed: it is refunded, or was meanwhile
            assert "v:id-s" in found or found["m:requests"].startswith("0 ")

    with EmbeddedValkey(server_dir / "v", port=free_port()) as server:
        asyncio.run(main(server))


def test_one_subject_that_cannot_be_restored_fails_no_other_answer(
    valkey: str, database: str
) -> None:
    """What was charged would be refused: the ledger being away is no reason for that."""

    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charges = [await admit(s, subject) for subject in "abc"]
            await s.store._client.hset(s.keyspace.state("b"), "run", "before")
            await s.database.close()
            answers = await asyncio.gather(
                *(charge.answered(200) for charge in charges), return_exceptions=True
            )
            assert [isinstance(answer, StoreUnavailableError) for answer in answers] == [
                False,
                True,
                False,
            ]

    asyncio.run(main())


def test_a_refund_that_finds_its_subject_unverified_is_tried_again(
    valkey: str, database: str
) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            charge = await admit(s, "s")
            await s.store._client.hset(s.keyspace.state("s"), "run", "before")
            restore, tried = s.seeder.restore, 0

            async def away(*_: Any) -> None:
                nonlocal tried
                tried += 1
                raise StoreUnavailableError("Postgres does not answer")

            s.seeder.restore = away  # type: ignore[method-assign]
            charge.give_back()
            await wait_until_async(lambda: tried >= 1, what="the first try")
            assert "v:id-s" in await state(s, "s")
            s.seeder.restore = restore  # type: ignore[method-assign]
            await wait_until_async(lambda: _is_given_back(s, "s"), what="the refund")

    asyncio.run(main())


def test_an_answer_that_is_cut_off_while_its_charge_waits_is_given_back(
    valkey: str, database: str
) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            first, cut = await admit(s, "a"), await admit(s, "b")
            settle, begun, goes_on = s.settlement.settle, asyncio.Event(), asyncio.Event()

            async def held_up(operations: Any, run: str) -> Any:
                if begun.is_set():
                    return await settle(operations, run)
                begun.set()
                await goes_on.wait()
                return await settle(operations, run)

            s.settlement.settle = held_up  # type: ignore[method-assign]
            served = asyncio.create_task(first.answered(200))
            await begun.wait()
            waits = asyncio.create_task(cut.answered(200))
            await asyncio.sleep(0)
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
            goes_on.set()
            await served
            await wait_until_async(lambda: _is_given_back(s, "b"), what="the refund")
            assert (await state(s, "a"))["m:requests"].split()[0] == "1"

    asyncio.run(main())


async def _is_given_back(s: Stack, subject: str) -> bool:
    found = await state(s, subject)
    return f"v:id-{subject}" not in found and found["m:requests"].split()[0] == "0"
