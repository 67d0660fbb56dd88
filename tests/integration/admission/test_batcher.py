"""The batcher against real servers that are busy, forgetful, frozen or killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cli.embedded import EmbeddedValkey
from core import clock
from core.admission.program import Verdict
from core.errors import StoreUnavailableError
from core.period import DAY_MS, billing_period, calendar_bounds
from core.policy import Concurrency, PeriodKind, Quota
from tests.integration.admission.stack import Stack, Subscription, admitted, stack, told
from tests.support import free_port, wait_until_async
from tests.support.scripts import Scripts, plan_of

PLAN = plan_of(Quota("monthly", "requests", 10**6, PeriodKind.BILLING))
FOREVER = (0, 2**42)


def run(
    redis_url: str, postgres_url: str, check: Callable[[Stack], Awaitable[None]], **options: Any
) -> None:
    async def main() -> None:
        async with stack(redis_url, postgres_url, PLAN, **options) as found:
            await check(found)

    asyncio.run(main())


def submit(s: Stack, subject: str = "s") -> asyncio.Future[Any]:
    program = s.admission(PLAN).program
    return s.batcher.submit(program, (s.keyspace.state(subject),), *FOREVER, "lease")


async def seed(s: Stack, subject: str = "s") -> None:
    await s.seeder.seed(
        subject, s.keyspace.state(subject), PLAN.limits, clock.now_ms(), s.batcher.run
    )


async def count(s: Stack, subject: str = "s") -> int:
    state = (await s.store.hgetall_many([s.keyspace.state(subject)]))[0]
    return int(state["m:requests"].split()[0]) if "m:requests" in state else 0


def test_checks_of_one_tick_leave_together(any_redis_url: str, database: str) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        sizes: list[int] = []
        s.batcher._on_batch = lambda size, _: sizes.append(size)
        admission = s.admission(PLAN)
        subscription = Subscription("s")
        found = await asyncio.gather(
            *(s.limiter.admit(admission, subscription, f"r{n}") for n in range(500))
        )
        assert admitted(found) == await count(s) == 500
        assert sizes == [128, 128, 128, 116]
        remaining = sorted(told(admission, decision)[0].remaining for decision in found)
        assert remaining == list(range(10**6 - 500, 10**6))
        assert (s.batcher.stats.batches, s.batcher.stats.checks) == (4, 500)
        assert s.batcher.stats.errors == {}

    run(any_redis_url, database, check)


def test_each_check_of_a_mixed_batch_has_its_own_answer(any_redis_url: str, database: str) -> None:
    """Equal checks are sent as one, those with leases alone: no answer may go astray."""
    slots = plan_of(Concurrency("slots", 1_000), PLAN.limits[0], name="slots")

    async def check(s: Stack) -> None:
        plain, leased = s.admission(PLAN), s.admission(slots)
        double = s.admission(PLAN, {"requests": 2})
        for subject in "abc":
            await seed(s, subject)
        subjects = {name: Subscription(name) for name in "abc"}
        asked = [("a", plain), ("b", double), ("c", leased), ("a", plain), ("b", plain)] * 40
        sizes: list[int] = []
        s.batcher._on_batch = lambda size, _: sizes.append(size)
        found = await asyncio.gather(
            *(
                s.limiter.admit(admission, subjects[name], f"r{number}")
                for number, (name, admission) in enumerate(asked)
            )
        )
        assert sizes == [128, 72]
        assert admitted(found) == 200
        left: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        for (name, admission), decision in zip(asked, found, strict=True):
            states = told(admission, decision)
            assert [state.name for state in states] == [
                limit.name for limit in admission.program.limits
            ]
            left[name].append(states[-1].remaining)
        # each answer tells what was left after its own check, so all of a subject's differ
        assert sorted(left["a"]) == list(range(10**6 - 80, 10**6))
        assert sorted(left["c"]) == list(range(10**6 - 40, 10**6))
        assert len(set(left["b"])) == 80
        assert [await count(s, name) for name in "abc"] == [80, 120, 40]
        assert await s.store.cardinality(s.keyspace.leases("c", "slots")) == 40

        # also where nothing is grouped and only the order changes
        two = await asyncio.gather(
            s.limiter.admit(leased, subjects["c"], "x"), s.limiter.admit(plain, subjects["a"], "y")
        )
        both = [told(leased, two[0]), told(plain, two[1])]
        assert [[state.name for state in states] for states in both] == [
            ["slots", "monthly"],
            ["monthly"],
        ]
        assert [states[-1].remaining for states in both] == [10**6 - 41, 10**6 - 81]
        assert sizes == [128, 72, 2]

    run(any_redis_url, database, check)


def test_no_more_calls_than_allowed_are_under_way(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        sizes: list[int] = []
        s.batcher._on_batch = lambda size, _: sizes.append(size)
        await s.store._client.execute_command("CLIENT", "PAUSE", 700, "ALL")
        waiting = []
        for _ in range(50):
            waiting.append(submit(s))
            await asyncio.sleep(0)
            assert s.batcher._in_flight <= 2
        assert all(numbers[1] == Verdict.ADMIT for numbers in await asyncio.gather(*waiting))
        assert sizes == [1, 1, 48]
        assert await count(s) == 50

    run(valkey, database, check, max_in_flight=2)


def test_a_lost_script_is_loaded_and_nothing_counts_twice(
    any_redis_url: str, database: str
) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        for _ in range(3):
            await s.store._client.script_flush()
            found = await asyncio.gather(*(submit(s) for _ in range(300)))
            assert all(numbers[1] == Verdict.ADMIT for numbers in found)
        assert await count(s) == 900
        assert s.batcher.stats.errors["noscript"] >= 3

    run(any_redis_url, database, check, max_batch=50, max_in_flight=4)


def test_a_state_that_cannot_be_read_fails_alone(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        await seed(s, "garbled")
        scripts = Scripts(valkey, controlled=False)
        scripts.redis.set(s.keyspace.state("odd"), "not a hash")
        await submit(s, "garbled")
        scripts.redis.hset(s.keyspace.state("garbled"), "m:requests", "what?")
        before = scripts.state("garbled")
        answers = await asyncio.gather(submit(s), submit(s, "odd"), submit(s, "garbled"), submit(s))
        verdicts = [numbers[1] for numbers in answers]
        assert verdicts == [Verdict.ADMIT, Verdict.BROKEN, Verdict.BROKEN, Verdict.ADMIT]
        assert s.batcher.stats.batches <= 3, "one batch, or the test shows nothing"
        assert scripts.state("garbled") == before
        assert scripts.redis.get(s.keyspace.state("odd")) == "not a hash"

    run(valkey, database, check)


def test_a_call_that_waited_in_a_stalled_server_counts_nothing(
    server_dir: Path, database: str
) -> None:
    with EmbeddedValkey(server_dir / "v") as server:

        async def check(s: Stack) -> None:
            await seed(s)
            assert (await submit(s))[1] == Verdict.ADMIT
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(StoreUnavailableError):
                    await submit(s)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await wait_until_async(lambda: s.batcher.connected, what="connected again")
            assert (await submit(s))[1] == Verdict.ADMIT
            assert await count(s) == 2

        run(server.url, database, check)


def test_a_wrong_idea_of_redis_time_costs_a_second_call_and_no_count(
    valkey: str, database: str
) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        # ten seconds: seldom another day
        s.batcher.clock_offset_ms = -10_000
        numbers = await submit(s)
        assert numbers[1] == Verdict.ADMIT
        assert abs(s.batcher.clock_offset_ms) < 5_000
        assert await count(s) == 1
        assert s.batcher.stats.errors["clock"] == 1

    run(valkey, database, check)


def test_a_server_that_became_a_replica_is_left_and_found_again(
    server_dir: Path, database: str
) -> None:
    with EmbeddedValkey(server_dir / "v") as server:

        async def check(s: Stack) -> None:
            await seed(s)
            control = Scripts(server.url, controlled=False).redis
            control.execute_command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(StoreUnavailableError):
                await submit(s)
            assert not s.batcher.connected, "still ready for what cannot be served"
            control.execute_command("REPLICAOF", "NO", "ONE")
            await wait_until_async(lambda: s.batcher.connected, what="connected again")
            assert (await submit(s))[1] == Verdict.ADMIT

        run(server.url, database, check)


def test_whoever_stopped_waiting_disturbs_nobody(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        waiting = [submit(s) for _ in range(20)]
        for future in waiting[::2]:
            future.cancel()
        await asyncio.sleep(0)
        waiting[1].cancel()  # already sent
        found = await asyncio.gather(*waiting, return_exceptions=True)
        answers = [numbers for numbers in found if not isinstance(numbers, BaseException)]
        assert len(answers) == 9
        assert all(numbers[1] == Verdict.ADMIT for numbers in answers)
        assert (await submit(s))[1] == Verdict.ADMIT
        assert await count(s) <= 21

    run(valkey, database, check)


def test_a_frozen_server_costs_one_time_out(database: str, server_dir: Path) -> None:
    with EmbeddedValkey(server_dir / "v") as server:

        async def check(s: Stack) -> None:
            loop = asyncio.get_running_loop()
            await seed(s)
            assert (await submit(s))[1] == Verdict.ADMIT
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                started = loop.time()
                waiting = [submit(s) for _ in range(300)]  # some sent, some queued behind them
                found = await asyncio.gather(*waiting, return_exceptions=True)
                taken = loop.time() - started
                assert all(isinstance(error, StoreUnavailableError) for error in found)
                assert 0.15 <= taken < 2.0
                started = loop.time()
                with pytest.raises(StoreUnavailableError):
                    await submit(s)
                assert loop.time() - started < 0.1  # at once
                assert not s.batcher.connected
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await wait_until_async(lambda: s.batcher.connected, what="the reconnection")
            before = await count(s)
            # what was on its way when the time was up may have been counted, what waited was not
            assert 1 <= before <= 1 + 2 * 100
            assert (await submit(s))[1] == Verdict.ADMIT
            assert await count(s) == before + 1
            assert s.batcher.stats.errors["timeout"] >= 1

        run(server.url, database, check, timeout_s=0.15, max_batch=100)


def test_a_server_killed_in_the_middle(database: str, server_dir: Path) -> None:
    with EmbeddedValkey(server_dir / "v", port=free_port(), appendfsync="always") as server:

        async def check(s: Stack) -> None:
            await seed(s)
            served = 0
            for _ in range(3):
                waiting = [submit(s) for _ in range(400)]
                await waiting[0]
                server.kill()
                found = await asyncio.gather(*waiting, return_exceptions=True)
                for numbers in found:
                    if isinstance(numbers, BaseException):
                        assert isinstance(numbers, StoreUnavailableError)
                    else:
                        served += 1
                with pytest.raises(StoreUnavailableError):
                    await submit(s)
                server.start()
                await wait_until_async(lambda: s.batcher.connected, what="the reconnection")
                kept = await wait_until_async(lambda: count(s), what="the store's reconnection")
                assert kept >= served  # who was told "admitted" is on disk
                assert kept % 50 == 0  # a batch is there as a whole or not at all
                # another run: its states have to be compared with the ledger first
                assert (await submit(s))[1] == Verdict.UNVERIFIED
                await seed(s)
            assert (await submit(s))[1] == Verdict.ADMIT

        run(server.url, database, check, max_batch=50)


def test_closing_tells_everybody(valkey: str, database: str) -> None:
    async def check(s: Stack) -> None:
        await seed(s)
        waiting = [submit(s) for _ in range(5)]
        await s.batcher.close()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, StoreUnavailableError) for error in found)
        with pytest.raises(StoreUnavailableError):
            await submit(s)

    run(valkey, database, check)


@pytest.mark.parametrize("days", [-400, -1, 1, 40])
def test_a_gateway_with_a_wrong_clock_asks_again(valkey: str, database: str, days: int) -> None:
    """Its first guess of the day and of the billing period is stale; Redis' answer mends it."""
    plan = plan_of(
        Quota("monthly", "requests", 100, PeriodKind.BILLING),
        Quota("daily", "requests", 100, PeriodKind.DAY),
    )

    async def main() -> None:
        async with stack(
            valkey, database, plan, now_ms=lambda: clock.now_ms() + days * DAY_MS
        ) as s:
            found = await s.hit(s.admission(plan), "s", 20)
            assert admitted(found) == await count(s) == 20
            state = (await s.store.hgetall_many([s.keyspace.state("s")]))[0]
            now_ms = await s.store.now_ms()
            start, end = billing_period(0, 1, now_ms)
            assert state["p:requests"].startswith(f"{start} {end} ")
            assert state["q:requests:day"].split()[0] == str(calendar_bounds(now_ms)[0])

    asyncio.run(main())
