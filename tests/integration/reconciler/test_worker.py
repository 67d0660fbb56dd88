"""The reconciler's tasks: what fails in one does not take the rest with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from core.config import load
from core.errors import ConfigError, StoreUnavailableError
from core.meters import MeterRegistry
from core.policy import Meter
from reconciler.lease import Lease
from reconciler.supervise import Supervisor, Task, attempt
from reconciler.worker import Reconciler
from tests.integration.reconciler.parts import Parts, parts
from tests.integration.reconciler.test_flush import START_MS, spend
from tests.integration.reconciler.test_process import CONFIG
from tests.integration.reconciler.test_refused import EVENT
from tests.support import wait_until_async
from tests.support.scripts import Scripts


@pytest.fixture
def reconciler(
    tmp_path: Path, valkey: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> Reconciler:
    monkeypatch.setenv("TALLYGATE_METRICS_DIR", str(tmp_path / "metrics"))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    found = load(path, {"TALLYGATE_REDIS_URL": valkey, "TALLYGATE_POSTGRES_URL": database})
    return Reconciler(path, found)


def run(valkey: str, database: str, check: Any) -> None:
    async def main() -> None:
        async with parts(valkey, database) as p:
            await check(p)

    asyncio.run(main())


def tasks(reconciler: Reconciler, p: Parts) -> dict[str, Task]:
    return {task.name: task for task in reconciler.tasks(p.store, p.database, p.database)}


@asynccontextmanager
async def supervised(
    p: Parts, *running: Task, ttl_ms: int = 600_000
) -> AsyncIterator[tuple[Lease, asyncio.Event]]:
    """The tasks, running under a lease that is held."""
    lease = Lease(p.database, "test", "me", lambda: ttl_ms)
    assert await lease.renew()
    stopping = asyncio.Event()
    work = asyncio.create_task(Supervisor(lease, stopping).run(running))
    try:
        yield lease, stopping
    finally:
        stopping.set()
        await work


def counting(name: str, rounds: list[str], fails: Exception | None = None, **options: Any) -> Task:
    async def one() -> None:
        rounds.append(name)
        if fails is not None:
            raise fails

    return Task(name, one, lambda: 0.001, retry_s=0.001, **options)


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), ValueError("a bug")])
def test_a_task_that_fails_is_repeated_and_holds_up_no_other(
    valkey: str, database: str, error: Exception
) -> None:
    async def check(p: Parts) -> None:
        rounds: list[str] = []
        async with supervised(p, counting("bad", rounds, error), counting("good", rounds)):
            await wait_until_async(lambda: rounds.count("bad") > 2 and rounds.count("good") > 2)

    run(valkey, database, check)


def test_a_task_that_hangs_holds_up_no_other_and_no_stop(valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        rounds: list[str] = []
        never: Callable[[], Awaitable[object]] = asyncio.Event().wait
        async with supervised(p, Task("stuck", never, lambda: 1.0), counting("good", rounds)):
            await wait_until_async(lambda: len(rounds) > 2)

    run(valkey, database, check)


def test_without_the_lease_only_what_need_not_be_alone_runs(valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        rounds: list[str] = []
        both = (
            counting("alone", rounds, drains=True),
            counting("always", rounds, alone=False),
        )
        async with supervised(p, *both) as (lease, _):
            await wait_until_async(lambda: "alone" in rounds)
            await lease.release()
            before = rounds.count("always")
            await wait_until_async(lambda: rounds.count("always") > before + 3)
            seen = rounds.count("alone")
            await wait_until_async(lambda: rounds.count("always") > before + 9)
            assert rounds.count("alone") == seen
            assert await lease.renew()
            await wait_until_async(lambda: rounds.count("alone") > seen)
            await lease.release()
            rounds.clear()
        # nor does the last round of a stop
        assert "alone" not in rounds

    run(valkey, database, check)


def test_a_stop_is_followed_by_one_more_round_of_what_drains(valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        rounds: list[str] = []

        def slowly(name: str, *, drains: bool) -> Task:
            task = counting(name, rounds)
            return Task(name, task.round, lambda: 3_600.0, drains=drains)

        async with supervised(p, slowly("drains", drains=True), slowly("other", drains=False)):
            await wait_until_async(lambda: len(rounds) == 2)
        assert sorted(rounds) == ["drains", "drains", "other"]

    run(valkey, database, check)


def test_events_do_not_wait_for_counts(reconciler: Reconciler, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        await p.store._client.xadd(p.keyspace.events(0), EVENT)
        assert await attempt(tasks(reconciler, p)["events"])
        assert await p.store.entries(p.keyspace.events(0), 1) == []

    run(valkey, database, check)


def test_nothing_is_stored_before_the_meters_are_pinned(
    reconciler: Reconciler, valkey: str, database: str
) -> None:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    spend(scripts, "s", credits=5)

    async def check(p: Parts) -> None:
        flush = tasks(reconciler, p)["flush"]
        fetch = p.database.transaction

        def away() -> Any:
            raise StoreUnavailableError("away")

        p.database.transaction = away  # type: ignore[method-assign]
        assert not await attempt(flush)
        assert (await p.flusher.lag())[0] == 1
        p.database.transaction = fetch  # type: ignore[method-assign]
        assert await attempt(flush)
        assert (await p.flusher.lag())[0] == 0
        assert await p.ledger("s") == await p.live("s")

    run(valkey, database, check)


def test_other_decimals_than_the_ledgers_end_the_process(
    reconciler: Reconciler, valkey: str, database: str
) -> None:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    spend(scripts, "s", credits=5)

    async def check(p: Parts) -> None:
        await MeterRegistry({"credits": Meter("credits", decimals=5)}).pin(p.database)
        with pytest.raises(ConfigError, match="decimals: 2: pinned as 5"):
            await asyncio.wait_for(reconciler.run(), 30)
        assert (await p.flusher.lag())[0] == 1

    run(valkey, database, check)
