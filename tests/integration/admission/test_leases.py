"""Concurrency slots: given back at the end, after a crash, and never while a request runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from cli.embedded import EmbeddedValkey
from core.policy import Concurrency
from tests.integration.admission.stack import Stack, admitted, stack
from tests.support import free_port, wait_until_async
from tests.support.scripts import plan_of

PLAN = plan_of(Concurrency("slots", 5, lease_ms=1_000))


def run(redis_url: str, postgres_url: str, check: Callable[[Stack], Awaitable[None]]) -> None:
    async def main() -> None:
        async with stack(redis_url, postgres_url, PLAN) as found:
            await check(found)

    asyncio.run(main())


async def members(s: Stack) -> int:
    return await s.store.cardinality(s.keyspace.leases("s", "slots"))


def test_a_hundred_at_once_get_five_slots_and_give_them_back(
    any_redis_url: str, database: str
) -> None:
    async def check(s: Stack) -> None:
        admission = s.admission(PLAN)
        for _ in range(3):
            found = await s.hit(admission, "s", 100)
            assert admitted(found) == 5
            assert [decision.held is not None for decision in found].count(True) == 5
            assert admitted(await s.hit(admission, "s", 1)) == 0
            for decision in found:
                if decision.held is not None:
                    s.leases.release(decision.held)
            await wait_until_async(lambda: _none(s), what="the release")
        assert s.leases.lost == 0

    run(any_redis_url, database, check)


async def _none(s: Stack) -> bool:
    return await members(s) == 0


def test_the_slots_of_a_crashed_gateway_come_back(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        admission = s.admission(PLAN)
        assert admitted(await s.hit(admission, "s", 5)) == 5
        s.leases._held.clear()  # nobody renews them any more
        given_at = await s.store.now_ms()
        assert admitted(await s.hit(admission, "s", 1)) == 0

        async def one_more() -> bool:
            return admitted(await s.hit(admission, "s", 1)) == 1

        await wait_until_async(one_more, 5, "an expired lease")
        assert await s.store.now_ms() - given_at >= 900
        # what expired is swept when a slot is given back
        await s.leases.close()
        assert await members(s) == 0

    run(valkey, database, check)


def test_a_long_request_keeps_its_slots(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        admission = s.admission(PLAN)
        assert admitted(await s.hit(admission, "s", 5)) == 5
        given_at = await s.store.now_ms()

        async def long_after() -> bool:
            assert admitted(await s.hit(admission, "s", 1)) == 0
            return await s.store.now_ms() - given_at > 2_200

        end = asyncio.get_running_loop().time() + 10
        while not await long_after():
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.05)
        await s.leases.close()
        assert await members(s) == 0
        assert s.leases.lost == 0

    run(valkey, database, check)


def test_a_release_that_redis_does_not_take_is_dropped(database: str, server_dir: Path) -> None:
    with EmbeddedValkey(server_dir / "v", port=free_port(), appendfsync="always") as server:

        async def check(s: Stack) -> None:
            admission = s.admission(PLAN)
            found = await s.hit(admission, "s", 5)
            server.kill()
            for decision in found:
                assert decision.held is not None
                s.leases.release(decision.held)
            await wait_until_async(lambda: s.leases.lost == 5, what="the lost releases")
            server.start()
            await wait_until_async(lambda: s.batcher.connected, what="the reconnection")

            async def one_more() -> bool:
                return admitted(await s.hit(admission, "s", 1)) == 1

            await wait_until_async(one_more, 5, "the leases to expire")

        run(server.url, database, check)
