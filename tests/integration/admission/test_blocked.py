"""A refusal is repeated without asking Redis, until what refused would admit again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from core.policy import Concurrency, FixedWindow, Gcra, PeriodKind, Quota
from gateway.admission.blocked import MAX_S, Blocked
from gateway.answers.verdict import policy_of
from tests.integration.admission.stack import METERS, Stack, admitted, stack
from tests.support import wait_until_async
from tests.support.scripts import plan_of

QUOTA = plan_of(Quota("monthly", "requests", 3, PeriodKind.BILLING))
RATE = plan_of(Gcra("rate", "requests", 1, 300_000, 1))


def run(redis_url: str, database: str, check: Callable[[Stack], Awaitable[None]]) -> None:
    async def main() -> None:
        async with stack(redis_url, database, QUOTA) as found:
            await check(found)

    asyncio.run(main())


def test_an_abuser_costs_redis_a_check_each_half_second(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        admission = s.admission(QUOTA)
        assert admitted(await s.hit(admission, "s", 4)) == 3
        asked = s.batcher.stats.checks
        started = asyncio.get_running_loop().time()
        for _ in range(50):
            (decision,) = await s.hit(admission, "s", 1)
            assert not decision.admitted
            assert decision.states[0].remaining == 0
        passed = asyncio.get_running_loop().time() - started
        assert s.batcher.stats.checks - asked <= 1 + passed / MAX_S
        # Another subject, and another route of the same one, are asked for.
        assert admitted(await s.hit(admission, "other", 1)) == 1
        before = s.batcher.stats.checks
        assert admitted(await s.hit(s.admission(QUOTA, {"requests": 2}), "s", 1)) == 0
        assert s.batcher.stats.checks == before + 1

    run(valkey, database, check)


def test_what_would_fit_again_is_asked_again(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        admission = s.admission(RATE)
        assert admitted(await s.hit(admission, "s", 2)) == 1
        (refused,) = await s.hit(admission, "s", 1)
        reset_ms = refused.states[0].reset_ms
        assert 0 < reset_ms <= 300
        at = asyncio.get_running_loop().time()

        async def again() -> bool:
            return admitted(await s.hit(admission, "s", 1)) == 1

        await wait_until_async(again, 5, "the rate's next request")
        # Not before Redis would have admitted it.
        assert asyncio.get_running_loop().time() - at >= (reset_ms - 10) / 1000

    run(valkey, database, check)


def test_a_slot_may_come_free_at_any_time(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        plan = plan_of(Concurrency("slots", 1, lease_ms=60_000))
        admission = s.admission(plan)
        (held,) = await s.hit(admission, "s", 1)
        assert held.held is not None
        assert admitted(await s.hit(admission, "s", 1)) == 0
        s.leases.release(held.held)
        before = s.batcher.stats.checks
        await s.hit(admission, "s", 1)
        assert s.batcher.stats.checks == before + 1

    run(valkey, database, check)


def test_what_is_remembered_grows_older_and_is_bounded() -> None:
    policies = [policy_of(FixedWindow("w", "requests", 5, 60_000), METERS)]
    blocked = Blocked()
    assert not blocked
    now = asyncio.new_event_loop().time()
    refusal = (1_000, 1, 1, 0, 60_000)
    passed_ms = int(MAX_S / 2 * 1000)
    blocked.remember("s", refusal, policies, now - MAX_S / 2)
    refused = blocked.find("s")
    assert refused is not None
    found = refused.numbers(now)
    assert found == [1_000 + passed_ms, 1, 1, 0, 60_000 - passed_ms]
    blocked.remember("s", refusal, policies, now - MAX_S)
    assert blocked.find("s") is None
    assert not blocked
    for number in range(10_100):
        blocked.remember(str(number), refusal, policies, now + 60)
    assert len(blocked._refusals) == 10_000
